"""nanoGPT's ckpt.pt: a model as its train.py saves it, read into our names.

Its linear layers have our layout, [out, in], so that only names differ. PyTorch reads the file,
and with `weights_only` runs nothing that is in it. Knows nothing of the data the model was
trained on, but for its name.

nanoGPT's GELU has been the exact one since June 2023; ours, GPT-2's and that of an older nanoGPT is
the tanh form, from which it differs by less than 5e-4. The file does not say which it was.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlxgpt import config as configs
from mlxgpt.config import ModelConfig
from mlxgpt.convert.huggingface import plain_name
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import check_shapes, flatten_params
from mlxgpt.model.stats import count_parameters
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

NEEDED = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
DEFAULTS = {"bias": True, "dropout": 0.0}  # GPTConfig's, which the oldest files rely on
HEAD = "lm_head.weight"
MASK = re.compile(r"h\.\d+\.attn\.bias")  # a buffer where PyTorch had no flash attention
REMEDY = "give the ckpt.pt that nanoGPT's train.py wrote, and copy it again if it is one."


@dataclass(frozen=True)
class Saved:
    """A model that nanoGPT trained.

    Args:
        config: its shape. vocab_size may be more than the tokenizer gives: nanoGPT pads GPT-2's
            50,257 ids to 50,304.
        parameters: float32, by our names.
        step: updates done.
        val_loss: nats a token, nanoGPT's estimate from some random batches; None if unknown.
        dataset: the folder in nanoGPT's data/ that it was trained on; None if unknown.
    """

    config: ModelConfig
    parameters: dict[str, mx.array]
    step: int
    val_loss: float | None
    dataset: str | None


def read_checkpoint(path: Path) -> Saved:
    """Read a checkpoint of nanoGPT's, in as much memory as the file and the float32 weights take.

    Args:
        path: the ckpt.pt, of any nanoGPT whose head is tied to its embedding, as it has been
            since January 2023; compiled or not, in float32, float16 or bfloat16.

    Raises:
        UserError: if PyTorch is missing, the file is not such a checkpoint, holds anything that
            could run code, or weights that are not those of its own `model_args`.
    """
    saved = _load(path)
    for name in ("model", "model_args", "iter_num"):
        if name not in saved:
            raise _refused(path, f"it has no {name!r}")
    config = _config(path, saved["model_args"])
    tensors = _tensors(path, saved["model"])
    settings = saved.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    step, val_loss = saved["iter_num"], _loss(saved.get("best_val_loss"))
    if type(step) is not int or step < 0:
        raise _refused(path, "its iter_num is no number of steps")
    del saved  # with the optimizer's state, twice as large as the model
    parameters = _parameters(path, tensors, config)
    return Saved(config, parameters, step, val_loss, dataset if type(dataset) is str else None)


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "nanoGPT's checkpoints are read by PyTorch, which is not installed",
            "get it: pip install 'torch>=2.6,<3'; on Linux without an NVIDIA GPU its CPU build.",
        ) from error
    return torch


def _read_with_reason(path: Path, read: Callable[[], Any]) -> Any:
    """What PyTorch reads from a file. It does not know why it could not, so the file is read here,
    too, which raises the OSError; where that works, PyTorch tries again.

    Raises:
        OSError: if the file cannot be read.
        Exception: whatever `read` raises where it can be.
    """
    try:
        return read()
    except Exception:
        files.sha256(path)
    return read()


def _load(path: Path) -> dict[Any, Any]:
    """What torch.save was given, without anything but plain values and tensors."""
    torch = _torch()

    def read() -> Any:
        # Checked first, as a compressed file could grow a thousandfold in memory.
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _refused(path, "it is compressed, which PyTorch's files are not")
        return torch.load(path, map_location="cpu", weights_only=True)

    try:
        saved = _read_with_reason(path, read)
    except UserError:
        raise
    except OSError as error:
        raise files.os_error(error, "read", path, REMEDY) from error
    except zipfile.BadZipFile as error:
        raise _refused(path, "it is not a file of PyTorch's, or was cut short") from error
    except Exception as error:  # a damaged file has PyTorch raise whatever there is
        if "Weights only load failed" in str(error):
            raise UserError(
                f"{path} holds more than weights and plain settings, and could run code",
                "nanoGPT's own checkpoints do not: save it again with nanoGPT's train.py.",
            ) from error
        raise _refused(path, f"PyTorch cannot read it ({type(error).__name__})") from error
    if not isinstance(saved, dict):
        raise _refused(path, "it is not a dictionary")
    return saved


def _config(path: Path, arguments: Any) -> ModelConfig:
    """The shape that `model_args` tell."""
    if not isinstance(arguments, dict):
        raise _refused(path, "its model_args are none")
    if missing := [name for name in NEEDED if name not in arguments]:
        raise _refused(path, f"its model_args lack {', '.join(missing)}")
    shape = {name: arguments[name] for name in NEEDED}
    shape |= {name: arguments.get(name, default) for name, default in DEFAULTS.items()}
    try:
        config = configs.from_tree({"model": shape}).model
    except UserError as error:
        raise _refused(path, error.problem) from error
    if not config.vocab_size:
        raise _refused(path, "its vocab_size is 0")
    return config


def _tensors(path: Path, model: Any) -> dict[str, Any]:
    """The tensors of a state dict by our names, the head and the masks left out."""
    torch = _torch()
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise _refused(path, "its model is not a dictionary of tensors")
    tensors: dict[str, Any] = {}
    for full, tensor in model.items():
        name = plain_name(full)
        if MASK.fullmatch(name):
            continue
        plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if not plain or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
            raise _refused(path, f"its {full!r} is no plain tensor")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise _refused(path, f"its {full!r} is of type {tensor.dtype}")
        if name in tensors:
            raise _refused(path, f"it has {name!r} twice")
        tensors[name] = tensor.detach()
    return tensors


def _parameters(path: Path, tensors: dict[str, Any], config: ModelConfig) -> dict[str, mx.array]:
    """The tensors as our float32 arrays, one after the other; `tensors` is empty then."""
    torch = _torch()
    head, embedding = tensors.pop(HEAD, None), tensors.get("wte.weight")
    if head is None or embedding is None:
        raise _refused(path, "its model has no embedding, or no head")
    # Before anything of their size is made: a tensor may look larger than what it stores.
    there = sum(tensor.numel() for tensor in tensors.values())
    if there != (wanted := count_parameters(config)):
        raise _refused(path, f"its model_args tell of {wanted:,} parameters, and it has {there:,}")
    if _stored(tensors) < 2 * there:
        raise _refused(path, "its tensors overlap")
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape) or not torch.equal(
        head, embedding
    ):
        raise UserError(
            f"{path}: the head is not the token embedding, as it has to be here",
            "train it with a nanoGPT of January 14, 2023 or later, which ties them.",
        )
    del head, embedding
    parameters = {}
    for name in list(tensors):
        # Every bfloat16 and float16 is a float32 too.
        parameters[name] = mx.array(tensors.pop(name).float().contiguous().numpy())
    try:
        check_shapes(parameters, flatten_params(GPT(config).parameters()))
    except UserError as error:
        raise _refused(path, "its weights are not those its model_args tell of") from error
    return parameters


def _stored(tensors: dict[str, Any]) -> int:
    """Bytes of all storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def _loss(value: Any) -> float | None:
    """The best_val_loss, a tensor or, of an older nanoGPT, a number."""
    torch = _torch()
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    known = isinstance(value, float) and math.isfinite(value)
    return float(value) if known else None


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is no checkpoint of nanoGPT's: {reason}", REMEDY)
