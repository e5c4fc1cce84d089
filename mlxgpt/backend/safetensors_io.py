"""Read and write safetensors files with MLX; file errors are raised as OSError with an errno."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxgpt.utils import files


class ErrorRecordingFile(io.FileIO):
    """A file that keeps the OSError of a failed read, which MLX replaces by a RuntimeError."""

    error: OSError | None = None

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.error = error
            raise


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Load the arrays of a safetensors file; MLX checks the header against the file's length.

    Raises:
        OSError: if the file cannot be read.
        RuntimeError: if the file is not valid, or memory runs out.
    """
    with (
        files.add_filename_to_errors(path),
        ErrorRecordingFile(path) as raw,
        io.BufferedReader(raw) as file,
    ):
        try:
            arrays = mx.load(cast(Any, file), format="safetensors")
            mx.eval(arrays)  # MLX loads lazily: read before the file is closed
            return cast(dict[str, mx.array], arrays)
        except RuntimeError as error:
            raise raw.error or error from error


def save_arrays(
    path: Path, arrays: dict[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: if the file cannot be written.
    """
    with files.add_filename_to_errors(path), path.open("wb") as file:
        mx.save_safetensors(cast(Any, file), arrays, dict(metadata or {}))
