"""Checkpoints: written atomically, read verified.

A checkpoint is a folder step-0005000 with model.safetensors, optimizer.safetensors and
manifest.json (format version, step, hashes, the fingerprints of the model's settings and of the
tokenizer, the spike guard's state). It is written under a scratch name, synced, and renamed, so
that a visible one is whole. Nothing that a stranger writes into one runs code, leads out of it, or
takes more memory than it is long.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgpt.backend import device_errors, memory_limits
from mlxgpt.backend.safetensors_io import load_arrays, save_arrays
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

CHECKPOINT_FORMAT = 2  # 1 had no state of the spike guard
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
MANIFEST_FILE = "manifest.json"


class DamagedCheckpointError(UserError):
    """A checkpoint is missing or damaged; an older one of the run may be whole."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: updates done.
        model: fingerprint of the model's settings; empty in what was written before there was one.
        tokenizer: fingerprint of the tokenizer that the model was trained with.
        metrics: values stored with it, such as the loss; in the manifest its `report`.
        guard: the spike guard's state; empty in format 1.
        parameters: the model's arrays by their dotted names.
        optimizer: the arrays of the optimizer's state; None if it was not loaded.
    """

    step: int
    model: str
    tokenizer: str
    metrics: dict[str, float]
    guard: dict[str, Any]
    parameters: dict[str, mx.array]
    optimizer: dict[str, mx.array] | None


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, check: Callable[[], None] = lambda: None
) -> Path:
    """Write a checkpoint into `folder`, which must exist, and return its path. An old one of that
    step (damaged, or training would have resumed from it) is deleted when the new one is whole.

    Args:
        check: called before the checkpoint gets its name; it may raise.

    Raises:
        UserError: if it cannot be written; nothing is left behind, and nothing is lost.
    """
    final = checkpoint_folder(folder, checkpoint.step)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    except OSError as error:
        raise _write_error(folder, error) from error
    try:
        hashes: dict[str, str] = {}
        for name, arrays in (
            (MODEL_FILE, checkpoint.parameters),
            (OPTIMIZER_FILE, checkpoint.optimizer or {}),
        ):
            save_arrays(scratch / name, arrays)
            hashes[name] = files.sha256_file(scratch / name)
        manifest = files.dump_checksummed(
            {
                "format": CHECKPOINT_FORMAT,
                "step": checkpoint.step,
                "model": checkpoint.model,
                "tokenizer": checkpoint.tokenizer,
                "report": checkpoint.metrics,
                "guard": checkpoint.guard,
                "sha256": hashes,
            }
        )
        (scratch / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
        scratch.chmod(0o755)
        for name in (MODEL_FILE, OPTIMIZER_FILE, MANIFEST_FILE):
            files.fsync_path(scratch / name)
        files.fsync_path(scratch)
        check()
        files.remove_folder(final)
        scratch.rename(final)
        files.fsync_path(folder)
    except (OSError, RuntimeError) as error:
        raise _write_error(final, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


# A file is missing, or a folder is in its place, or the reverse.
MISSING_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def load_checkpoint(path: Path, *, with_optimizer: bool = False) -> Checkpoint:
    """Read a checkpoint and verify its hashes.

    Raises:
        DamagedCheckpointError: if it is missing, or not what was written.
        UserError: if it is of a newer format, holds a link, or MLX cannot read its arrays.
        OSError: if it cannot be read, though it may be whole.
    """
    file_names = (MODEL_FILE, OPTIMIZER_FILE) if with_optimizer else (MODEL_FILE,)
    try:
        files.reject_symlinks(path)
        manifest = files.read_checksummed(path / MANIFEST_FILE, CHECKPOINT_FORMAT)
        if checkpoint_folder(path.parent, manifest["step"]) != path:
            raise ValueError(f"its manifest is for step {manifest['step']}")
        for name in file_names:
            if files.sha256_file(path / name) != manifest["sha256"][name]:
                raise ValueError(f"{name} was modified (checksum mismatch)")
        parameters = load_arrays(path / MODEL_FILE)
        if non_finite := find_non_finite(parameters):
            raise ValueError(f"{non_finite} contains non-finite values (NaN or infinity)")
        return Checkpoint(
            step=int(manifest["step"]),
            model=str(manifest.get("model", "")),
            tokenizer=manifest["tokenizer"],
            metrics=_parse_metrics(manifest["report"]),
            guard=dict(manifest.get("guard", {})),
            parameters=parameters,
            optimizer=load_arrays(path / OPTIMIZER_FILE) if with_optimizer else None,
        )
    except RuntimeError as error:  # MLX raises it for a file that could be read
        if device_errors.classify_device_error(error):
            raise
        raise memory_limits.explain_out_of_memory(error) or _damaged_checkpoint(
            path, error
        ) from error
    except (*MISSING_ERRORS, ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged_checkpoint(path, error) from error


def _damaged_checkpoint(path: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"the checkpoint {path} is missing or damaged: {error}",
        "use another checkpoint of this run: --checkpoint newest, or --checkpoint STEP.",
    )


def find_non_finite(arrays: Mapping[str, mx.array]) -> str | None:
    """The name of the first array with NaN or infinity in it; None if all are finite."""
    return next((name for name, value in arrays.items() if not mx.isfinite(value).all()), None)


STEP_FOLDER = re.compile(r"step-(\d{7,18})", re.ASCII)


def list_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, ascending."""
    if not files.is_folder(folder):
        return []
    return sorted(
        int(match[1])
        for path in folder.iterdir()
        if (match := STEP_FOLDER.fullmatch(path.name)) and files.is_folder(path)
    )


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The path of a step's checkpoint."""
    return folder / f"step-{step:07d}"


def parse_step(path: Path) -> int:
    """The step of the checkpoint at a path."""
    return int(path.name.removeprefix("step-"))


def prune_checkpoints(folder: Path, keep: set[int]) -> None:
    """Delete the checkpoints of all steps but `keep`, and leftovers of interrupted writes."""
    for step in list_steps(folder):
        if step not in keep:
            with contextlib.suppress(OSError):
                files.remove_folder(checkpoint_folder(folder, step))
    for pattern in (".writing-*", f"*{files.TRASH_SUFFIX}"):
        for leftover in files.list_matching(folder, pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _parse_metrics(tree: Any) -> dict[str, float]:
    return {name: float(value) for name, value in dict(tree).items()}


def _write_error(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot write {path}: {reason}", files.find_remedy(error))
