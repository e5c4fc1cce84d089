"""Several ranks end as one does, whatever happens to them during training."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import TINY
from tests.helpers.rank_processes import Ranked, trained
from tests.helpers.training_runs import final_state, len_done, metrics

STEPS = 16
CONFIG = {
    **TINY,
    "train": {**TINY["train"], "max_steps": STEPS, "batch_size": 24, "log_interval": 1},
}
# Each rank has dropout of its own, so without it they are compared with one.
NO_DROPOUT = {**CONFIG, "model": {**CONFIG["model"], "dropout": 0.0}}
PLAN: dict[str, Any] = {"config": CONFIG}


def with_settings(**settings: Any) -> dict[str, Any]:
    return {"config": {**CONFIG, "train": {**CONFIG["train"], **settings}}}


def state(run: str = "a") -> dict[str, np.ndarray]:
    return final_state(run)


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((value == b[name]).all() for name, value in a.items())


@pytest.fixture
def alone(home: Path, text_file: Path) -> dict[str, np.ndarray]:
    """What one rank ends with, without dropout; its run is gone."""
    trained({"config": NO_DROPOUT}, 1)
    found = state()
    shutil.rmtree("runs")
    return found


def test_two_and_four_ranks_end_within_rounding_of_one(alone: dict[str, np.ndarray]) -> None:
    for size in (2, 4):
        trained({"config": NO_DROPOUT}, size)
        together = state()
        assert not same(alone, together), "rounding differs, or nothing was averaged"
        for name, value in alone.items():
            np.testing.assert_allclose(together[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
        assert [line["step"] for line in metrics("a")] == list(range(1, STEPS + 1))
        (line,) = Path("runs/a/history.jsonl").read_text().splitlines()
        assert json.loads(line)["on"]["ranks"] == str(size)
        shutil.rmtree("runs")


def test_gradients_in_16_bits_end_near_those_in_32(home: Path, text_file: Path) -> None:
    """With a larger eps, since AdamW divides a gradient near 0, and its rounding, by its size."""
    ends = []
    for reduce_dtype in ("bfloat16", "float32"):
        optim = {**CONFIG["optim"], "eps": 1e-3}
        train = {**CONFIG["train"], "reduce_dtype": reduce_dtype}
        trained({"config": {**NO_DROPOUT, "optim": optim, "train": train}}, 2)
        ends.append(state())
        shutil.rmtree("runs")
    assert not same(*ends)
    for name, value in ends[1].items():
        np.testing.assert_allclose(ends[0][name], value, rtol=2e-2, atol=5e-3, err_msg=name)


@pytest.mark.exact_bits
def test_killed_at_random_they_end_as_if_nobody_had_been(home: Path, text_file: Path) -> None:
    torture(2, 3, random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.exact_bits
def test_fifty_kills_over_four_ranks(home: Path, text_file: Path) -> None:
    torture(50, 4, random.randrange(1 << 30), steps=60)


def test_a_rank_that_is_stopped_ends_all(home: Path, text_file: Path) -> None:
    """As one whose machine has left the network: it says nothing, and its connections stay."""
    with Ranked(
        [with_settings(max_steps=100_000, eval_interval=1000, save_interval=1000)] * 3
    ) as ranks:
        until(lambda: noted() > 3)
        began = time.monotonic()
        ranks.processes[1].send_signal(signal.SIGSTOP)
        until(lambda: all(ranks.processes[rank].poll() is not None for rank in (0, 2)))
        assert time.monotonic() - began < 60
        ranks.processes[1].kill()
        ended = ranks.end()
    assert ended.codes == [1, -signal.SIGKILL, 1]
    assert "mlxgpt: lost rank 1 of 3 (on" in ended.errors[0]
    assert "no heartbeat for" in ended.errors[0]
    assert (
        "→ the same command resumes: mlx.launch -n 3 -- python -m tests.helpers.crash"
        in (ended.errors[0])
    )


@pytest.mark.exact_bits
def test_asked_to_stop_they_stop_at_one_step_and_go_on(home: Path, text_file: Path) -> None:
    plan = with_settings(max_steps=200, eval_interval=100, save_interval=100)
    trained(plan, 2)
    whole, lines = state(), metrics("a")
    shutil.rmtree("runs")
    with Ranked([plan] * 2) as ranks:
        until(lambda: noted() > 3)
        ranks.processes[1].send_signal(signal.SIGINT)  # one is enough
        assert ranks.end().codes == [0, 0]
    assert 0 < len_done("a") < 200
    trained(plan, 2)
    assert_the_same(whole, lines)


def test_resumed_by_another_number_it_says_so(home: Path, text_file: Path) -> None:
    half = with_settings(max_steps=8)
    longer = {"config": {**CONFIG, "optim": {**CONFIG["optim"], "decay_steps": 16}}}
    half = {"config": {**longer["config"], "train": half["config"]["train"]}}
    trained(half, 4)
    with Ranked([longer] * 2) as ranks:
        ended = ranks.end()
    assert ended.codes == [0, 0]
    assert (
        "changed since: max_steps 8 → 16, ranks 4 → 2; the rest will differ by rounding"
        in (ended.errors[0])
    )
    assert ended.errors[1] == "", "only the first rank shows anything"
    (_, line) = Path("runs/a/history.jsonl").read_text().splitlines()
    assert json.loads(line)["on"]["ranks"] == "2"


def test_a_spike_takes_all_back_as_one(home: Path, text_file: Path) -> None:
    ends = []
    for size in (1, 3):
        config = {**NO_DROPOUT, "train": {**CONFIG["train"], "on_spike": "rollback"}}
        trained({"config": config, "spike": 9}, size)
        lines = [json.loads(line) for line in Path("runs/a/history.jsonl").read_text().splitlines()]
        assert [line.get("spiked") for line in lines] == [None, 10]
        assert [line["step"] for line in metrics("a")] == list(range(1, STEPS + 1))
        ends.append(state())
        shutil.rmtree("runs")
    for name, value in ends[0].items():
        np.testing.assert_allclose(ends[1][name], value, rtol=1e-3, atol=2e-4, err_msg=name)


def test_one_that_cannot_go_on_ends_all_with_its_reason(home: Path, text_file: Path) -> None:
    little = {**PLAN, "memory_limit": 1e-6}
    with Ranked([PLAN, little]) as ranks:
        ended = ranks.end()
    assert 0 not in ended.codes
    assert "mlxgpt: rank 1 of 2 (on" in ended.errors[0]
    assert "this training takes" in ended.errors[0]
    assert not Path("runs/a").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_where_a_gpu_fails_all_end_saved(home: Path, text_file: Path, rank: int) -> None:
    plans: list[dict[str, Any]] = [PLAN, PLAN]
    plans[rank] = {**PLAN, "gpu_failure": 9}
    with Ranked(plans) as ranks:
        ended = ranks.end()
    assert 0 not in ended.codes
    assert "the GPU failed: Impacting Interactivity; stopped" in ended.errors[0]
    assert "trying again" not in "".join(ended.errors)
    assert len_done("a") > 0


def test_other_settings_and_data_are_named_before_the_first_step(
    home: Path, text_file: Path
) -> None:
    with Ranked([PLAN, with_settings(seed=8), PLAN]) as ranks:
        ended = ranks.end()
    assert 0 not in ended.codes
    assert "rank 1 (on" in ended.errors[0]
    assert "has seed 8 instead of 7" in ended.errors[0]
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def until(holds: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def torture(kills: int, size: int, seed: int, steps: int = 30) -> None:
    """Kill one rank of some at a random moment, again and again; print what came of it."""
    print(f"seed {seed}\n\n| kill | rank | steps done | all ended after |\n|---|---|---|---|")
    draw = random.Random(seed)
    plan = with_settings(max_steps=steps)
    began = time.monotonic()
    trained(plan, size)
    seconds = time.monotonic() - began
    whole, lines = state(), metrics("a")
    shutil.rmtree("runs")
    killed = finished = 0
    while killed < kills:
        victim, lives = draw.randrange(size), begun()
        with Ranked([plan] * size) as ranks:
            if draw.random() < 0.8:  # else perhaps before they have met
                until(partial(begun_since, lives, ranks))
            time.sleep(draw.uniform(0, 0.5) * seconds)
            step = noted() if begun() > lives else None
            if ranks.processes[victim].poll() is not None:  # it was too late
                assert ranks.end().codes == [0] * size
                assert_the_same(whole, lines)
                finished += 1
                shutil.rmtree("runs")
                continue
            began = time.monotonic()
            ranks.processes[victim].kill()
            if step is None:  # they have perhaps not met yet: then mlx.launch ends them
                time.sleep(1)
                for process in ranks.processes:
                    process.terminate()
            ended = ranks.end(120)
            took = time.monotonic() - began
        killed += 1
        print(
            f"| {killed} | {victim} | {'–' if step is None else step} | {took:.2f} s |", flush=True
        )
        others = [code for rank, code in enumerate(ended.codes) if rank != victim]
        if step is not None and any(others):  # else it was killed when all was done
            assert took < 60
            assert set(others) == {1}
            said = "".join(ended.errors)
            assert f"mlxgpt: lost rank {victim} of {size}" in said, said
    trained(plan, size)
    assert_the_same(whole, lines)
    print(f"\n{killed} kills, {finished + 1} runs ended with the bits of the one left alone")


def noted() -> int:
    """Steps that are logged."""
    return len(metrics("a")) if Path("runs/a/metrics.jsonl").exists() else 0


def begun() -> int:
    """How often the training was begun, or went on."""
    history = Path("runs/a/history.jsonl")
    return len(history.read_text().splitlines()) if history.exists() else 0


def begun_since(lives: int, ranks: Ranked) -> bool:
    return begun() > lives or ranks.processes[0].poll() is not None


def assert_the_same(whole: Mapping[str, np.ndarray], lines: list[dict[str, Any]]) -> None:
    assert same(whole, state())
    assert metrics("a") == lines
