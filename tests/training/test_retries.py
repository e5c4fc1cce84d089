"""GPU failures, simulated on the CPU by raising errors in calls that wait for the device."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt.backend import device_errors, execution
from mlxgpt.cli import main as cli
from mlxgpt.config import override_config
from mlxgpt.data.dataset import open_dataset
from mlxgpt.distributed.group import LOCAL_GROUP, LocalGroup
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run
from mlxgpt.training import retries, setup
from mlxgpt.training.estimate import NO_ESTIMATE, Estimate
from mlxgpt.training.job import TrainJob
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import Capture
from tests.helpers.mlx_build import skip_if_arrays_are_immutable
from tests.helpers.training_runs import Recorder, final_state, metrics

pytestmark = pytest.mark.usefixtures("no_check", "planned")

METAL = "[METAL] Command buffer execution failed: "
WATCHDOG = (
    f"{METAL}Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)
MEMORY = f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
IGNORED = (
    f"{METAL}Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)."
)
SHORT_SETTINGS = {
    "max_steps": 3,
    "eval_interval": 2,
    "save_interval": 2,
    "log_interval": 1,
    "sample_tokens": 2,
    "eval_tokens": 16,
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a fixed estimate, since the number of timed steps depends on the machine."""
    estimate = Estimate(0.01, 1e-5, 1, 100)
    monkeypatch.setattr(setup, "estimate_training", lambda *_: estimate)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses before retries in seconds; they are recorded without sleeping."""
    seconds: list[float] = []
    monkeypatch.setattr(retries, "sleep", seconds.append)
    return seconds


class DeviceWaits:
    """Counts calls that wait for the device, and raises the errors that `failure_at` returns."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        skip_if_arrays_are_immutable()
        self.count = 0
        self.failure_at: Callable[[int], str | None] = lambda number: None
        for owner, names in (
            (mx, ("eval", "async_eval")),
            (mx.array, ("__float__", "__bool__", "__int__", "tolist", "item")),
        ):
            for name in names:
                patch.setattr(owner, name, self._count_calls(getattr(owner, name)))

    def _count_calls(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arrays: Any) -> Any:
            self.count += 1
            if text := self.failure_at(self.count):
                raise RuntimeError(text)
            return function(*arrays)

        return wrapper

    def fail_once(self, wait_index: int, text: str = WATCHDOG) -> None:
        self.count = 0
        self.failure_at = lambda number: text if number == wait_index else None


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceWaits]:
    with monkeypatch.context() as patch:
        yield DeviceWaits(patch)


def assert_same_run(run_a: str, run_b: str) -> None:
    """Check that two runs have the same weights, metrics, samples and best checkpoint."""
    assert metrics(run_a) == metrics(run_b)
    samples = [(Path("runs") / run / "samples.txt").read_text() for run in (run_a, run_b)]
    assert samples[0] == samples[1]
    assert runs.open_run(Path("runs") / run_a).best() == runs.open_run(Path("runs") / run_b).best()
    state_a, state_b = final_state(run_a), final_state(run_b)
    assert state_a.keys() == state_b.keys()
    assert all((value == state_b[name]).all() for name, value in state_a.items())


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_gpu_failure_at_any_time_does_not_change_the_result(
    train: Any, waits: DeviceWaits, pauses: list[float], every: int
) -> None:
    """At every call that waits for the device, or at every 11th."""
    train("whole", **SHORT_SETTINGS)  # also measures this machine, once
    waits.count = 0
    train("again", **SHORT_SETTINGS)
    total = waits.count
    assert total > 40
    for wait_index in range(total, 0, -every):
        waits.fail_once(wait_index)
        run = f"failed-{wait_index}"
        summary = train(run, **SHORT_SETTINGS)
        assert (summary.step, summary.interrupted, summary.resumed) == (3, False, False)
        assert waits.count > total, "it did fail"
        assert_same_run("whole", run)
    assert pauses == [5.0] * len(range(total, 0, -every))


def fail_from(waits: DeviceWaits, first_wait: int, *errors: str) -> None:
    """Raise one error after the other, at each wait from `first_wait` on."""
    remaining = list(errors)
    waits.count = 0
    waits.failure_at = lambda number: (
        remaining.pop(0) if number >= first_wait and remaining else None
    )


def test_repeated_gpu_failures_stop_the_run(
    train: Any, waits: DeviceWaits, pauses: list[float]
) -> None:
    recorder = Recorder()

    def log(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            fail_from(waits, 1, *[IGNORED] * 9)

    recorder.on_log = log  # type: ignore[method-assign]
    with pytest.raises(UserError) as excinfo:
        train("a", recorder, **SHORT_SETTINGS)
    assert pauses == [5.0, 20.0, 60.0]
    assert excinfo.value.problem == (
        "the GPU failed: Ignored (for causing prior/excessive GPU errors) "
        "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored), 4 times in a row; "
        "stopped; the last checkpoint is from step 2"
    )
    assert "pmset displaysleepnow" in excinfo.value.remedy
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in excinfo.value.remedy
    assert "retrying in 60 s" in recorder.log_lines[-1]
    waits.failure_at = lambda number: None
    assert train("a", **SHORT_SETTINGS).resumed
    train("whole", **SHORT_SETTINGS)
    assert_same_run("whole", "a")


def test_progress_resets_the_number_of_failures(
    train: Any, waits: DeviceWaits, pauses: list[float]
) -> None:
    """Every attempt fails after two more steps, more often than is allowed without progress."""
    train("whole", log_interval=1)
    recorder, furthest = Recorder(), [0]

    def log(record: dict[str, Any]) -> None:
        if furthest[0] + 2 <= record["step"] < 12:
            furthest[0] = record["step"]
            fail_from(waits, 1, WATCHDOG)

    recorder.on_log = log  # type: ignore[method-assign]
    assert train("a", recorder, log_interval=1).step == 12
    assert pauses == [5.0] * 5
    assert_same_run("whole", "a")


def test_out_of_memory_halves_the_micro_batch(
    train: Any, waits: DeviceWaits, pauses: list[float]
) -> None:
    train("whole", dropout=0.0, **SHORT_SETTINGS)
    recorder, logged_steps = Recorder(), []

    def log(record: dict[str, Any]) -> None:
        logged_steps.append(record["step"])
        if logged_steps == [1, 2]:
            fail_from(waits, 1, MEMORY)

    recorder.on_log = log  # type: ignore[method-assign]
    assert train("a", recorder, dropout=0.0, **SHORT_SETTINGS).step == 3
    config = runs.open_run(Path("runs/a")).config
    assert (config.train.batch_size, config.train.gradient_accumulation_steps) == (2, 2)
    history = (Path("runs/a") / "history.jsonl").read_text().splitlines()
    entry = json.loads(history[1])
    assert entry["step"] == 2
    assert entry["changed"] == {"batch_size": [4, 2], "gradient_accumulation_steps": [1, 2]}
    assert any(
        "the GPU is out of memory: Insufficient Memory" in line for line in recorder.log_lines
    )
    reference_metrics, actual_metrics = metrics("whole"), metrics("a")
    assert [m["loss"] for m in actual_metrics] == pytest.approx(
        [m["loss"] for m in reference_metrics], rel=1e-4
    )
    assert pauses == [5.0]


@pytest.mark.parametrize(
    ("before", "after"), [((12, 1), (6, 2)), ((3, 2), (1, 6)), ((9, 1), (3, 3))]
)
def test_a_smaller_micro_batch_keeps_the_effective_batch_size(
    tiny: Any, before: tuple[int, int], after: tuple[int, int]
) -> None:
    names = "batch_size", "gradient_accumulation_steps"
    config = override_config(tiny, dict(zip(names, before, strict=True)))
    failure = device_errors.classify_device_error(RuntimeError(MEMORY))
    assert failure
    train_config = retries._reduce_batch_size(config, failure, "").train
    assert (train_config.batch_size, train_config.gradient_accumulation_steps) == after
    with pytest.raises(UserError, match="even with micro-batches of one sequence"):
        retries._reduce_batch_size(override_config(config, {"batch_size": 1}), failure, "")


def test_cuda_is_retried_only_after_out_of_memory(
    train: Any, waits: DeviceWaits, pauses: list[float]
) -> None:
    """After other CUDA errors, every later call of the process fails."""
    timeout_error = "cudaStreamSynchronize(stream_) failed: the launch timed out and was terminated"
    waits.failure_at = lambda number: timeout_error
    with pytest.raises(UserError, match=r"the GPU failed: cudaStream.*; no checkpoint was saved"):
        train("a", **SHORT_SETTINGS)
    assert pauses == []
    fail_from(waits, 1, "cudaMallocAsync(&data, size, stream) failed: out of memory")
    assert train("b", **SHORT_SETTINGS).step == 3
    assert pauses == [5.0]


@pytest.mark.usefixtures("compiler")
def test_a_metal_compile_failure_restarts_without_compilation(
    train: Any, waits: DeviceWaits, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = "[metal::Device] Unable to build metal library from source\nprogram_source:9: error"
    monkeypatch.setattr(execution, "_compile_failure", None)
    disabled: list[bool] = []
    monkeypatch.setattr(mx, "disable_compile", lambda: disabled.append(True))
    recorder = Recorder()
    recorder.on_run = lambda run: fail_from(waits, 1, failure)  # type: ignore[method-assign]
    assert train("a", recorder, **SHORT_SETTINGS).step == 3
    assert disabled == [True]
    assert pauses == []
    line = execution.compile_failure() or ""
    assert line.startswith("Metal failed to compile a kernel ([metal::Device] Unable to build")
    assert f"{line}; restarting from step 0" in recorder.log_lines
    # Compilation is already off, so a second failure is an error.
    fail_from(waits, 1, failure)
    with pytest.raises(UserError, match=r"the GPU failed: \[metal::Device\] Unable"):
        train("b", **SHORT_SETTINGS)


def test_a_gpu_failure_after_ctrl_c_is_not_retried(
    train: Any, waits: DeviceWaits, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()

    def log(record: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        fail_from(waits, 1, WATCHDOG)

    recorder.on_log = log  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train("a", recorder, **SHORT_SETTINGS)
    assert pauses == []


def test_other_errors_are_not_retried(train: Any, waits: DeviceWaits, pauses: list[float]) -> None:
    waits.failure_at = lambda number: "a mistake of ours"
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train("a", **SHORT_SETTINGS)
    assert pauses == []


@pytest.mark.parametrize("report", [WATCHDOG, MEMORY])
@pytest.mark.parametrize(
    "command", [["eval"], ["generate", "to be", "--max-tokens", "5"]], ids=["eval", "generate"]
)
def test_gpu_failures_in_other_commands_print_a_two_line_error(
    place: Path, waits: DeviceWaits, capsys: Capture, command: list[str], report: str
) -> None:
    assert cli.main(command) == 0
    total, waits.count = waits.count, 0
    assert total > 5
    for wait_index in range(1, total + 1):
        waits.fail_once(wait_index, report)
        capsys.readouterr()
        assert cli.main(command) == 2
        problem, remedy = capsys.readouterr().err.splitlines()[-2:]
        assert problem.startswith("mlxgpt: the GPU ")
        assert problem.endswith(")")
        assert remedy.startswith("  → ")


@pytest.mark.usefixtures("compiler")
def test_other_commands_restart_after_a_metal_compile_failure(
    place: Path, waits: DeviceWaits, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = "[Metal::compiled] Must use > 512 sized block"
    monkeypatch.setattr(execution, "_compile_failure", None)
    monkeypatch.setattr(mx, "disable_compile", lambda: None)
    assert cli.main(["eval"]) == 0
    expected = capsys.readouterr().out
    waits.fail_once(waits.count, failure)
    assert cli.main(["eval"]) == 0
    output = capsys.readouterr()
    assert output.out == expected
    assert f"({failure}): kernel fusion is off, which is slower; starting over" in output.err
    waits.fail_once(1, failure)
    assert cli.main(["eval"]) == 2, "not for ever"


def test_a_gpu_failure_before_the_first_step_is_retried(
    train: Any, waits: DeviceWaits, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = setup.estimate_training, [WATCHDOG, MEMORY]
    announced_runs: list[Run] = []
    recorder = Recorder()
    recorder.on_run = announced_runs.append  # type: ignore[assignment,method-assign]

    def estimate_or_fail(*args: Any) -> Estimate:
        if failures:
            raise RuntimeError(failures.pop(0))
        return original(*args)

    monkeypatch.setattr(setup, "estimate_training", estimate_or_fail)
    assert train("a", recorder, **SHORT_SETTINGS).step == 3
    assert [run.name for run in announced_runs] == ["a"], "announced all the same"
    assert pauses == [5.0, 20.0]
    assert runs.open_run(Path("runs/a")).config.train.batch_size == 2


def test_multiple_ranks_do_not_retry(
    pauses: list[float], tiny: Any, trained: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(trained / "data" / "words")
    job = TrainJob(tiny, dataset, tmp_path / "run", None, NO_ESTIMATE)
    attempts: list[TrainJob] = []

    def attempt(job: TrainJob) -> None:
        attempts.append(job)
        if len(attempts) < 3:
            raise RuntimeError(WATCHDOG)

    with pytest.raises(RuntimeError, match="Impacting Interactivity"):
        retries.retry_on_gpu_failure(attempt, job, LocalGroup(0, 2, ["a", "b"]))
    assert pauses == []
    retries.retry_on_gpu_failure(attempt, job, LOCAL_GROUP)
    assert [job.is_retry for job in attempts] == [False, False, True]
