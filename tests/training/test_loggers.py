from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.cli import main as cli
from mlxgpt.config import Config
from mlxgpt.storage.run import open_run
from mlxgpt.training import loggers
from mlxgpt.training.run_writer import RunWriter
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import TRAIN_ARGS, Capture, expect_error, run_program
from tests.helpers.training_runs import Recorder


def test_an_unknown_logger_is_refused(place: Path, capsys: Capture) -> None:
    line = ["train", "--tier", "1", "--source", "words.txt"]
    assert "unknown logger paper" in expect_error(capsys, *line, "--report-to", "paper")


@pytest.mark.parametrize("to", loggers.INSTALL_COMMANDS)
def test_a_missing_logger_package_suggests_its_installation(
    to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{to} is not installed") as excinfo:
        loggers.make_logger(to)
    assert "pip install" in excinfo.value.remedy


class LeftoverLogger(loggers.TensorBoardLogger):
    """A logger whose package is not installed."""

    def __init__(self) -> None:
        loggers.MetricsLogger.__init__(self, "leftover")


def test_an_output_folder_is_not_taken_for_the_package(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wandb writes to ./wandb, which Python would import if the package is missing."""
    (home / "leftover" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(home)
    monkeypatch.setitem(loggers.INSTALL_COMMANDS, "leftover", "pip install leftover")
    with pytest.raises(UserError, match="leftover is not installed"):
        LeftoverLogger()


def test_a_failed_import_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_wandb_module(monkeypatch, None)
    with pytest.raises(UserError, match="wandb cannot be imported: ") as excinfo:
        loggers.make_logger("wandb")
    assert "pip install" in excinfo.value.remedy


def install_wandb_module(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    find_spec: Callable[[str], Any] = importlib.util.find_spec
    spec = ModuleSpec("wandb", None, origin="wandb/__init__.py")
    monkeypatch.setattr(loggers, "find_spec", lambda n: spec if n == "wandb" else find_spec(n))


class FakeWandb:
    """Fake of the wandb package and its run that records calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.init_calls: list[dict[str, Any]] = []
        self.logged_metrics: list[tuple[int, dict[str, float]]] = []
        self.finish_count = 0
        self.is_logged_in = True
        self.mode = "online"
        module = ModuleType("wandb")
        module.__dict__.update(
            setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=self.mode)),
            login=self.login,
            init=self.init,
            Settings=dict,
        )
        self.module = module
        install_wandb_module(monkeypatch, module)

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.is_logged_in

    def init(self, **kwargs: Any) -> FakeWandb:
        self.init_calls.append(kwargs)
        return self

    def log(self, numbers: dict[str, float], *, step: int) -> None:
        self.logged_metrics.append((step, numbers))

    def finish(self) -> None:
        self.finish_count += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    return FakeWandb(monkeypatch)


TRAIN_WITH_WANDB = [*TRAIN_ARGS, "--source", "data/words", "--report-to", "wandb"]


@pytest.mark.parametrize("old", [False, True])
def test_missing_wandb_login_is_reported(
    place: Path, capsys: Capture, wandb: FakeWandb, old: bool, no_check: None
) -> None:
    """Without a prompt, also in wandb versions whose `login` has no `prompt` argument."""
    wandb.is_logged_in = False
    if old:
        wandb.module.__dict__.update(
            login=lambda *, verify: 1 / 0, api=SimpleNamespace(api_key=None)
        )
    assert expect_error(capsys, *TRAIN_WITH_WANDB) == "wandb is not logged in"
    wandb.mode = "offline"
    assert cli.main(TRAIN_WITH_WANDB) == 0
    assert wandb.logged_metrics[-1][0] == 4


def test_api_key_of_an_older_wandb_is_accepted(wandb: FakeWandb) -> None:
    wandb.module.__dict__.update(login=lambda *, verify: 1 / 0, api=SimpleNamespace(api_key="k"))
    loggers.make_logger("wandb")


@pytest.mark.parametrize("where", ["setup", "login", "init"])
def test_wandb_failures_before_training_are_reported(
    place: Path, capsys: Capture, wandb: FakeWandb, where: str, no_check: None
) -> None:
    def fail(**_: object) -> None:
        raise ConnectionError("timed out\nafter 20 s")

    wandb.module.__dict__[where] = fail
    assert expect_error(capsys, *TRAIN_WITH_WANDB) == "wandb failed: timed out after 20 s"


def test_wandb_init_timeout_is_set_and_can_be_overridden(
    train: Any, no_check: None, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("a", report_to="wandb")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "200")
    train("b", report_to="wandb")
    first, second = (init_call["settings"] for init_call in wandb.init_calls)
    assert (first, second) == ({"init_timeout": loggers.WANDB_INIT_SECONDS}, {})


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_failing_logger_warns_once_and_training_continues(
    train: Any,
    no_check: None,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    notes: list[str],
    where: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the service is gone")

    recorder = Recorder()
    monkeypatch.setattr(wandb, where, fail)
    assert train("a", recorder, report_to="wandb").step == 12
    assert [line for line in notes if "wandb" in line] == [
        "wandb failed: the service is gone; training continues without it"
    ]
    assert recorder.records[-1]["step"] == 12
    assert wandb.finish_count == (where == "log")


def test_a_logger_that_never_finishes_is_abandoned(
    train: Any, no_check: None, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    finished = threading.Event()
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(wandb, "finish", lambda: finished.wait(60))
    assert train("a", report_to="wandb").step == 12
    assert "wandb did not finish" in notes[-1]
    finished.set()


HANGING_MODULE = """
import atexit, sys, time
from types import SimpleNamespace

Settings = dict
setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline"))
atexit.register(time.sleep, 600)

def init(**_):
    sys.modules["mlxgpt.training.loggers"].CLOSE_SECONDS = 0.1
    return SimpleNamespace(log=lambda *_, step: None, finish=lambda: time.sleep(600))
"""


def test_the_process_exits_despite_a_hanging_logger(place: Path) -> None:
    (place / "wandb").mkdir()
    (place / "wandb" / "__init__.py").write_text(HANGING_MODULE)
    process = run_program(*TRAIN_WITH_WANDB, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "wandb did not finish" in process.stderr


def test_a_logger_gets_all_records_alongside_other_callbacks(
    train: Any, no_check: None, wandb: FakeWandb
) -> None:
    recorder = Recorder()
    train("a", recorder, report_to="wandb", max_steps=12)
    assert [step for step, _ in wandb.logged_metrics] == [
        record["step"] for record in recorder.records
    ]
    step, logged = wandb.logged_metrics[-1]
    assert (step, logged["val_loss"]) == (12, recorder.records[-1]["val_loss"])
    assert "step" not in logged
    assert all(isinstance(value, float) for value in logged.values())
    assert wandb.init_calls[0]["name"] == "a"
    assert wandb.init_calls[0]["config"]["train"]["max_steps"] == 12
    assert wandb.finish_count == 1
    assert recorder.samples, "and the other callbacks get all events"


def test_several_loggers_get_the_same_records(
    home: Path, text_file: Path, tiny: Config, no_check: None, wandb: FakeWandb
) -> None:
    """Passed as callbacks, without `report_to`."""
    with loggers.WandbLogger() as first, loggers.WandbLogger() as second:
        recorder = Recorder()
        api.train(config=tiny, source=text_file, run="a", callbacks=[first, recorder, second])
    steps = [step for step, _ in wandb.logged_metrics]
    assert sorted(steps) == sorted(2 * [record["step"] for record in recorder.records])
    assert wandb.finish_count == 2


def test_a_resumed_run_continues_the_same_wandb_run(
    train: Any, no_check: None, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunWriter.save

    def save_then_fail(self: RunWriter, step: int, *args: Any) -> None:
        save(self, step, *args)
        if step == 8:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "save", save_then_fail)
        with pytest.raises(OSError, match="No space"):
            train("a", report_to="wandb")
    assert wandb.finish_count == 1
    train("a", report_to="wandb")
    first, second = wandb.init_calls
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    train("b", report_to="wandb")
    assert wandb.init_calls[2]["id"] != first["id"]
    shutil.copytree("runs/a", "runs/copy")
    shutil.rmtree("runs/copy/checkpoints/step-0000012")
    train("copy", report_to="wandb")
    assert len({init_call["id"] for init_call in wandb.init_calls}) == 3


def test_a_run_of_an_older_version_continues_its_wandb_run(
    train: Any, no_check: None, wandb: FakeWandb
) -> None:
    train("a", report_to="wandb", max_steps=12)
    (Path("runs/a") / loggers.WANDB_TOKEN_FILE).unlink()
    shutil.rmtree("runs/a/checkpoints/step-0000012")
    train("a", report_to="wandb", max_steps=12)
    time = next(open_run(Path("runs/a")).history())["time"]
    assert wandb.init_calls[1]["id"] == hashlib.sha256(f"a {time}".encode()).hexdigest()[:16]
