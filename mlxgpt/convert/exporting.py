"""A run's model for other runtimes: transformers, mlx-lm, llama.cpp."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.backend.safetensors_io import save_arrays
from mlxgpt.config import ModelConfig
from mlxgpt.convert import gguf, huggingface, mlx_lm, qwen3, tokenizers
from mlxgpt.convert.model_card import render_model_card
from mlxgpt.data.tokenizers.char import end_of_text_token
from mlxgpt.model.parameters import VOCAB_MATRICES
from mlxgpt.storage.run import CHAT_TEMPLATE, Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

RUNTIMES = ("hf", "mlx-lm", "gguf")
QUANTIZE_BITS = (8, 4)
OTHER_FOLDER_REMEDY = "choose another folder: --out DIR."


def export_run(
    run: Run,
    parameters: dict[str, mx.array],
    step: int,
    folder: Path,
    runtime: str,
    bits: int | None = None,
) -> None:
    """Write a folder that a runtime loads; it appears whole, or not. What a model has room for
    beyond its tokenizer's ids is left out, since elsewhere it could be drawn.

    Args:
        parameters: of the run's model after `step` updates.
        folder: must not be there yet.
        runtime: one of RUNTIMES.
        bits: bits of the weights, one of BITS; None: float32.

    Raises:
        UserError: if the runtime cannot have such a model, or the folder cannot be written.
    """
    if runtime == "hf" and bits:
        raise UserError(
            "transformers has no quantized form of a GPT-2 that runs everywhere",
            "leave out --quantize, or export --to mlx-lm or --to gguf.",
        )
    is_modern = differs_from_gpt2(run.config.model)
    if is_modern and (mismatches := qwen3.find_incompatible_settings(run.config.model)):
        parts = ", ".join(f"{name} = {str(value).lower()}" for name, value in mismatches.items())
        raise UserError(
            f"{run.name} is no GPT-2, and for Qwen3's layout it should not have {parts}",
            "other runtimes have no such model; train one with the parts of either.",
        )
    if is_modern and runtime == "mlx-lm":
        raise UserError(
            f"{run.name} is no GPT-2; mlx-lm quantizes such a model itself",
            "export it --to hf, and then: mlx_lm.convert --hf-path FOLDER -q.",
        )
    with files.file_lock(folder, "exporting to"):
        if files.exists(folder):
            raise UserError(f"{folder} exists", OTHER_FOLDER_REMEDY)
        scratch = folder.with_name(f".{folder.name}.new")
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # of an export that was killed
            scratch.mkdir()
            _write_files(run, parameters, scratch, runtime, bits)
            files.write_atomically(
                scratch / "README.md", render_model_card(run, step, runtime, bits)
            )
            for path in scratch.iterdir():
                files.fsync_path(path)
            files.publish_folder(scratch, folder)
        except OSError as error:
            raise files.to_user_error(error, "write", folder, OTHER_FOLDER_REMEDY) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def differs_from_gpt2(config: ModelConfig) -> bool:
    """Whether a model has other parts than GPT-2's."""
    gpt2_config = ModelConfig()
    parts = ("position", "norm", "qk_norm", "mlp", "tied", "embedding_norm", "value_embeddings")
    return any(getattr(config, name) != getattr(gpt2_config, name) for name in parts)


def fake_quantize(
    config: ModelConfig, parameters: dict[str, mx.array], runtime: str, bits: int
) -> dict[str, mx.array]:
    """The parameters as a runtime has them once they were quantized."""
    return {"mlx-lm": mlx_lm, "gguf": gguf}[runtime].rounded(config, parameters, bits)


def _write_files(
    run: Run, parameters: dict[str, mx.array], scratch: Path, runtime: str, bits: int | None
) -> None:
    vocab_size, eos = run.tokenizer.vocab_size, run.tokenizer.end_of_text
    config = replace(run.config.model, vocab_size=vocab_size)
    vocab_matrices = {
        name: parameters[name][:vocab_size] for name in VOCAB_MATRICES if name in parameters
    }
    parameters = {**parameters, **vocab_matrices}
    if runtime == "gguf":
        name = f"{run.name}.gguf"
        display_name = run.name.encode("utf-8", "backslashreplace").decode("utf-8")
        gguf_model = gguf.GGUFModel(
            config, parameters, run.tokenizer, display_name, run.bos is not None
        )
        gguf.write_gguf(scratch / name, gguf_model, bits)
        text = gguf.render_modelfile(name, end_of_text=end_of_text_token(run.tokenizer))
        (scratch / "Modelfile").write_text(text, encoding="utf-8", errors="surrogateescape")
        return
    if differs_from_gpt2(config):
        huggingface.write_config_json(scratch, qwen3.make_qwen3_config(config, eos))
        arrays = qwen3.convert_to_qwen3(config, parameters)
        save_arrays(scratch / huggingface.WEIGHTS_FILE, arrays, {"format": "pt"})
    elif bits:
        mlx_lm.write_mlx_lm(scratch, config, parameters, eos, bits)
    else:
        huggingface.write_gpt2_config(scratch, config, eos)
        huggingface.write_gpt2_parameters(scratch, config, parameters)
    tokenizers.write_hf_tokenizer(
        scratch, run.tokenizer, config.block_size, add_bos_token=run.bos is not None
    )
    if files.is_file(run.folder / CHAT_TEMPLATE):
        shutil.copyfile(run.folder / CHAT_TEMPLATE, scratch / CHAT_TEMPLATE)
