"""Contract of every process group, local or distributed: one function per guarantee. `python -m
tests.helpers.group_contract`, run by each rank, writes the failures to `rank-N.json`.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.distributed.agreement import check_same_arrays, check_same_values, hash_arrays
from mlxgpt.distributed.group import (
    LocalGroup,
    ProcessGroup,
    init_process_group,
    measure_all_reduce_seconds,
    run_main_first,
)
from mlxgpt.utils.errors import UserError


def is_last_rank(group: ProcessGroup) -> bool:
    return group.rank == group.size - 1


def raises_if_distributed(group: ProcessGroup, match: str) -> AbstractContextManager:
    return pytest.raises(UserError, match=match) if group.size > 1 else nullcontext()


def ranks_are_numbered(group: ProcessGroup) -> None:
    assert group.gather("ranks", group.rank) == list(range(group.size))
    assert group.is_main is (group.rank == 0)
    assert len(group.hosts) == group.size
    assert group.describe_rank(0) == f"rank 0 (on {group.hosts[0]})"


def average_gives_the_means(group: ProcessGroup) -> None:
    weights = {"wte": mx.arange(6).reshape(2, 3) * 2, "bias": mx.array(8.0)}
    gradients = {
        name: (group.rank + 1) * weight_value.astype(mx.float32)
        for name, weight_value in weights.items()
    }
    mean = (group.size + 1) / 2
    for dtype in (mx.float32, mx.bfloat16):
        loss, means = group.average(mx.array(1.0 + group.rank), gradients, dtype)
        assert float(loss) == mean
        assert list(means) == ["wte", "bias"]
        for name, weight in weights.items():
            assert means[name].dtype == mx.float32
            assert means[name].shape == weight.shape
            assert means[name].tolist() == (mean * weight).tolist()


def average_has_the_same_bits_everywhere(group: ProcessGroup) -> None:
    for dtype in (mx.float32, mx.bfloat16):
        local_gradient = mx.random.normal((1000,), key=mx.random.key(group.rank)).astype(dtype)
        loss, means = group.average(
            mx.array(0.1 * group.rank), {"a": local_gradient.astype(mx.float32)}, dtype
        )
        assert len({*group.gather("hashes", hash_arrays(means, {"loss": loss}))}) == 1


def nonfinite_gradients_reach_all_ranks(group: ProcessGroup) -> None:
    value = math.nan if is_last_rank(group) else 1.0
    loss, means = group.average(mx.array(value), {"a": mx.array([value, 1.0])}, mx.float32)
    assert math.isnan(float(loss))
    assert math.isnan(float(means["a"][0]))
    assert float(means["a"][1]) == 1


def stop_request_stops_all_ranks(group: ProcessGroup) -> None:
    def stops_after_step(stop_requested: bool) -> bool:
        group.should_stop(stop_requested)
        group.average(mx.array(0.0), {"a": mx.zeros(1)}, mx.float32)
        return group.should_stop(stop_requested)

    assert not stops_after_step(False)
    assert stops_after_step(is_last_rank(group))
    assert not stops_after_step(False)


def sum_keeps_shape_and_dtype(group: ProcessGroup) -> None:
    for dtype in (mx.float32, mx.uint32):
        total = group.sum("ones", (group.rank + 1) * mx.ones((2, 3), dtype))
        assert total.dtype == dtype
        assert total.tolist() == [[group.size * (group.size + 1) / 2] * 3] * 2


def gather_keeps_the_order_of_ranks(group: ProcessGroup) -> None:
    value = {"n": (group.rank, None, True), 7: "ü", "x": 0.1 + group.rank}
    expected = [{"n": [n, None, True], "7": "ü", "x": 0.1 + n} for n in range(group.size)]
    assert group.gather("values", value) == expected


def broadcast_gives_the_main_ranks_value(group: ProcessGroup) -> None:
    assert group.broadcast("value", {"n": (group.rank,)} if group.is_main else None) == {"n": [0]}
    assert group.broadcast("nothing") is None


def broadcast_arrays_keeps_every_bit(group: ProcessGroup) -> None:
    main_arrays: dict[str, np.ndarray] = {
        "w": np.array([[-0.0, math.inf, math.nan], [1e-45, 3e38, -1.5]], np.float32),
        "step": np.array(2**40 + 3, np.uint64),
    }
    local_arrays = {
        name: mx.array(array if group.is_main else np.ones_like(array))
        for name, array in main_arrays.items()
    }
    received = group.broadcast_arrays("state", local_arrays)
    assert list(received) == ["w", "step"]
    for name, expected in main_arrays.items():
        assert np.array(received[name]).dtype == expected.dtype
        assert received[name].shape == expected.shape
        assert np.array(received[name]).tobytes() == expected.tobytes()


def barrier_waits_for_all(group: ProcessGroup) -> None:
    Path(f"arrived-{group.rank}").touch()
    group.barrier("arrived")
    assert all(Path(f"arrived-{rank}").exists() for rank in range(group.size))


def watchdog_runs_its_body_and_propagates_errors(group: ProcessGroup) -> None:
    with group.watchdog(0.01):
        assert group.sum("watched", mx.ones(1)).item() == group.size
    with pytest.raises(ZeroDivisionError), group.watchdog(0.01):
        raise ZeroDivisionError


def error_is_raised_on_all_ranks(group: ProcessGroup) -> None:
    group.raise_on_all_ranks(None)
    error = UserError("no memory", "buy some.") if is_last_rank(group) else None
    with pytest.raises(UserError, match="no memory") as excinfo:
        group.raise_on_all_ranks(error)
    assert excinfo.value.remedy == "buy some."
    if error:
        assert excinfo.value is error
    else:
        assert excinfo.value.problem == f"{group.describe_rank(group.size - 1)}: no memory"


def local_group_does_not_communicate(group: ProcessGroup) -> None:
    local_group = group.local_group()
    assert isinstance(local_group, LocalGroup)
    assert (local_group.rank, local_group.size, local_group.is_main) == (
        group.rank,
        group.size,
        group.is_main,
    )
    if group.is_main:  # a collective would block, since the other ranks do not call it
        assert local_group.sum("alone", mx.ones(1)).item() == 1
        assert local_group.gather("alone", 3) == [3]


def main_rank_runs_first(group: ProcessGroup) -> None:
    def append() -> int:
        if group.is_main:
            time.sleep(0.3)  # give the other ranks time to run first
        with Path("turns").open("a") as file:
            file.write(f"{group.rank}\n")
        return group.rank

    assert run_main_first(group, append) == group.rank
    group.barrier("all had their turn")
    turns = Path("turns").read_text().split()
    assert turns[0] == "0"
    assert sorted(turns) == [str(rank) for rank in range(group.size)]


def all_ranks_measure_the_same_all_reduce_time(group: ProcessGroup) -> None:
    seconds = measure_all_reduce_seconds(group, 1000, mx.bfloat16)
    assert group.gather("seconds", seconds) == [seconds] * group.size
    assert (seconds > 0) is (group.size > 1)


def different_settings_are_refused_by_all_ranks(group: ProcessGroup) -> None:
    check_same_values(group, "settings", {"seed": 7, "betas": (0.9, 0.95)})
    with raises_if_distributed(group, "has seed 8 instead of 7"):
        check_same_values(
            group, "settings", {"seed": 8 if is_last_rank(group) and group.rank else 7}
        )


def different_weights_are_refused_by_all_ranks(group: ProcessGroup) -> None:
    check_same_arrays(group, 5, {"w": mx.ones(3)})
    problem = "after step 5, the weights on rank 1 .* differ from those on rank 0"
    with raises_if_distributed(group, problem):
        check_same_arrays(group, 5, {"w": mx.array([1.0, float(group.rank), 1.0])})


CONTRACT: list[Callable[[ProcessGroup], None]] = [
    ranks_are_numbered,
    average_gives_the_means,
    average_has_the_same_bits_everywhere,
    nonfinite_gradients_reach_all_ranks,
    stop_request_stops_all_ranks,
    sum_keeps_shape_and_dtype,
    gather_keeps_the_order_of_ranks,
    broadcast_gives_the_main_ranks_value,
    broadcast_arrays_keeps_every_bit,
    barrier_waits_for_all,
    watchdog_runs_its_body_and_propagates_errors,
    error_is_raised_on_all_ranks,
    local_group_does_not_communicate,
    main_rank_runs_first,
    all_ranks_measure_the_same_all_reduce_time,
    different_settings_are_refused_by_all_ranks,
    different_weights_are_refused_by_all_ranks,
]


def main() -> None:
    outcomes = {}
    with init_process_group() as group:
        for promise in CONTRACT:
            try:
                promise(group)
                outcomes[promise.__name__] = "kept"
            except Exception:
                outcomes[promise.__name__] = traceback.format_exc()
            Path(f"rank-{group.rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
