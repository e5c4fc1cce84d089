"""A model that was made elsewhere becomes a run."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from mlxgpt.convert import download, huggingface, nanogpt, tokenizers
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.data import meta_pickle
from mlxgpt.data.tokenizers.bpe import GPT2_VOCAB_SIZE, BPETokenizer, load_gpt2_tokenizer
from mlxgpt.data.tokenizers.char import Tokenizer
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


def default_run_name(source: str) -> str:
    """A run's name for a source: a folder's or the model's own, and of nanoGPT's ckpt.pt its
    folder's.
    """
    path = files.expand_user(source)
    return path.absolute().parent.name if files.is_file(path) else path.absolute().name


def read_model(source: str, meta: Path | None = None) -> ImportedModel:
    """The model that a source names: a folder, nanoGPT's ckpt.pt, or a model of the hub.

    Args:
        meta: nanoGPT's meta.pkl, for a model of characters.

    Raises:
        UserError: if there is none, or it is of a kind that is not built here.
    """
    path = files.expand_user(source)
    if files.is_file(path):
        return _read_nanogpt(path, meta)
    if meta:
        raise UserError(
            "--meta belongs to nanoGPT's ckpt.pt", "name that file, or leave out --meta."
        )
    if files.is_folder(path):
        return _read_folder(path, {"folder": path.absolute().name})
    if source not in download.MODEL_ALIASES and source.count("/") != 1:
        raise UserError(
            f"there is no folder {source!r}, and no model of the hub is called so",
            f"name a folder, OWNER/NAME, or one of {', '.join(download.MODEL_ALIASES)}.",
        )
    folder, commit = download.download_model(source)
    repo_id = download.MODEL_ALIASES.get(source, source)
    return _read_folder(folder, {"hub": repo_id, "revision": commit})


def _read_nanogpt(path: Path, meta: Path | None) -> ImportedModel:
    ckpt = nanogpt.read_nanogpt_checkpoint(path)
    logger.info(
        "nanoGPT's GELU is the exact one since June 2023, and this one GPT-2's: where they differ, "
        "losses do in the fifth place"
    )
    tokenizer: Tokenizer
    if meta:
        tokenizer = meta_pickle.load_char_tokenizer(meta)
    elif ckpt.config.vocab_size >= GPT2_VOCAB_SIZE:
        tokenizer = load_gpt2_tokenizer()
    else:
        raise UserError(
            f"{path} has a vocabulary of {ckpt.config.vocab_size:,}: its tokens are not GPT-2's",
            f"give the meta.pkl of its data: --meta data/{ckpt.dataset or 'NAME'}/meta.pkl",
        )
    if tokenizer.vocab_size > ckpt.config.vocab_size:
        raise _vocab_size_error(str(meta or path), tokenizer.vocab_size, ckpt.config.vocab_size)
    # nanoGPT's sample.py puts nothing before a prompt.
    origin = {"nanogpt": path.name, "step": ckpt.step}
    return ImportedModel(ckpt.config, ckpt.parameters, tokenizer, False, origin)


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
        f"the tokenizer in {source} gives {tokenizer_size:,} ids, and the model has room for "
        f"{model_size:,}",
        "they do not belong together: copy or download the whole folder again.",
    )


def create_imported_run(imported_model: ImportedModel, folder: Path) -> Run:
    """Make a run of a model: its checkpoint of step 0 has the weights, and no optimizer. They are
    taken out of `imported_model`, so that memory holds them once.

    Raises:
        UserError: if its weights are not finite, there is something else of that name, or it cannot
            be written.
    """
    if name := checkpoint.find_non_finite(imported_model.parameters):
        raise UserError(
            f"the model's {name} has values that are not finite (NaN or infinity)",
            "take a checkpoint from before its training diverged, or copy it again.",
        )
    with files.file_lock(folder, "writing"):
        if files.exists(folder) and any(folder.iterdir()):
            if files.exists(folder / "run.json") and not runs.open_run(folder).steps():
                files.remove_folder(folder)  # an import that was interrupted
            else:
                raise UserError(f"{folder} exists", "choose another name: --run NAME.")
        run = Run(
            folder,
            _make_config(imported_model.config, imported_model),
            imported_model.tokenizer,
            data_name=None,
            data_fingerprint=None,
            add_bos_token=imported_model.add_bos_token,
            origin=imported_model.origin,
        )
        runs.create_run(run)
        if imported_model.chat_template is not None:
            files.write_atomically(folder / runs.CHAT_TEMPLATE, imported_model.chat_template)
        parameters = dict(imported_model.parameters)
        imported_model.parameters.clear()
        for name in parameters:  # one by one, so that no two copies of all are there
            parameters[name] = mx.contiguous(parameters[name])
            mx.eval(parameters[name])
        try:
            run.save(run.checkpoints, 0, parameters, {})
        except UserError:  # its checkpoint may be there all the same, and not yet on the disk
            with contextlib.suppress(OSError):
                files.remove_folder(folder)
            raise
    return run


def _make_config(model_config: ModelConfig, imported_model: ImportedModel) -> Config:
    """What a run has to say of itself; no training is planned."""
    tokenizer_kind = "char"
    if isinstance(imported_model.tokenizer, BPETokenizer):
        tokenizer_kind = "gpt2" if imported_model.tokenizer.vocab_size == GPT2_VOCAB_SIZE else "bpe"
    return Config(
        model_config,
        DataConfig(source=(), tokenizer=tokenizer_kind),
        OptimConfig(),
        replace(TrainConfig(), dtype="float32", max_steps=1),
    )
