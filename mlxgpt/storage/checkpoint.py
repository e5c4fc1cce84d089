"""Save and load checkpoints: written atomically, verified when loaded.

A checkpoint is a folder step-0005000 with model.safetensors, optimizer.safetensors and
manifest.json (format version, step, hashes, fingerprints of the model settings and the tokenizer,
spike guard state). It is written under a temporary name, synced, and renamed, so it is always
complete. Loading an untrusted one runs no code, follows no links, and takes no more memory than the
size of its files.
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
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

CHECKPOINT_FORMAT = 2  # format 1 had no spike guard state
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
MANIFEST_FILE = "manifest.json"


class DamagedCheckpointError(UserError):
    """A checkpoint is missing or damaged; an older one of the run may be undamaged."""


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint.

    Attributes:
        step: optimizer steps done.
        model: fingerprint of the model settings; empty in older checkpoints without it.
        tokenizer: fingerprint of the tokenizer that the model was trained with.
        metrics: metrics at this step, such as the loss; `report` in the manifest.
        guard: state of the spike guard; empty in format 1.
        parameters: arrays of the model by their dotted names.
        optimizer: arrays of the optimizer state; None if it was not loaded.
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
    """Save a checkpoint in `folder`, which must exist, and return its path. An old checkpoint of
    that step (damaged, or training would have resumed from it) is replaced.

    Args:
        check: called before the checkpoint is renamed to its final name; may raise.

    Raises:
        UserError: if it cannot be written; no partial files remain.
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
        manifest = json_files.dump_checksummed(
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


# Missing, or a folder in place of a file, or the reverse.
MISSING_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def load_checkpoint(path: Path, *, with_optimizer: bool = False) -> Checkpoint:
    """Load a checkpoint and verify its hashes.

    Raises:
        DamagedCheckpointError: if it is missing or damaged.
        UserError: if it is in a newer format, contains a link, or memory runs out.
        OSError: if it cannot be read, though it may be undamaged.
    """
    file_names = (MODEL_FILE, OPTIMIZER_FILE) if with_optimizer else (MODEL_FILE,)
    try:
        files.reject_symlinks(path)
        manifest = json_files.read_checksummed(path / MANIFEST_FILE, CHECKPOINT_FORMAT)
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
    except RuntimeError as error:  # from MLX, such as running out of memory
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
    """Name of the first array that contains NaN or infinity; None if all are finite."""
    return next((name for name, value in arrays.items() if not mx.isfinite(value).all()), None)


STEP_FOLDER = re.compile(r"step-(\d{7,18})", re.ASCII)


def list_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending."""
    if not files.is_folder(folder):
        return []
    return sorted(
        int(match[1])
        for path in folder.iterdir()
        if (match := STEP_FOLDER.fullmatch(path.name)) and files.is_folder(path)
    )


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return folder / f"step-{step:07d}"


def parse_step(path: Path) -> int:
    """Step of the checkpoint at a path."""
    return int(path.name.removeprefix("step-"))


def prune_checkpoints(folder: Path, keep: set[int]) -> None:
    """Delete all checkpoints except those of steps in `keep`, and remains of interrupted writes."""
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
