"""Whose rows are whose, and what their dropout is drawn with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.backend.cpu import parallel as lanes
from mlxgpt.config import Config, override
from mlxgpt.distributed.group import LocalGroup
from mlxgpt.errors import UserError
from mlxgpt.model.gpt import GPT, flat
from mlxgpt.training.shares import Parts, share
from mlxgpt.training.step import TrainStep

SIZES = st.integers(1, 12)


@given(
    A=SIZES,
    B=SIZES,
    T=st.sampled_from([1, 8, 200, 1024]),
    size=SIZES,
    count=st.sampled_from([1, 2]),
)
def test_every_row_is_in_one_share_with_its_own_part(
    A: int, B: int, T: int, size: int, count: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "count", lambda: count)
        if A * B % size:
            with pytest.raises(UserError, match="shared out evenly"):
                share(A, B, T, 0, size)
            return
        parts = Parts.of(A, B, T)
        # As one machine's step cuts its batch: the rows of all parts, in the parts' order.
        rows = np.arange(A * B).reshape(A, B)
        if parts.count > A:
            cut = rows.reshape(A, parts.lanes, parts.each, parts.rows).swapaxes(0, 1)
            of_parts = cut.reshape(parts.count, parts.rows)
        else:
            of_parts = rows
        seen = []
        for rank in range(size):
            mine = share(A, B, T, rank, size)
            assert len(mine.pieces) * mine.rows == A * B // size
            assert len(mine.pieces) % mine.lanes == 0
            for n, (part, first) in enumerate(mine.pieces):
                start = mine.first + n * mine.rows
                piece = list(range(start, start + mine.rows))
                assert piece == list(of_parts[part][first : first + mine.rows])
                seen += piece
        assert sorted(seen) == list(range(A * B))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("A", "B", "size"), [(1, 12, 2), (1, 12, 4), (2, 6, 3), (3, 5, 3), (1, 8, 8)]
)
def test_the_mean_over_all_shares_is_the_whole_batchs(
    tiny_model: Config, A: int, B: int, size: int, checkpointing: bool
) -> None:
    config = override(tiny_model, {"dropout": 0.5})
    ids = mx.random.randint(0, 19, (A, B, 9), key=mx.random.key(0))
    key = mx.random.key(3)

    def gradients(group: LocalGroup) -> tuple[float, dict[str, np.ndarray]]:
        model = GPT(config.model, 5, gradient_checkpointing=checkpointing)
        step = TrainStep(model, config, group=group)
        loss, tree = step.gradients(ids[..., :-1], ids[..., 1:], key)
        return float(loss), {name: np.array(value) for name, value in flat(tree).items()}

    loss, whole = gradients(LocalGroup())
    shares = [gradients(LocalGroup(rank, size)) for rank in range(size)]
    assert np.mean([one for one, _ in shares]) == pytest.approx(loss, rel=1e-5)
    for name, value in whole.items():
        mean = np.mean([tree[name] for _, tree in shares], axis=0)
        np.testing.assert_allclose(mean, value, rtol=1e-3, atol=1e-6, err_msg=name)
