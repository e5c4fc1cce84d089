"""Logging a run with the real TensorBoard and wandb packages."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.storage.run import open_run
from mlxgpt.training.loggers import TensorBoardLogger
from tests.helpers.commands import ROOT
from tests.helpers.training_runs import Recorder

pytestmark = pytest.mark.filterwarnings("ignore")  # third-party warnings


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")


@pytest.mark.usefixtures("no_check", "tensorboard")
def test_tensorboard_reads_the_records(train: Any) -> None:
    summary = train("a", report_to="tensorboard")
    assert_shows_each_step_once(summary.run)


@pytest.mark.usefixtures("no_check", "tensorboard")
@pytest.mark.parametrize("stopped_at", [4, 6, 10])
def test_tensorboard_shows_each_step_once_after_an_interruption(
    train: Any, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """With the logger from the start, and only from the second start on."""

    class StoppingRecorder(Recorder):
        def on_log(self, record: dict[str, Any]) -> None:
            if record["step"] == stopped_at:
                raise RuntimeError("killed")

    for name, first_logger in (("a", "tensorboard"), ("b", None)):
        with pytest.raises(RuntimeError, match="killed"):
            train(name, StoppingRecorder(), report_to=first_logger)
        summary = train(name, report_to="tensorboard", seed=7)
        first_step = stopped_at // 4 * 4 + 1 if name == "b" else 0
        assert_shows_each_step_once(summary.run, since=first_step)


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_shows_each_step_once_after_a_rollback(trained: Path, tmp_path: Path) -> None:
    run = replace(open_run(trained / "runs" / "done"), folder=tmp_path)
    logger = TensorBoardLogger()
    logger._start(run, 0)
    for step, loss in ((2, 9.0), (4, 8.0), (6, 7.0), (8, 99.0), (6, 6.0), (8, 5.0)):
        logger._write(step, {"loss": loss})
    logger._finish()
    for read_scalars in (read_page_scalars, read_accumulator_scalars):
        assert read_scalars(tmp_path / "tensorboard", "loss") == [
            (2, 9.0),
            (4, 8.0),
            (6, 6.0),
            (8, 5.0),
        ]


def assert_shows_each_step_once(folder: Path, since: int = 0) -> None:
    records = [record for record in open_run(folder).metrics() if record["step"] >= since]
    assert records
    for name in ("loss", "val_loss", "lr", "tokens_per_second"):
        expected: list[Any] = [(r["step"], r[name]) for r in records if name in r]
        for read_scalars in (read_page_scalars, read_accumulator_scalars):
            values = read_scalars(folder / "tensorboard", name)
            assert [step for step, _ in values] == [step for step, _ in expected]
            assert dict(values) == pytest.approx(dict(expected), rel=1e-6)


def read_accumulator_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def read_page_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Read with the accumulator of TensorBoard's server, which drops steps by different rules."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [
        (event.step, float(make_ndarray(event.tensor_proto))) for event in accumulator.Tensors(name)
    ]


def test_wandb_logs_the_records_offline(
    train: Any, no_check: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(home)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logged: list[tuple[int, float]] = []
    log = wandb.Run.log

    def recording_log(run: Any, numbers: dict[str, float], *, step: int) -> None:
        assert run.name == "a"
        assert run.config["train"]["max_steps"] == 12
        logged.append((step, numbers["loss"]))
        log(run, numbers, step=step)

    monkeypatch.setattr(wandb.Run, "log", recording_log)
    summary = train("a", report_to="wandb")
    assert logged == [(r["step"], r["loss"]) for r in open_run(summary.run).metrics()]
    (file,) = home.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # wandb's background process may write after the run's end
    while b"val_loss" not in file.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


CONNECT = """
import os
from pathlib import Path
from mlxgpt import UserError
from mlxgpt.storage.run import open_run
from mlxgpt.training.loggers import WandbLogger

try:
    WandbLogger().on_run(open_run(Path("runs/done")))
except UserError as error:
    print("refused:", error.problem, flush=True)
os._exit(0)
"""


def run_in_terminal(place: Path, **environment: str) -> str:
    """Connect to wandb in a terminal, where it could prompt for a key; return the output. Only the
    given wandb settings are in the environment.
    """
    pytest.importorskip("wandb", reason="wandb is not installed")
    terminal_fd, child_fd = pty.openpty()
    base_environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB_")
    }
    no_login = {"NETRC": str(place / ".netrc"), "WANDB_CONFIG_DIR": str(place / "wandb-config")}
    child = subprocess.Popen(
        [sys.executable, "-c", CONNECT],
        stdin=child_fd,
        stdout=child_fd,
        stderr=child_fd,
        cwd=place,
        env={
            **base_environment,
            **no_login,
            "TERM": "xterm",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
    )
    os.close(child_fd)
    output = ""
    with contextlib.suppress(OSError):  # raised at the end of the output
        while "\n" not in output.partition("refused: ")[2] and (
            piece := os.read(terminal_fd, 1 << 16)
        ):
            output += piece.decode(errors="replace")
    os.close(terminal_fd)
    child.kill()
    child.wait()
    return output


def test_a_missing_login_does_not_prompt(place: Path) -> None:
    assert "refused: wandb is not logged in" in run_in_terminal(place)


def test_an_unreachable_server_is_reported(place: Path) -> None:
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    assert "refused: wandb failed: " in run_in_terminal(
        place, WANDB_API_KEY="0" * 40, **unreachable
    )
