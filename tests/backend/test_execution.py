from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.backend import execution
from mlxgpt.backend.cpu import parallel


@pytest.mark.parametrize("threads", [1, 2])
@given(A=st.integers(1, 4), B=st.integers(1, 12), T=st.integers(1, 6), portion=st.integers(2, 30))
def test_shards_are_the_whole_batch(threads: int, A: int, B: int, T: int, portion: int) -> None:
    """Every row is in one of them, in parts of one size, each part with a key of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "PORTION", portion)
        patch.setattr(parallel, "count", lambda: threads)
        patch.setattr(execution, "thread_count", lambda: threads)
        rows = np.arange(A * B)
        ids = mx.array(np.broadcast_to(rows.reshape(A, B, 1), (A, B, T)))
        shards = execution.shard(ids, -ids, mx.random.key(1))
        assert len(shards) <= threads
        assert len({inputs.shape for inputs, _, _ in shards}) == 1
        parts = [part for shard in shards for part in zip(*shard, strict=True)]
        found = [int(row) for inputs, _, _ in parts for row in inputs[:, 0].tolist()]
        assert sorted(found) == rows.tolist()
        assert all((inputs == -targets).all() for inputs, targets, _ in parts)
        keys = {str(key.tolist()) for _, _, key in parts}
        assert len(keys) == len(parts)
        if threads == 1:
            assert len(parts) == A, "a GPU takes whole micro-batches"
