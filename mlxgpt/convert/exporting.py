"""Export of a run's model to transformers, mlx-lm or llama.cpp (GGUF)."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.backend.safetensors_io import save_arrays
from mlxgpt.config import ModelConfig
from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.convert import adapters, gguf, huggingface, mlx_lm, qwen3, tokenizers
from mlxgpt.convert.model_card import render_adapter_card, render_model_card
from mlxgpt.data.chat_template import CHAT_TEMPLATE
from mlxgpt.data.dataset import is_prepared
from mlxgpt.data.example_array import SplitArray
from mlxgpt.data.tokenizers.base import end_of_text_token
from mlxgpt.evaluation import loss
from mlxgpt.model.parameters import VOCAB_MATRICES, flatten_params, load_parameters
from mlxgpt.storage.loading import load_model, load_run_model, open_base_run, open_run_dataset
from mlxgpt.storage.run import Run, find_run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

RUNTIMES = ("hf", "mlx-lm", "gguf")  # choices of --to, with html
ADAPTER_RUNTIMES = ("peft", "mlx-lm")  # with --adapters
EXPORT_REMEDIES: dict[object, str] = {
    "peft": "use one of these, or add --adapters.",
    "html": "for html, use export_html.",
}
QUANTIZE_BITS = (8, 4)  # bits per weight, choices of --quantize


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        folder: folder with the exported files; the file of an export to HTML.
        step: training step of the exported checkpoint.
        loss, quantized_loss: validation loss before and after quantization, in nats per token; None
            without quantization or validation data.
    """

    folder: Path
    step: int
    loss: float | None = None
    quantized_loss: float | None = None


def export(
    *,
    to: str,
    run: str | None = None,
    checkpoint: str = "best",
    quantize: int | None = None,
    adapters: bool = False,
    output: PathLike | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> ExportResult:
    """Export a run's model for another runtime, with tokenizer and model card.

    Args:
        to: `hf` (transformers, also loaded by mlx-lm), `mlx-lm`, or `gguf` (llama.cpp; Ollama and
            LM Studio not tested); with `adapters`, `peft` or `mlx-lm`. HTML: see `export_html`.
        quantize: 8 or 4 bits per weight, for `mlx-lm` and `gguf`; default: float32.
        adapters: export only the adapters of a run with LoRA; default: the fused model.
        output: folder to write; default: exports/RUN-TO.
        run, checkpoint: see `load`.

    Raises:
        UserError: if an argument is not supported, the runtime does not support the model, or the
            folder exists or cannot be written.
    """
    for value, allowed, flag in (
        (to, ADAPTER_RUNTIMES if adapters else RUNTIMES, "--to"),
        (quantize, QUANTIZE_BITS, "--quantize"),
    ):
        if value is not None and value not in allowed:
            raise UserError(
                f"{flag} {value} is not one of {', '.join(map(str, allowed))}",
                EXPORT_REMEDIES.get(value, "use one of these."),
            )
    if adapters:
        if quantize:
            raise UserError("--adapters does not support --quantize", "omit one of them.")
        opened_run = find_run(run, resolve_folder("runs", runs_dir))
        folder = Path(output or f"exports/{opened_run.name}-{to}")
        return ExportResult(folder, export_adapters(opened_run, checkpoint, folder, to))
    opened_run, model, step = load_run_model(run, checkpoint, runs_dir, fall_back=False)
    suffix = f"-{quantize}bit" if quantize else ""
    folder = Path(output) if output else Path("exports") / f"{opened_run.name}-{to}{suffix}"
    parameters = flatten_params(model.parameters())
    export_run(opened_run, parameters, step, folder, to, quantize)
    val = find_validation_data(opened_run, resolve_folder("data", data_dir)) if quantize else None
    if not quantize or val is None:
        return ExportResult(folder, step)
    loss_before = loss.evaluate_run(opened_run, model, val).loss
    load_parameters(model, fake_quantize(opened_run.config.model, parameters, to, quantize))
    return ExportResult(folder, step, loss_before, loss.evaluate_run(opened_run, model, val).loss)


def find_validation_data(run: Run, data_dir: Path) -> SplitArray | None:
    """Validation data of a run; None if it is not here."""
    if not run.data_name or not is_prepared(data_dir / run.data_name):
        return None
    return open_run_dataset(run, data_dir).val


OTHER_FOLDER_REMEDY = "choose another folder: --output DIR."


def export_run(
    run: Run,
    parameters: dict[str, mx.array],
    step: int,
    folder: Path,
    runtime: str,
    bits: int | None = None,
) -> None:
    """Export a run's model to a folder, written atomically. Padding rows of the vocabulary are
    dropped, since another runtime could sample them.

    Args:
        parameters: the model's parameters after `step` updates.
        folder: must not exist yet.
        runtime: one of RUNTIMES.
        bits: bits per weight, one of QUANTIZE_BITS; None: float32.

    Raises:
        UserError: if the runtime does not support the model, or the folder cannot be written.
    """
    if runtime == "hf" and bits:
        raise UserError(
            "--to hf does not support --quantize",
            "omit --quantize, or export --to mlx-lm or --to gguf.",
        )
    if _check_architecture(run) and runtime == "mlx-lm":
        raise UserError(
            f"{run.name} is not a GPT-2, and --to mlx-lm supports GPT-2 only",
            "export it --to hf, then run: mlx_lm.convert --hf-path FOLDER -q",
        )
    with _writing_folder(folder) as scratch:
        _write_files(run, parameters, scratch, runtime, bits)
        files.write_atomically(scratch / "README.md", render_model_card(run, step, runtime, bits))


def _check_architecture(run: Run) -> bool:
    """Whether a run's model is a Qwen3, not a GPT-2.

    Raises:
        UserError: if it is neither.
    """
    is_modern = qwen3.differs_from_gpt2(run.config.model)
    if is_modern and (mismatches := qwen3.find_incompatible_settings(run.config.model)):
        parts = ", ".join(f"{name} = {str(value).lower()}" for name, value in mismatches.items())
        raise UserError(
            f"{run.name} fits neither GPT-2 nor Qwen3, because of {parts}",
            "no other runtime supports this architecture; for an export, train with --recipe "
            "classic (GPT-2) or modern (Qwen3).",
        )
    return is_modern


@contextlib.contextmanager
def _writing_folder(folder: Path) -> Iterator[Path]:
    """Context for the files of an export: yields a temporary folder, which becomes `folder`.

    Raises:
        UserError: if the folder exists or cannot be written.
    """
    with files.file_lock(folder, "exporting to"):
        if files.exists(folder):
            raise UserError(f"{folder} already exists", OTHER_FOLDER_REMEDY)
        scratch = folder.with_name(f".{folder.name}.new")
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # left by an export that was killed
            scratch.mkdir()
            yield scratch
            for path in scratch.iterdir():
                files.fsync_path(path)
            files.publish_folder(scratch, folder)
        except OSError as error:
            raise files.to_user_error(error, "write", folder, OTHER_FOLDER_REMEDY) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def export_adapters(run: Run, checkpoint: str, folder: Path, runtime: str) -> int:
    """Export the adapters of a run to a folder, written atomically. Returns the training step.

    Args:
        checkpoint: `best`, `newest` or a step.
        runtime: one of ADAPTER_RUNTIMES.

    Raises:
        UserError: if the run has no adapters, the runtime cannot hold them, or the folder exists or
            cannot be written.
    """
    base = open_base_run(run)
    _check_architecture(run)
    _, ckpt = load_model(run, checkpoint, fall_back=False)  # checks that they fit the base
    model = adapters.AdapterModel(
        run.config.model,
        run.config.lora,
        ckpt.parameters,
        range(base.tokenizer.vocab_size, run.tokenizer.vocab_size),
        base=str(base.origin.get("hub", f"exports/{base.name}-hf")),
    )
    with _writing_folder(folder) as scratch:
        if runtime == "peft":
            adapters.write_peft_adapters(scratch, model)
            bos = run.bos is not None
            block_size = run.config.model.block_size
            tokenizers.write_hf_tokenizer(scratch, run.tokenizer, block_size, add_bos_token=bos)
            if run.has_chat_template:
                shutil.copyfile(run.folder / CHAT_TEMPLATE, scratch / CHAT_TEMPLATE)
        else:
            adapters.write_mlx_lm_adapters(scratch, model)
        card = render_adapter_card(run, base, ckpt.step, runtime)
        files.write_atomically(scratch / "README.md", card)
    return ckpt.step


def fake_quantize(
    config: ModelConfig, parameters: dict[str, mx.array], runtime: str, bits: int
) -> dict[str, mx.array]:
    """Quantize and dequantize the parameters with a runtime's own scheme."""
    functions = {"mlx-lm": mlx_lm.fake_quantize_mlx_lm, "gguf": gguf.fake_quantize_gguf}
    return functions[runtime](config, parameters, bits)


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
        gguf_name = f"{run.name}.gguf"
        display_name = run.name.encode("utf-8", "backslashreplace").decode("utf-8")
        gguf_model = gguf.GGUFModel(
            config,
            parameters,
            run.tokenizer,
            display_name,
            add_bos_token=run.bos is not None,
            chat_template=run.chat_template() if run.has_chat_template else None,
        )
        gguf.write_gguf(scratch / gguf_name, gguf_model, bits)
        modelfile = gguf.render_modelfile(gguf_name, end_of_text=end_of_text_token(run.tokenizer))
        (scratch / "Modelfile").write_text(modelfile, encoding="utf-8", errors="surrogateescape")
        return
    if qwen3.differs_from_gpt2(config):
        huggingface.write_config_json(scratch, qwen3.make_qwen3_config(config, eos))
        arrays = qwen3.convert_to_qwen3(config, parameters)
        save_arrays(scratch / huggingface.WEIGHTS_FILE, arrays, {"format": "pt"})
    elif bits:
        mlx_lm.write_mlx_lm(scratch, config, parameters, eos, bits)
    else:
        huggingface.write_gpt2_config(scratch, config, eos)
        huggingface.write_gpt2_parameters(scratch, config, parameters)
    huggingface.write_generation_config(scratch, eos)
    tokenizers.write_hf_tokenizer(
        scratch, run.tokenizer, config.block_size, add_bos_token=run.bos is not None
    )
    if run.has_chat_template:
        shutil.copyfile(run.folder / CHAT_TEMPLATE, scratch / CHAT_TEMPLATE)
