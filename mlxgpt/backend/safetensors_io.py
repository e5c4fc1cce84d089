"""Reading and writing of safetensors files by MLX; file errors are OSErrors with an errno."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxgpt.utils import files


class ErrorRecordingFile(io.FileIO):
    """A file for MLX that keeps the OSError of a failed read, of which MLX makes a RuntimeError."""

    error: OSError | None = None

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.error = error
            raise


def load_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, by MLX, which compares the header with the file's length.

    Raises:
        OSError: if it cannot be read.
        RuntimeError: if MLX finds no arrays in it, or has no memory for them.
    """
    with (
        files.add_filename_to_errors(path),
        ErrorRecordingFile(path) as raw,
        io.BufferedReader(raw) as file,
    ):
        try:
            arrays = mx.load(cast(Any, file), format="safetensors")
            mx.eval(arrays)  # MLX would read the file only when they are needed
            return cast(dict[str, mx.array], arrays)
        except RuntimeError as error:
            raise raw.error or error from error


def save_arrays(
    path: Path, arrays: dict[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: if it cannot be written.
    """
    with files.add_filename_to_errors(path), path.open("wb") as file:
        mx.save_safetensors(cast(Any, file), arrays, dict(metadata or {}))
