"""Training on several ranks gives the same result as on one, also after failures."""

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
from tests.helpers.rank_processes import RankProcesses, train_on_ranks
from tests.helpers.training_runs import final_state, last_saved_step, metrics

STEPS = 16
CONFIG = {
    **TINY,
    "train": {**TINY["train"], "max_steps": STEPS, "batch_size": 24, "log_interval": 1},
}
# Each rank has a different dropout mask, so comparisons with one rank need runs without dropout.
NO_DROPOUT = {**CONFIG, "model": {**CONFIG["model"], "dropout": 0.0}}
PLAN: dict[str, Any] = {"config": CONFIG}


def make_plan(**settings: Any) -> dict[str, Any]:
    return {"config": {**CONFIG, "train": {**CONFIG["train"], **settings}}}


def final_run_state(run: str = "a") -> dict[str, np.ndarray]:
    return final_state(run)


def have_same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((value == b[name]).all() for name, value in a.items())


@pytest.fixture
def single_rank_state(home: Path, text_file: Path) -> dict[str, np.ndarray]:
    """Final state of a run on one rank without dropout; the run is deleted."""
    train_on_ranks({"config": NO_DROPOUT}, 1)
    final = final_run_state()
    shutil.rmtree("runs")
    return final


def test_two_and_four_ranks_match_one_within_rounding(
    single_rank_state: dict[str, np.ndarray],
) -> None:
    for size in (2, 4):
        train_on_ranks({"config": NO_DROPOUT}, size)
        multi_rank_state = final_run_state()
        assert not have_same_bits(single_rank_state, multi_rank_state), (
            "rounding differs, or nothing was averaged"
        )
        for name, value in single_rank_state.items():
            np.testing.assert_allclose(
                multi_rank_state[name], value, rtol=1e-3, atol=2e-4, err_msg=name
            )
        assert [line["step"] for line in metrics("a")] == list(range(1, STEPS + 1))
        (line,) = Path("runs/a/history.jsonl").read_text().splitlines()
        assert json.loads(line)["on"]["ranks"] == str(size)
        shutil.rmtree("runs")


def test_bfloat16_gradients_end_near_float32_gradients(home: Path, text_file: Path) -> None:
    """With a larger eps, as AdamW amplifies the rounding of gradients near 0."""
    final_states = []
    for reduce_dtype in ("bfloat16", "float32"):
        optim = {**CONFIG["optim"], "eps": 1e-3}
        train = {**CONFIG["train"], "reduce_dtype": reduce_dtype}
        train_on_ranks({"config": {**NO_DROPOUT, "optim": optim, "train": train}}, 2)
        final_states.append(final_run_state())
        shutil.rmtree("runs")
    assert not have_same_bits(*final_states)
    for name, value in final_states[1].items():
        np.testing.assert_allclose(final_states[0][name], value, rtol=2e-2, atol=5e-3, err_msg=name)


@pytest.mark.exact_bits
def test_resume_after_random_kills_is_bit_exact(home: Path, text_file: Path) -> None:
    kill_random_ranks(2, 3, random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.exact_bits
def test_resume_after_50_kills_of_four_ranks_is_bit_exact(home: Path, text_file: Path) -> None:
    kill_random_ranks(50, 4, random.randrange(1 << 30), steps=60)


def test_a_hanging_rank_ends_all_ranks(home: Path, text_file: Path) -> None:
    """As after a network failure: no messages, but the connections stay open."""
    with RankProcesses(
        [make_plan(max_steps=100_000, eval_interval=1000, save_interval=1000)] * 3
    ) as ranks:
        wait_until(lambda: count_logged_steps() > 3)
        start_time = time.monotonic()
        ranks.processes[1].send_signal(signal.SIGSTOP)
        wait_until(lambda: all(ranks.processes[rank].poll() is not None for rank in (0, 2)))
        assert time.monotonic() - start_time < 60
        ranks.processes[1].kill()
        results = ranks.wait()
    assert results.codes == [1, -signal.SIGKILL, 1]
    assert "mlxgpt: lost rank 1 of 3 (on" in results.errors[0]
    assert "no heartbeat for" in results.errors[0]
    assert (
        "→ the same command resumes: mlx.launch -n 3 -- python -m tests.helpers.crash"
        in (results.errors[0])
    )


@pytest.mark.exact_bits
def test_a_signal_stops_all_ranks_at_the_same_step(home: Path, text_file: Path) -> None:
    plan = make_plan(max_steps=200, eval_interval=100, save_interval=100)
    train_on_ranks(plan, 2)
    expected_state, expected_metrics = final_run_state(), metrics("a")
    shutil.rmtree("runs")
    with RankProcesses([plan] * 2) as ranks:
        wait_until(lambda: count_logged_steps() > 3)
        ranks.processes[1].send_signal(signal.SIGINT)  # one rank is enough
        assert ranks.wait().codes == [0, 0]
    assert 0 < last_saved_step("a") < 200
    train_on_ranks(plan, 2)
    assert_same_run(expected_state, expected_metrics)


def test_resuming_with_a_different_number_of_ranks_is_reported(home: Path, text_file: Path) -> None:
    half_plan = make_plan(max_steps=8)
    full_plan = {"config": {**CONFIG, "optim": {**CONFIG["optim"], "decay_steps": 16}}}
    half_plan = {"config": {**full_plan["config"], "train": half_plan["config"]["train"]}}
    train_on_ranks(half_plan, 4)
    with RankProcesses([full_plan] * 2) as ranks:
        results = ranks.wait()
    assert results.codes == [0, 0]
    assert (
        "changed since a was last trained: max_steps 8 → 16, ranks 4 → 2; results may differ"
        in (results.errors[0])
    )
    assert results.errors[1] == "", "only the first rank shows anything"
    (_, line) = Path("runs/a/history.jsonl").read_text().splitlines()
    assert json.loads(line)["on"]["ranks"] == "2"


def test_a_spike_rolls_back_all_ranks(home: Path, text_file: Path) -> None:
    final_states = []
    for size in (1, 3):
        config = {**NO_DROPOUT, "train": {**CONFIG["train"], "on_spike": "rollback"}}
        train_on_ranks({"config": config, "spike": 9}, size)
        lines = [json.loads(line) for line in Path("runs/a/history.jsonl").read_text().splitlines()]
        assert [line.get("spiked") for line in lines] == [None, 10]
        assert [line["step"] for line in metrics("a")] == list(range(1, STEPS + 1))
        final_states.append(final_run_state())
        shutil.rmtree("runs")
    for name, value in final_states[0].items():
        np.testing.assert_allclose(final_states[1][name], value, rtol=1e-3, atol=2e-4, err_msg=name)


def test_an_error_on_one_rank_ends_all_with_its_message(home: Path, text_file: Path) -> None:
    low_memory_plan = {**PLAN, "memory_limit": 1e-6}
    with RankProcesses([PLAN, low_memory_plan]) as ranks:
        results = ranks.wait()
    assert 0 not in results.codes
    assert "mlxgpt: rank 1 of 2 (on" in results.errors[0]
    assert "training needs" in results.errors[0]
    assert not Path("runs/a").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gpu_failure_on_one_rank_saves_and_ends_all(
    home: Path, text_file: Path, rank: int
) -> None:
    plans: list[dict[str, Any]] = [PLAN, PLAN]
    plans[rank] = {**PLAN, "gpu_failure": 9}
    with RankProcesses(plans) as ranks:
        results = ranks.wait()
    assert 0 not in results.codes
    assert "the GPU failed: Impacting Interactivity; stopped" in results.errors[0]
    assert "trying again" not in "".join(results.errors)
    assert last_saved_step("a") > 0


def test_different_settings_are_reported_before_the_first_step(home: Path, text_file: Path) -> None:
    with RankProcesses([PLAN, make_plan(seed=8), PLAN]) as ranks:
        results = ranks.wait()
    assert 0 not in results.codes
    assert "rank 1 (on" in results.errors[0]
    assert "has seed 8 instead of 7" in results.errors[0]
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_random_ranks(kills: int, size: int, seed: int, steps: int = 30) -> None:
    """Repeatedly kill a random rank at a random moment and resume; print a table of the results."""
    print(f"seed {seed}\n\n| kill | rank | steps done | all ended after |\n|---|---|---|---|")
    rng = random.Random(seed)
    plan = make_plan(max_steps=steps)
    start_time = time.monotonic()
    train_on_ranks(plan, size)
    seconds = time.monotonic() - start_time
    expected_state, expected_metrics = final_run_state(), metrics("a")
    shutil.rmtree("runs")
    kill_count = finished_count = 0
    while kill_count < kills:
        victim, sessions = rng.randrange(size), count_sessions()
        with RankProcesses([plan] * size) as ranks:
            if rng.random() < 0.8:  # otherwise possibly before the ranks are connected
                wait_until(partial(has_session_started, sessions, ranks))
            time.sleep(rng.uniform(0, 0.5) * seconds)
            step = count_logged_steps() if count_sessions() > sessions else None
            if ranks.processes[victim].poll() is not None:  # the run had already finished
                assert ranks.wait().codes == [0] * size
                assert_same_run(expected_state, expected_metrics)
                finished_count += 1
                shutil.rmtree("runs")
                continue
            start_time = time.monotonic()
            ranks.processes[victim].kill()
            if step is None:  # possibly not connected yet, when mlx.launch would end them
                time.sleep(1)
                for process in ranks.processes:
                    process.terminate()
            results = ranks.wait(120)
            elapsed = time.monotonic() - start_time
        kill_count += 1
        print(
            f"| {kill_count} | {victim} | {'–' if step is None else step} | {elapsed:.2f} s |",
            flush=True,
        )
        other_codes = [code for rank, code in enumerate(results.codes) if rank != victim]
        if step is not None and any(other_codes):  # otherwise killed after the last step
            assert elapsed < 60
            assert set(other_codes) == {1}
            stderr = "".join(results.errors)
            assert f"mlxgpt: lost rank {victim} of {size}" in stderr, stderr
    train_on_ranks(plan, size)
    assert_same_run(expected_state, expected_metrics)
    print(
        f"\n{kill_count} kills, {finished_count + 1} runs ended with the bits of the one left alone"
    )


def count_logged_steps() -> int:
    """Number of log lines, one per step."""
    return len(metrics("a")) if Path("runs/a/metrics.jsonl").exists() else 0


def count_sessions() -> int:
    """Number of times the run was started or resumed."""
    history = Path("runs/a/history.jsonl")
    return len(history.read_text().splitlines()) if history.exists() else 0


def has_session_started(sessions: int, ranks: RankProcesses) -> bool:
    return count_sessions() > sessions or ranks.processes[0].poll() is not None


def assert_same_run(
    expected_state: Mapping[str, np.ndarray], expected_metrics: list[dict[str, Any]]
) -> None:
    assert have_same_bits(expected_state, final_run_state())
    assert metrics("a") == expected_metrics
