"""A run's model for other runtimes: transformers, mlx-lm, llama.cpp."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.backend.safetensors_io import save_arrays
from mlxgpt.config import ModelConfig
from mlxgpt.convert import gguf, huggingface, mlx_lm, qwen3, tokenizers
from mlxgpt.convert.model_card import card
from mlxgpt.data.tokenizers.char import end_name
from mlxgpt.model.parameters import VOCAB_MATRICES
from mlxgpt.storage.run import CHAT_TEMPLATE, Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

RUNTIMES = ("hf", "mlx-lm", "gguf")
BITS = (8, 4)
OTHER = "choose another folder: --out DIR."


def export(
    run: Run,
    parameters: dict[str, mx.array],
    step: int,
    folder: Path,
    to: str,
    quantize: int | None = None,
) -> None:
    """Write a folder that a runtime loads; it appears whole, or not. What a model has room for
    beyond its tokenizer's ids is left out, since elsewhere it could be drawn.

    Args:
        parameters: of the run's model after `step` updates.
        folder: must not be there yet.
        to: one of RUNTIMES.
        quantize: bits of the weights, one of BITS; None: float32.

    Raises:
        UserError: if the runtime cannot have such a model, or the folder cannot be written.
    """
    if to == "hf" and quantize:
        raise UserError(
            "transformers has no quantized form of a GPT-2 that runs everywhere",
            "leave out --quantize, or export --to mlx-lm or --to gguf.",
        )
    modern = unlike_gpt2(run.config.model)
    if modern and (others := qwen3.unlike(run.config.model)):
        parts = ", ".join(f"{name} = {str(value).lower()}" for name, value in others.items())
        raise UserError(
            f"{run.name} is no GPT-2, and for Qwen3's layout it should not have {parts}",
            "other runtimes have no such model; train one with the parts of either.",
        )
    if modern and to == "mlx-lm":
        raise UserError(
            f"{run.name} is no GPT-2; mlx-lm quantizes such a model itself",
            "export it --to hf, and then: mlx_lm.convert --hf-path FOLDER -q.",
        )
    with files.only_one(folder, "exporting to"):
        if files.exists(folder):
            raise UserError(f"{folder} exists", OTHER)
        scratch = folder.with_name(f".{folder.name}.new")
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # of an export that was killed
            scratch.mkdir()
            _write(run, parameters, scratch, to, quantize)
            files.write_atomically(scratch / "README.md", card(run, step, to, quantize))
            for path in scratch.iterdir():
                files.sync(path)
            files.publish(scratch, folder)
        except OSError as error:
            raise files.os_error(error, "write", folder, OTHER) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def unlike_gpt2(config: ModelConfig) -> bool:
    """Whether a model has other parts than GPT-2's."""
    own = ModelConfig()
    parts = ("position", "norm", "qk_norm", "mlp", "tied", "embedding_norm", "value_embeddings")
    return any(getattr(config, name) != getattr(own, name) for name in parts)


def rounded(
    config: ModelConfig, parameters: dict[str, mx.array], to: str, bits: int
) -> dict[str, mx.array]:
    """The parameters as a runtime has them once they were quantized."""
    return {"mlx-lm": mlx_lm, "gguf": gguf}[to].rounded(config, parameters, bits)


def _write(
    run: Run, parameters: dict[str, mx.array], scratch: Path, to: str, quantize: int | None
) -> None:
    ids, end = run.tokenizer.vocab_size, run.tokenizer.end_of_text
    model = replace(run.config.model, vocab_size=ids)
    tables = {name: parameters[name][:ids] for name in VOCAB_MATRICES if name in parameters}
    parameters = {**parameters, **tables}
    if to == "gguf":
        name = f"{run.name}.gguf"
        shown = run.name.encode("utf-8", "backslashreplace").decode("utf-8")
        whole = gguf.Model(model, parameters, run.tokenizer, shown, run.bos is not None)
        gguf.write(scratch / name, whole, quantize)
        text = gguf.modelfile(name, end_of_text=end_name(run.tokenizer))
        (scratch / "Modelfile").write_text(text, encoding="utf-8", errors="surrogateescape")
        return
    if unlike_gpt2(model):
        huggingface.write_tree(scratch, qwen3.config_tree(model, end))
        arrays = qwen3.arrays(model, parameters)
        save_arrays(scratch / huggingface.WEIGHTS, arrays, {"format": "pt"})
    elif quantize:
        mlx_lm.write(scratch, model, parameters, end, quantize)
    else:
        huggingface.write_config(scratch, model, end)
        huggingface.write_parameters(scratch, model, parameters)
    tokenizers.write(scratch, run.tokenizer, model.block_size, add_bos_token=run.bos is not None)
    if files.is_file(run.folder / CHAT_TEMPLATE):
        shutil.copyfile(run.folder / CHAT_TEMPLATE, scratch / CHAT_TEMPLATE)
