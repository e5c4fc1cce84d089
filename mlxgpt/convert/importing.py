"""Import of GPT-2 models from transformers, the Hugging Face hub or nanoGPT as a run."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.convert import adapters, download, huggingface, nanogpt, tokenizers
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.data import meta_pickle
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.bpe import GPT2_VOCAB_SIZE, BPETokenizer, load_gpt2_tokenizer
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.storage.loading import load_model
from mlxgpt.storage.logs import RUN_FILE
from mlxgpt.storage.run import Run, find_run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


def import_model(
    source: PathLike,
    *,
    run: str | None = None,
    meta: PathLike | None = None,
    base: str | None = None,
    runs_dir: PathLike | None = None,
) -> Run:
    """Import a model as a new run, to generate with, evaluate or fine-tune.

    Args:
        source: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, `distilgpt2`, any GPT-2 on the
            Hugging Face hub as OWNER/NAME, a local folder with such a model, or nanoGPT's ckpt.pt.
        run: name or folder of the new run; default: the source's name.
        meta: meta.pkl of nanoGPT's dataset, for character-level models.
        base: run that the adapters in the folder `source` belong to, for adapters of PEFT or
            mlx-lm.

    Raises:
        UserError: if the model cannot be read or is not supported, or the run already exists.
    """
    if base:
        base_run = find_run(base, resolve_folder("runs", runs_dir))
        return _import_adapters(files.expand_user(str(source)), run, base_run)
    imported_model = read_model(str(source), Path(meta) if meta else None)
    name = run or default_run_name(str(source))
    folder = Path(name) if os.sep in name else resolve_folder("runs", runs_dir) / name
    return create_imported_run(imported_model, folder)


def _import_adapters(source: Path, name: str | None, base: Run) -> Run:
    """Import a folder of adapters as a new run next to its base."""
    name = name or default_run_name(str(source))
    if os.sep in name:
        raise UserError(
            f"--run {name} is a path, but a run of adapters must be next to its base",
            f"use a name; the run will be in {base.folder.parent}.",
        )
    folder = base.folder.parent / name
    model, ckpt = load_model(base)
    parameters = flatten_params(model.parameters())
    lora, arrays = adapters.read_adapters(source, base.config.model, parameters)
    file = checkpoint.checkpoint_folder(base.checkpoints, ckpt.step) / checkpoint.MODEL_FILE
    run = Run(
        folder,
        replace(base.config, lora=lora),
        base.tokenizer,
        data_name=None,
        data_fingerprint=None,
        add_bos_token=base.add_bos_token,
        origin={"run": base.name, "step": ckpt.step, "sha256": files.sha256_file(file)},
    )
    chat_template = base.chat_template() if base.has_chat_template else None
    _create_run(run, arrays, chat_template)
    load_model(run)  # warns if the adapters change nothing
    return run


def default_run_name(source: str) -> str:
    """Default name of an imported run: the model's or folder's name; for a ckpt.pt, the name of its
    parent folder.
    """
    path = files.expand_user(source)
    return path.absolute().parent.name if files.is_file(path) else path.absolute().name


def read_model(source: str, meta: Path | None = None) -> ImportedModel:
    """Read a model from a folder, nanoGPT's ckpt.pt, or the Hugging Face hub.

    Args:
        meta: nanoGPT's meta.pkl, for character-level models.

    Raises:
        UserError: if there is no such model, or its architecture is not supported.
    """
    path = files.expand_user(source)
    if files.is_file(path / adapters.ADAPTER_CONFIG):
        raise UserError(
            f"{path} contains adapters (LoRA), not a model",
            "import the model they belong to first, then add --base RUN.",
        )
    if files.is_file(path):
        return _read_nanogpt(path, meta)
    if meta:
        raise UserError(
            "--meta is for a nanoGPT ckpt.pt only", "specify that file, or omit --meta."
        )
    if files.is_folder(path):
        return _read_folder(path, {"folder": path.absolute().name})
    if source not in download.MODEL_ALIASES and source.count("/") != 1:
        raise UserError(
            f"{source!r} is neither a folder nor a model name",
            f"use a folder, OWNER/NAME, or one of {', '.join(download.MODEL_ALIASES)}.",
        )
    folder, commit = download.download_model(source)
    repo_id = download.MODEL_ALIASES.get(source, source)
    return _read_folder(folder, {"hub": repo_id, "revision": commit})


def _read_nanogpt(path: Path, meta: Path | None) -> ImportedModel:
    ckpt = nanogpt.read_nanogpt_checkpoint(path)
    logger.info(
        "nanoGPT uses exact GELU since June 2023, mlxgpt uses GPT-2's tanh approximation: the loss "
        "may differ in the fifth digit"
    )
    tokenizer: Tokenizer
    if meta:
        tokenizer = meta_pickle.load_char_tokenizer(meta)
    elif ckpt.config.vocab_size >= GPT2_VOCAB_SIZE:
        tokenizer = load_gpt2_tokenizer()
    else:
        raise UserError(
            f"{path} has a vocabulary of {ckpt.config.vocab_size:,}, which is not GPT-2's",
            f"specify the meta.pkl of its dataset: --meta data/{ckpt.dataset or 'NAME'}/meta.pkl",
        )
    if tokenizer.vocab_size > ckpt.config.vocab_size:
        raise _vocab_size_error(str(meta or path), tokenizer.vocab_size, ckpt.config.vocab_size)
    # nanoGPT's sample.py adds no start token to a prompt.
    origin = {"nanogpt": path.name, "step": ckpt.step}
    return ImportedModel(
        ckpt.config, ckpt.parameters, tokenizer, add_bos_token=False, origin=origin
    )


def _read_folder(folder: Path, origin: dict[str, str]) -> ImportedModel:
    config = huggingface.read_gpt2_config(folder)
    tokenizer, add_bos_token = tokenizers.read_hf_tokenizer(folder, config.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise _vocab_size_error(str(folder), tokenizer.vocab_size, config.vocab_size)
    parameters = huggingface.read_gpt2_parameters(folder, config)
    chat_template = tokenizers.read_chat_template(folder)
    return ImportedModel(config, parameters, tokenizer, add_bos_token, origin, chat_template)


def _vocab_size_error(source: str, tokenizer_size: int, model_size: int) -> UserError:
    return UserError(
        f"the tokenizer in {source} has {tokenizer_size:,} tokens, but the model's vocabulary "
        f"size is {model_size:,}",
        "they do not belong together: copy or download the complete folder again.",
    )


def create_imported_run(imported_model: ImportedModel, folder: Path) -> Run:
    """Create a run from an imported model, with a checkpoint at step 0 that has no optimizer state.
    Empties `imported_model.parameters`, so that the weights are in memory only once.

    Raises:
        UserError: if weights are not finite, or the folder already exists or cannot be written.
    """
    if name := checkpoint.find_non_finite(imported_model.parameters):
        raise UserError(
            f"the model's {name} contains non-finite values (NaN or infinity)",
            "use a checkpoint from before training diverged, or copy it again.",
        )
    run = Run(
        folder,
        _make_config(imported_model.config, imported_model),
        imported_model.tokenizer,
        data_name=None,
        data_fingerprint=None,
        add_bos_token=imported_model.add_bos_token,
        origin=imported_model.origin,
    )
    parameters = dict(imported_model.parameters)
    imported_model.parameters.clear()
    _create_run(run, parameters, imported_model.chat_template)
    return run


def _create_run(run: Run, parameters: dict[str, mx.array], chat_template: str | None) -> None:
    """Create a run's folder with a checkpoint at step 0.

    Raises:
        UserError: if the folder already exists or cannot be written.
    """
    folder = run.folder
    with files.file_lock(folder, "writing"):
        if files.exists(folder) and any(folder.iterdir()):
            if files.exists(folder / RUN_FILE) and not runs.open_run(folder).steps():
                files.remove_folder(folder)  # left by an interrupted import
            else:
                raise UserError(f"{folder} already exists", "choose another name: --run NAME.")
        runs.create_run(run, chat_template)
        for name in parameters:  # one at a time, to avoid two copies of the model in memory
            parameters[name] = mx.contiguous(parameters[name])
            mx.eval(parameters[name])
        try:
            run.save(run.checkpoints, 0, parameters, {})
        except UserError:  # the checkpoint may exist, but not be synced to disk
            with contextlib.suppress(OSError):
                files.remove_folder(folder)
            raise


def _make_config(model_config: ModelConfig, imported_model: ImportedModel) -> Config:
    """Config of an imported run, with placeholder training settings."""
    tokenizer_kind = "char"
    if isinstance(imported_model.tokenizer, BPETokenizer):
        tokenizer_kind = "gpt2" if imported_model.tokenizer.vocab_size == GPT2_VOCAB_SIZE else "bpe"
    return Config(
        model_config,
        DataConfig(source=(), tokenizer=tokenizer_kind),
        OptimConfig(),
        replace(TrainConfig(), dtype="float32", max_steps=1),
    )
