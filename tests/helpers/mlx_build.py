"""What the installed build of MLX allows."""

from __future__ import annotations

import mlx.core as mx
import pytest

PY_TPFLAGS_IMMUTABLETYPE = 1 << 8


def skip_if_arrays_are_immutable() -> None:
    """Skip a test that replaces methods of `mx.array`: MLX for Python 3.15 forbids it."""
    if mx.array.__flags__ & PY_TPFLAGS_IMMUTABLETYPE:
        pytest.skip("methods of mx.array cannot be replaced in this build of MLX")
