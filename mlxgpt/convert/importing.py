"""A model that was made elsewhere becomes a run."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from mlxgpt.convert import download, huggingface, nanogpt, tokenizers
from mlxgpt.convert.huggingface import Foreign
from mlxgpt.data import meta_pickle
from mlxgpt.data.tokenizers.bpe import GPT2_VOCAB_SIZE, BPETokenizer, gpt2
from mlxgpt.data.tokenizers.char import Tokenizer
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


def name_of(source: str) -> str:
    """A run's name for a source: a folder's or the model's own, and of nanoGPT's ckpt.pt its
    folder's.
    """
    path = files.expand_user(source)
    return path.absolute().parent.name if files.is_file(path) else path.absolute().name


def read(source: str, meta: Path | None = None) -> Foreign:
    """The model that a source names: a folder, nanoGPT's ckpt.pt, or a model of the hub.

    Args:
        meta: nanoGPT's meta.pkl, for a model of characters.

    Raises:
        UserError: if there is none, or it is of a kind that is not built here.
    """
    path = files.expand_user(source)
    if files.is_file(path):
        return _of_nanogpt(path, meta)
    if meta:
        raise UserError(
            "--meta belongs to nanoGPT's ckpt.pt", "name that file, or leave out --meta."
        )
    if files.is_folder(path):
        return _of_folder(path, {"folder": path.absolute().name})
    if source not in download.KNOWN and source.count("/") != 1:
        raise UserError(
            f"there is no folder {source!r}, and no model of the hub is called so",
            f"name a folder, OWNER/NAME, or one of {', '.join(download.KNOWN)}.",
        )
    place, commit = download.fetch(source)
    hub = download.KNOWN.get(source, source)
    return _of_folder(place, {"hub": hub, "revision": commit})


def _of_nanogpt(path: Path, meta: Path | None) -> Foreign:
    found = nanogpt.read_checkpoint(path)
    logger.info(
        "nanoGPT's GELU is the exact one since June 2023, and this one GPT-2's: where they differ, "
        "losses do in the fifth place"
    )
    tokenizer: Tokenizer
    if meta:
        tokenizer = meta_pickle.tokenizer(meta)
    elif found.config.vocab_size >= GPT2_VOCAB_SIZE:
        tokenizer = gpt2()
    else:
        raise UserError(
            f"{path} has a vocabulary of {found.config.vocab_size:,}: its tokens are not GPT-2's",
            f"give the meta.pkl of its data: --meta data/{found.dataset or 'NAME'}/meta.pkl",
        )
    if tokenizer.vocab_size > found.config.vocab_size:
        raise _too_many_ids(str(meta or path), tokenizer.vocab_size, found.config.vocab_size)
    # nanoGPT's sample.py puts nothing before a prompt.
    origin = {"nanogpt": path.name, "step": found.step}
    return Foreign(found.config, found.parameters, tokenizer, False, origin)


def _of_folder(folder: Path, origin: dict[str, str]) -> Foreign:
    config = huggingface.read_config(folder)
    tokenizer, add_bos_token = tokenizers.read(folder, config.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise _too_many_ids(str(folder), tokenizer.vocab_size, config.vocab_size)
    parameters = huggingface.read_parameters(folder, config)
    template = tokenizers.chat_template(folder)
    return Foreign(config, parameters, tokenizer, add_bos_token, origin, template)


def _too_many_ids(where: str, ids: int, room: int) -> UserError:
    return UserError(
        f"the tokenizer in {where} gives {ids:,} ids, and the model has room for {room:,}",
        "they do not belong together: copy or download the whole folder again.",
    )


def make_run(foreign: Foreign, folder: Path) -> Run:
    """Make a run of a model: its checkpoint of step 0 has the weights, and no optimizer. They are
    taken out of `foreign`, so that memory holds them once.

    Raises:
        UserError: if its weights are not finite, there is something else of that name, or it cannot
            be written.
    """
    if name := checkpoint.first_not_finite(foreign.parameters):
        raise UserError(
            f"the model's {name} has values that are not finite (NaN or infinity)",
            "take a checkpoint from before its training diverged, or copy it again.",
        )
    with files.only_one(folder, "writing"):
        if files.exists(folder) and any(folder.iterdir()):
            if files.exists(folder / "run.json") and not runs.open_run(folder).steps():
                files.remove(folder)  # an import that was interrupted
            else:
                raise UserError(f"{folder} exists", "choose another name: --run NAME.")
        run = Run(
            folder,
            _config(foreign.config, foreign),
            foreign.tokenizer,
            data_name=None,
            data_fingerprint=None,
            add_bos_token=foreign.add_bos_token,
            origin=foreign.origin,
        )
        runs.create(run)
        if foreign.chat_template is not None:
            files.write_atomically(folder / runs.CHAT_TEMPLATE, foreign.chat_template)
        parameters = dict(foreign.parameters)
        foreign.parameters.clear()
        for name in parameters:  # one by one, so that no two copies of all are there
            parameters[name] = mx.contiguous(parameters[name])
            mx.eval(parameters[name])
        try:
            run.save(run.checkpoints, 0, parameters, {})
        except UserError:  # its checkpoint may be there all the same, and not yet on the disk
            with contextlib.suppress(OSError):
                files.remove(folder)
            raise
    return run


def _config(model: ModelConfig, foreign: Foreign) -> Config:
    """What a run has to say of itself; no training is planned."""
    kind = "char"
    if isinstance(foreign.tokenizer, BPETokenizer):
        kind = "gpt2" if foreign.tokenizer.vocab_size == GPT2_VOCAB_SIZE else "bpe"
    return Config(
        model,
        DataConfig(source=(), tokenizer=kind),
        OptimConfig(),
        replace(TrainConfig(), dtype="float32", max_steps=1),
    )
