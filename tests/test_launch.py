from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt import api, checkpoint, config, device, forecast, hooks, launch, selfcheck
from mlxgpt import run as runs
from mlxgpt.config import Config, override
from mlxgpt.corpus import hub, sources
from mlxgpt.corpus.hub import NoConnection
from mlxgpt.corpus.tokens import Dataset
from mlxgpt.errors import UserError
from mlxgpt.forecast import Forecast
from mlxgpt.launch import Silent, Summary
from mlxgpt.model import flat
from mlxgpt.selfcheck import Law
from mlxgpt.trainer import Report


class Recorder(Silent):
    """A display that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.samples: list[tuple[int, str]] = []
        self.plan = 0
        self.forecast: Forecast | None = None

    def start(self, run: runs.Run, dataset: Dataset, start: int, forecast: Forecast) -> None:
        self.plan = run.config.train.max_steps
        self.forecast = forecast

    def note(self, line: str) -> None:
        self.notes.append(line)

    warn = note

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))


class PulledPlug(Exception):
    """The process dies here."""


pytestmark = pytest.mark.usefixtures("no_check")  # the self-check has tests of its own


@pytest.fixture
def train(home: Path, text_file: Path, tiny: Config) -> Any:
    def train(run: str, display: Recorder | None = None, **settings: Any) -> Summary:
        settings = {"config": tiny, "source": text_file, **settings}
        return api.train(run=run, display=display, **settings)

    return train


def final_state(run: str) -> dict[str, np.ndarray]:
    """Model and optimizer of a run's newest checkpoint."""
    folder = Path("runs") / run / "checkpoints"
    saved = checkpoint.load(
        checkpoint.path_of(folder, checkpoint.steps(folder)[-1]), with_optimizer=True
    )
    trees = {"model": saved.parameters, "optimizer": saved.optimizer}
    return {name: np.array(value) for name, value in flat(trees).items()}


def metrics(run: str) -> list[dict[str, Any]]:
    """The metrics that do not hang on the clock or the machine."""
    kept = ("step", "loss", "lr", "grad_norm", "val_loss")
    lines = (Path("runs") / run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]


def test_a_run_has_everything_it_needs(train: Any) -> None:
    display = Recorder()
    summary = train("a", display)
    run = Path("runs/a")
    assert {path.name for path in run.iterdir()} == {
        "config.toml",
        "run.json",
        "tokenizer.json",
        "metrics.jsonl",
        "samples.txt",
        "best.json",
        "checkpoints",
    }
    assert summary.step == summary.steps == 12
    assert not summary.interrupted
    assert not summary.resumed
    assert summary.try_it == "mlxgpt generate --run runs/a 'to be or not the rain in'"
    records = metrics("a")
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8, 12]
    best = min((r for r in records if "val_loss" in r), key=lambda r: r["val_loss"])
    assert (summary.best_step, summary.val_loss) == (best["step"], best["val_loss"])
    assert [step for step, _ in display.samples] == [4, 8, 12]
    assert all(len(text) == 10 for _, text in display.samples)
    for record in display.records[1:]:
        assert {"tokens_per_second", "peak_share", "memory_bytes"} <= record.keys()
    config = runs.open_run(run).config
    assert config.train.dtype in ("float32", "bfloat16"), "decided, and kept"
    assert config.model.vocab_size == len(set(Path("words.txt").read_text()))


def test_the_validation_loss_is_that_of_eval(train: Any) -> None:
    train("a")
    found = api.evaluate(run="a", checkpoint="newest").loss
    assert found == pytest.approx(metrics("a")[-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_interrupted_at_three_places_ends_with_the_same_bits(
    train: Any, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """Dropout is on. The interrupted run evaluates, logs and saves at other steps."""
    more = {"gradient_accumulation_steps": accumulation, "max_steps": 30}
    train("whole", **more)
    for until in (3, 11, 20):
        stops = iter([False] * (until - len_done("parts") - 1) + [True])
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_stop_signals", lambda display, stops=stops: Stops(stops))
            summary = train("parts", eval_interval=5, log_interval=1, save_interval=7, **more)
        assert summary.interrupted
        assert summary.step == until
    summary = train("parts", eval_interval=10, sample_tokens=0, **more)
    assert summary.resumed
    assert not summary.interrupted
    whole, parts = final_state("whole"), final_state("parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert (value == parts[name]).all(), name


def len_done(run: str) -> int:
    steps = checkpoint.steps(Path("runs") / run / "checkpoints")
    return steps[-1] if steps else 0


class Stops:
    """In place of the signals: a script of when to stop."""

    def __init__(self, script: Any) -> None:
        self.script = script

    def __enter__(self) -> Any:
        return lambda: next(self.script)

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("dies", ["save", "evaluate", "log"])
def test_a_run_that_died_in_a_hook_is_made_whole(
    train: Any, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    train("whole")
    real = getattr(hooks.Hooks, dies)

    def die(self: hooks.Hooks, report: Report) -> None:
        if report.step == 8:
            raise PulledPlug
        real(self, report)

    monkeypatch.setattr(hooks.Hooks, dies, die)
    with pytest.raises(PulledPlug):
        train("died")
    monkeypatch.setattr(hooks.Hooks, dies, real)
    display = Recorder()
    assert train("died", display).resumed
    expected = 4 if dies == "save" else 8
    assert display.notes == [f"resuming died from step {expected}"]
    assert metrics("died") == metrics("whole"), "each step once, the evaluation included"
    assert runs.open_run(Path("runs/died")).best() == runs.open_run(Path("runs/whole")).best()
    whole, died = final_state("whole"), final_state("died")
    assert all((value == died[name]).all() for name, value in whole.items())


def test_evaluating_and_sampling_more_often_changes_nothing(train: Any) -> None:
    train("often", eval_interval=1, log_interval=1, save_interval=1)
    train("seldom", eval_interval=12, sample_tokens=0)
    often, seldom = final_state("often"), final_state("seldom")
    assert all((value == seldom[name]).all() for name, value in often.items())


def test_the_seed_reaches_everything(train: Any) -> None:
    train("a", seed=1, dropout=0.0)
    train("b", seed=2, dropout=0.0)
    a, b = metrics("a"), metrics("b")
    assert a[0]["loss"] != b[0]["loss"]
    train("c", seed=1, dropout=0.0)
    assert metrics("c") == a


def test_a_finished_run_is_left_as_it_is(train: Any) -> None:
    train("a")
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")}
    display = Recorder()
    summary = train("a", display)
    assert display.notes == ["a is finished: 12 steps"]
    assert (summary.step, summary.interrupted) == (12, False)
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")} == before


def test_other_settings_do_not_continue_a_run(train: Any) -> None:
    train("a")
    with pytest.raises(UserError) as caught:
        train("a", learning_rate=1.0, n_head=1)
    assert caught.value.problem == (
        "a exists with other settings: n_head 2 → 1, learning_rate 0.01 → 1.0"
    )
    assert "--run NAME" in caught.value.remedy
    with pytest.raises(UserError, match="decay_steps"):
        train("a", max_steps=20)
    Path("other.txt").write_text("another text altogether, quite another text, longer " * 9)
    with pytest.raises(UserError, match="was trained on other data"):
        train("a", source="other.txt")
    assert len_done("a") == 12


def test_a_run_grows_when_its_schedule_does_not_hang_on_its_length(train: Any) -> None:
    train("a", decay_steps=12)
    display = Recorder()
    assert train("a", display, decay_steps=12, max_steps=20).step == 20
    assert display.plan == 20
    assert [r["step"] for r in metrics("a")] == list(range(2, 21, 2))
    train("b", decay_steps=12, max_steps=20)
    a, b = final_state("a"), final_state("b")
    assert all((value == b[name]).all() for name, value in a.items())


def test_the_best_checkpoint_stays(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0])
    real = hooks.Evaluator.__call__
    monkeypatch.setattr(forecast, "_evaluation_seconds", lambda *_: 1.0)
    monkeypatch.setattr(
        hooks.Evaluator, "__call__", lambda self: replace(real(self), loss=next(losses))
    )
    assert train("a").best_step == 8
    assert checkpoint.steps(Path("runs/a/checkpoints")) == [8, 12]
    assert runs.open_run(Path("runs/a")).checkpoint_path().name == "step-0000008"


def test_a_damaged_newest_checkpoint_is_told_and_passed_over(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("whole", decay_steps=12)
    monkeypatch.setattr(checkpoint, "prune", lambda folder, keep: None)
    train("a", decay_steps=12)
    weights = Path("runs/a/checkpoints/step-0000012/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    display = Recorder()
    train("a", display, decay_steps=12, max_steps=13)
    assert "step-0000012 is missing or damaged" in display.notes[0]
    assert display.notes[1] == "resuming a from step 8"
    assert [r["step"] for r in metrics("a")] == [2, 4, 6, 8, 10, 12, 13]


def test_a_folder_of_something_else_is_left_alone(train: Any) -> None:
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists and is no run"):
        train("a")
    assert Path("runs/a/thesis.txt").read_text() == "precious"


def test_a_failed_check_stops_before_anything_is_written(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        selfcheck, "check", lambda config: iter([Law("causality", False, "sees ahead")])
    )
    with pytest.raises(UserError, match="the self-check failed: causality: sees ahead"):
        train("a")
    assert list(Path("runs").iterdir()) == []


def test_divergence_is_named(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"loss is (nan|inf)") as caught:
        train("a", learning_rate=1e30, grad_clip=0.0, max_steps=100)
    assert "--learning-rate" in caught.value.remedy


def test_a_time_budget_becomes_a_number_of_steps_and_is_kept(train: Any) -> None:
    display = Recorder()
    summary = train("a", display, max_minutes=0.001, dropout=0.0)
    assert summary.step == summary.steps >= 1
    planned = runs.open_run(Path("runs/a")).config.train.max_steps
    assert display.forecast is not None
    assert display.forecast.steps == planned
    assert display.forecast.steps_in(0.06, 4) == planned, "what fits into that time"
    again = train("a", max_minutes=0.001, dropout=0.0)
    assert again.steps == planned, "the plan is not made anew"
    with pytest.raises(UserError, match="no length of time"):
        train("b", max_minutes=-1.0)


def test_a_run_that_is_resumed_is_forecast_for_what_is_left(train: Any) -> None:
    train("a", max_steps=8, decay_steps=12)
    display = Recorder()
    train("a", display, max_steps=12, decay_steps=12)
    assert display.forecast is not None
    assert (display.forecast.steps, display.forecast.evaluations) == (4, 1)


def test_what_takes_more_memory_than_it_may_is_refused_before_it_begins(train: Any) -> None:
    with pytest.raises(UserError, match=r"this training takes .* GB, and has 0\.01") as caught:
        train("a", memory_limit=0.01)
    assert "use --batch-size 1 --gradient-checkpointing" in caught.value.remedy
    assert not Path("runs/a").exists()
    for size in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="is no size"):
            train("a", memory_limit=size)


def test_a_training_that_grows_beyond_its_memory_is_saved(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def memory() -> tuple[int, str]:
        asked.append(1)
        return (int(3e12) if len(asked) > 5 else 0), "resident"

    with monkeypatch.context() as patch:
        patch.setattr(device, "memory", memory)
        with pytest.raises(UserError, match="took more than 1000 GB: stopped and saved") as caught:
            train("a", memory_limit=1000.0, log_interval=100)
    assert "--memory-limit goes on" in caught.value.remedy
    left = runs.open_run(Path("runs/a")).steps()[-1]
    assert 0 < left < 12, "stopped on the way, and saved"
    assert train("a", memory_limit=1000.0, log_interval=100).step == 12
    train("b")
    for name, value in final_state("b").items():
        assert (final_state("a")[name] == value).all(), name


def test_a_run_is_named_after_config_and_data(home: Path, text_file: Path, tiny: Config) -> None:
    assert api.train(config=tiny, source=text_file).run == Path("runs/custom-words")


def test_without_a_connection_tier_1_goes_on_with_the_storybook(
    home: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str) -> None:
        raise NoConnection("no hub", "mend it.")

    small = override(tiny, {"block_size": 8, "max_steps": 2})
    monkeypatch.setattr(hub, "load", unreachable)
    monkeypatch.setattr(sources, "STORYBOOK_MEGABYTES", 0.02)
    monkeypatch.setattr(config, "tier", lambda number: small)
    display = Recorder()
    summary = api.train(tier=1, display=display)
    assert summary.run == Path("runs/tier1-storybook")
    assert summary.data == Path("data/storybook")
    assert summary.warning is not None
    assert "storybook" in summary.warning
    assert summary.warning in display.notes
    for asked in ({"config": small}, {"tier": 1, "source": "shakespeare"}):
        with pytest.raises(NoConnection, match="no hub"):
            api.train(**asked)


def test_a_vocabulary_smaller_than_the_datas_is_refused(train: Any, tiny: Config) -> None:
    with pytest.raises(UserError, match="vocab_size = 5 is too small"):
        train("a", vocab_size=5)
    train("b", config=override(tiny, {"vocab_size": 5}))  # of a config it is but a wish
    assert runs.open_run(Path("runs/b")).config.model.vocab_size > 5
    train("a", vocab_size=64)
    assert runs.open_run(Path("runs/a")).config.model.vocab_size == 64


def test_a_checkpoint_of_another_run_is_refused(train: Any) -> None:
    train("a")
    Path("other.txt").write_text("quite another text, with other characters: 12345. " * 9)
    train("b", source="other.txt")
    mine, theirs = (Path(f"runs/{name}/checkpoints/step-0000012") for name in "ab")
    mine.rename("aside")
    theirs.rename(mine)
    with pytest.raises(UserError, match="another tokenizer"):
        api.generate(run="a", checkpoint="12")


SCRIPT = """
import sys
from mlxgpt import api, selfcheck
from mlxgpt.config import from_tree
from tests.conftest import TINY
selfcheck.check = lambda config: iter([])
tree = {**TINY, "train": {**TINY["train"], "max_steps": 100_000, "log_interval": 50}}
summary = api.train(config=from_tree(tree), source="words.txt", run="a")
print(summary.interrupted, summary.step)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_and_saves(home: Path, text_file: Path, name: str) -> None:
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    log, deadline = Path("runs/a/metrics.jsonl"), time.monotonic() + 60
    while not (log.exists() and log.read_text()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    interrupted, step = output.split()
    assert interrupted == "True"
    assert int(step) == len_done("a") > 0


def test_a_signal_may_come_while_something_is_written(train: Any) -> None:
    """The handler itself writes nothing: writing to a stream is not reentrant."""

    class Writing(Recorder):
        def log(self, record: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGINT)

        def note(self, line: str) -> None:
            if line.startswith("stopping"):
                self.notes.append(threading.current_thread().name)

    display = Writing()
    assert train("a", display).interrupted
    while not display.notes:
        time.sleep(0.01)
    assert display.notes[0] != threading.main_thread().name


def test_weights_load_into_the_model_that_is_run(train: Any) -> None:
    train("a")
    model, saved = launch.load_model(runs.open_run(Path("runs/a")), "newest")
    for name, value in flat(model.parameters()).items():
        assert mx.array_equal(value, flat(saved.parameters)[name])
    assert saved.step == 12
    assert override(Config(), {}).model != model.config
