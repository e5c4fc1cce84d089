"""Import of nanoGPT checkpoints (ckpt.pt, as its train.py saves them).

Linear layers are [out, in] as in mlxgpt, so only names differ. PyTorch reads the file with
`weights_only`, which runs no code in it.

Since June 2023 nanoGPT uses exact GELU; mlxgpt, GPT-2 and older versions of nanoGPT use the tanh
approximation, which differs by less than 5e-4. The file does not record which one it was.
"""

from __future__ import annotations

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
from mlxgpt.convert.huggingface import LM_HEAD, strip_prefixes
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import check_shapes, flatten_params
from mlxgpt.model.stats import count_parameters
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

CHECKPOINT_REMEDY = "use a ckpt.pt written by nanoGPT's train.py; if it is one, copy it again."


@dataclass(frozen=True)
class NanoGPTCheckpoint:
    """A model trained by nanoGPT.

    Attributes:
        config: model config. vocab_size may exceed the tokenizer's: nanoGPT pads GPT-2's 50,257
            tokens to 50,304.
        parameters: float32, by mlxgpt's names.
        step: training steps done.
        dataset: folder in nanoGPT's data/ that it was trained on; None if unknown.
    """

    config: ModelConfig
    parameters: dict[str, mx.array]
    step: int
    dataset: str | None


def read_nanogpt_checkpoint(path: Path) -> NanoGPTCheckpoint:
    """Read a nanoGPT checkpoint. Peak memory is the size of the file plus the float32 weights.

    Args:
        path: ckpt.pt from nanoGPT of January 2023 or later (tied output head), compiled or not, in
            float32, float16 or bfloat16.

    Raises:
        UserError: if PyTorch is not installed, the file is not such a checkpoint or could run code,
            or the weights do not match its `model_args`.
    """
    checkpoint = _load_torch_file(path)
    for name in ("model", "model_args", "iter_num"):
        if name not in checkpoint:
            raise _invalid_checkpoint(path, f"it has no {name!r}")
    config = _parse_config(path, checkpoint["model_args"])
    tensors = _select_tensors(path, checkpoint["model"])
    settings = checkpoint.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    step = checkpoint["iter_num"]
    if type(step) is not int or step < 0:
        raise _invalid_checkpoint(path, "its iter_num is not a valid step")
    del checkpoint  # frees the optimizer state, twice the size of the model
    parameters = _convert_parameters(path, tensors, config)
    return NanoGPTCheckpoint(config, parameters, step, dataset if type(dataset) is str else None)


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "importing a nanoGPT checkpoint needs PyTorch, which is not installed",
            "install it: pip install 'torch>=2.6,<3' (on Linux without a GPU: the CPU build)",
        ) from error
    return torch


def _read_or_raise_os_error(path: Path, read: Callable[[], Any]) -> Any:
    """Call `read`, which loads `path` with PyTorch. PyTorch hides I/O errors, so after a failure
    the file is read here to raise the OSError; if that works, `read` is called again.

    Raises:
        OSError: if the file cannot be read.
        Exception: whatever `read` raises for a readable file.
    """
    try:
        return read()
    except Exception:
        files.sha256_file(path)
    return read()


def _load_torch_file(path: Path) -> dict[Any, Any]:
    """Load a file written by torch.save, restricted to plain values and tensors."""
    torch = _import_torch()

    def read() -> Any:
        # A compressed file (zip bomb) could expand a thousandfold in memory.
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _invalid_checkpoint(path, "it is compressed")
        return torch.load(path, map_location="cpu", weights_only=True)

    try:
        checkpoint = _read_or_raise_os_error(path, read)
    except UserError:
        raise
    except OSError as error:
        raise files.to_user_error(error, "read", path, CHECKPOINT_REMEDY) from error
    except zipfile.BadZipFile as error:
        raise _invalid_checkpoint(path, "it is not a PyTorch file, or is truncated") from error
    except Exception as error:  # PyTorch raises many types of errors for damaged files
        if "Weights only load failed" in str(error):
            raise UserError(
                f"{path} contains more than weights and plain settings, and could run code",
                "save it again with nanoGPT's train.py, whose checkpoints are safe.",
            ) from error
        raise _invalid_checkpoint(
            path, f"PyTorch cannot read it ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise _invalid_checkpoint(path, "it is not a dictionary")
    return checkpoint


REQUIRED_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
DEFAULT_MODEL_ARGS = {"bias": True, "dropout": 0.0}  # nanoGPT's defaults, missing in old files


def _parse_config(path: Path, model_args: Any) -> ModelConfig:
    """Convert nanoGPT's `model_args` to a model config."""
    if not isinstance(model_args, dict):
        raise _invalid_checkpoint(path, "its model_args are invalid")
    if missing := [name for name in REQUIRED_MODEL_ARGS if name not in model_args]:
        raise _invalid_checkpoint(path, f"its model_args lack {', '.join(missing)}")
    shape = {name: model_args[name] for name in REQUIRED_MODEL_ARGS}
    shape |= {name: model_args.get(name, default) for name, default in DEFAULT_MODEL_ARGS.items()}
    try:
        config = configs.config_from_tree({"model": shape}).model
    except UserError as error:
        raise _invalid_checkpoint(path, error.problem) from error
    if not config.vocab_size:
        raise _invalid_checkpoint(path, "its vocab_size is 0")
    return config


MASK_BUFFER = re.compile(r"h\.\d+\.attn\.bias")  # causal mask, saved without flash attention


def _select_tensors(path: Path, state_dict: Any) -> dict[str, Any]:
    """The tensors of a state dict by mlxgpt's names, without causal masks."""
    torch = _import_torch()
    if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
        raise _invalid_checkpoint(path, "its model is not a dictionary of tensors")
    tensors: dict[str, Any] = {}
    for full_name, tensor in state_dict.items():
        name = strip_prefixes(full_name)
        if MASK_BUFFER.fullmatch(name):
            continue
        is_plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if not is_plain or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
            raise _invalid_checkpoint(path, f"its {full_name!r} is not a plain tensor")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise _invalid_checkpoint(path, f"its {full_name!r} has dtype {tensor.dtype}")
        if name in tensors:
            raise _invalid_checkpoint(path, f"it has {name!r} twice")
        tensors[name] = tensor.detach()
    return tensors


def _convert_parameters(
    path: Path, tensors: dict[str, Any], config: ModelConfig
) -> dict[str, mx.array]:
    """Convert PyTorch tensors to float32 MLX arrays, one at a time; empties `tensors`."""
    torch = _import_torch()
    head, embedding = tensors.pop(LM_HEAD, None), tensors.get("wte.weight")
    if head is None or embedding is None:
        raise _invalid_checkpoint(path, "its model has no token embedding or no output head")
    # Checked before allocating: a tensor's shape can be larger than its storage.
    n_stored = sum(tensor.numel() for tensor in tensors.values())
    if n_stored != (n_expected := count_parameters(config)):
        raise _invalid_checkpoint(
            path, f"its model_args describe {n_expected:,} parameters, but it has {n_stored:,}"
        )
    if _storage_bytes(tensors) < 2 * n_stored:
        raise _invalid_checkpoint(path, "its tensors overlap")
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape) or not torch.equal(
        head, embedding
    ):
        raise UserError(
            f"{path}: the output head is not tied to the token embedding",
            "train it with nanoGPT from January 14, 2023 or later, which ties them.",
        )
    del head, embedding
    parameters = {}
    for name in list(tensors):
        # Converting bfloat16 and float16 to float32 is lossless.
        parameters[name] = mx.array(tensors.pop(name).float().contiguous().numpy())
    try:
        check_shapes(parameters, flatten_params(GPT(config).parameters()))
    except UserError as error:
        raise _invalid_checkpoint(path, "its weights do not match its model_args") from error
    return parameters


def _storage_bytes(tensors: dict[str, Any]) -> int:
    """Total bytes of the tensors' storages, counting shared ones once."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _invalid_checkpoint(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a nanoGPT checkpoint: {reason}", CHECKPOINT_REMEDY)
