from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.experiments import planning, scaling
from mlxgpt.experiments.scaling_report import RESULT_COLUMNS, format_result_row
from mlxgpt.experiments.scaling_results import ScalingRecord, parse_scaling_record
from mlxgpt.storage.run import open_run
from mlxgpt.training import auto_size
from mlxgpt.training.estimate import Estimate
from mlxgpt.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("no_check")

SHAPES = ((1, 64), (2, 64), (3, 64), (1, 128), (2, 128), (3, 128))
SETTINGS: dict[str, Any] = {"tokenizer": "char", "block_size": 8, "recipe": "modern", "seeds": 1}


@pytest.fixture(autouse=True)
def small_study(home: Path, text_file: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six small sizes, 64 tokens per step, at a second per step and layer."""

    def fake_estimate(config: Any, *_: object) -> Estimate:
        return Estimate(config.model.n_layer * config.tokens_per_step / 64, 0.0, 1000, 0)

    text_file.write_text(text * 4)
    for module in (scaling, auto_size):
        monkeypatch.setattr(module, "MIN_STEP_TOKENS", 64)
    monkeypatch.setattr(scaling, "SIZES", SHAPES)
    monkeypatch.setattr(scaling, "MIN_STEPS", 0.5)
    monkeypatch.setattr(auto_size, "MODEL_SIZES", SHAPES)
    monkeypatch.setattr("mlxgpt.training.setup.estimate_training", fake_estimate)
    monkeypatch.setattr(planning, "estimate_training", fake_estimate)
    monkeypatch.setattr(auto_size, "estimate_training", fake_estimate)


class Recorder(scaling.ScaleCallback):
    def __init__(self, stop_after: int | None = None) -> None:
        self.begun: list[tuple[str, int, int]] = []
        self._stop_after = stop_after

    def on_variant_begin(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
        self.begun.append((variant, seed, steps))
        assert 0 <= done < total

    def on_log(self, record: dict[str, Any]) -> None:
        if len(self.begun) == self._stop_after:
            signal.raise_signal(signal.SIGINT)


def run_scale(*callbacks: scaling.ScaleCallback, **options: Any) -> ScalingRecord:
    settings = {"source": "words.txt", "budget": "116s", **SETTINGS, **options}
    return api.scale(callbacks=callbacks, **settings)


def test_a_study_trains_each_size_and_length_once_and_fits_a_law(
    home: Path, notes: list[str]
) -> None:
    recorder = Recorder()
    record = run_scale(recorder)
    # Seconds of a step: 1, 2, 3, 1 for the fitted sizes, 2 for the test: 7/4 · 7 + 2 = 14.3.
    assert [(r.size.n_layer, r.size.n_embd, r.steps) for r in record.results] == [
        *[(layers, width, n) for layers, width in SHAPES[:4] for n in (2, 4, 8)],
        (2, 128, 8),
    ]
    assert len(recorder.begun) == 13
    for result in record.results:
        assert result.tokens == 64 * result.steps
        assert math.isfinite(result.losses[0])
    runs = sorted((home / "runs" / "compare" / "trainings").iterdir())
    configs = [open_run(folder).config for folder in runs if folder.is_dir()]
    assert len(configs) == 13
    for config in configs:
        assert config.model.qk_norm, "the modern recipe has it"
        assert config.optim.schedule == "wsd"
    assert sorted(config.train.max_steps for config in configs) == [2] * 4 + [4] * 4 + [8] * 5
    assert record.fit is not None
    assert record.held_out_bytes > 0

    again = Recorder()
    assert run_scale(again) == record
    assert again.begun == []


def test_an_interrupted_study_resumes_to_the_same_result(home: Path) -> None:
    interrupted = run_scale(Recorder(stop_after=5))
    assert interrupted.interrupted
    assert interrupted.fit is None
    resumed = Recorder()
    record = run_scale(resumed)
    assert len(resumed.begun) in (8, 9)
    assert not record.interrupted
    path = home / "runs" / "compare" / record.name / f"{record.name}.json"
    assert parse_scaling_record(path.read_text()) == record
    uninterrupted = run_scale(runs_dir=home / "other")
    assert [r.losses for r in uninterrupted.results] == [r.losses for r in record.results]


def test_a_law_of_a_newer_mlxgpt_is_refused_before_training(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / "law.json"
    path.write_text('{"format": 99}')
    monkeypatch.setattr(scaling, "law_path", lambda *_: path)
    recorder = Recorder()
    with pytest.raises(UserError, match="newer mlxgpt"):
        run_scale(recorder)
    assert recorder.begun == []


def test_a_larger_budget_trains_larger_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.TrainingRuns, "train", lambda *_: None)
    monkeypatch.setattr(scaling, "TOKENS_PER_PARAMETER", 0.001)
    small, large = run_scale(), run_scale(budget="400s")
    assert small.test.size.n_layer == 2
    assert large.test.size.n_layer == 3
    assert large.test.steps > small.test.steps


def fake_losses(monkeypatch: pytest.MonkeyPatch, loss: Callable[[float, float], float]) -> None:
    """Replace training by a loss that depends on million parameters and million tokens."""

    def fake_train(self: object, variant: Any, seed: int, done: int, total: int) -> Any:
        parameters = scaling.count_parameters(variant.config.model)
        tokens = variant.config.train.max_steps * variant.config.tokens_per_step
        value = loss(parameters / 1e6, tokens / 1e6)
        curve = None if math.isinf(value) else object()
        return type("Result", (), {"bits_per_byte": value, "curve": curve})()

    monkeypatch.setattr(scaling.TrainingRuns, "train", fake_train)


def test_max_minutes_uses_the_law(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """By a law of tokens alone, the fastest model is best; by one of size alone, the largest."""
    caplog.set_level("INFO")
    chosen: list[tuple[int, int]] = []
    losses: tuple[Callable[[float, float], float], ...] = (
        lambda n, d: 0.1 / d**0.5,
        lambda n, d: 0.1 / n,
    )
    for loss in losses:
        fake_losses(monkeypatch, loss)
        record = run_scale()
        assert record.advice[0].minutes == 1
        options: dict[str, Any] = {"source": "words.txt", "tokenizer": "char", "block_size": 8}
        options |= {"sample_tokens": 0, "run": f"run{len(chosen)}"}
        summary = api.train(recipe="modern", max_minutes=0.5, **options)
        model = open_run(summary.run).config.model
        chosen.append((model.n_layer, model.n_embd))
    assert chosen == [(1, 64), (3, 128)]
    assert "by the scaling law of this text" in caplog.text


def test_a_law_that_fails_its_test_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laws = home / "runs" / "compare" / "laws"
    fake_losses(monkeypatch, lambda n, d: 0.1 / n + (n > 0.85))
    assert not run_scale().law_holds
    assert not laws.exists()
    fake_losses(monkeypatch, lambda n, d: 0.1 / n)
    assert run_scale().law_holds
    assert len(list(laws.iterdir())) == 1


def test_a_diverged_run_gives_no_law(monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
    fake_losses(monkeypatch, lambda n, d: math.inf if n > 0.85 else 1.0)
    record = run_scale()
    assert record.fit is None
    assert any("diverged: no law is fitted" in note for note in notes)
    assert format_result_row(record, record.test)[RESULT_COLUMNS.index("bits per byte")] == (
        "diverged"
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"budget": "2Mtokens"}, "--budget 2Mtokens is not a time"),
        ({"budget": "5s"}, "minutes are too short for 1 × 13 runs"),
        ({"seeds": 0}, "--seeds 0 is too few"),
        ({"n_layer": 3}, "n_layer is set, but mlxgpt scale chooses it"),
        ({"recipe": "classic"}, "mlxgpt scale does not choose a model size"),
    ],
)
def test_what_cannot_be_scaled_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as excinfo:
        run_scale(**options)
    assert excinfo.value.remedy


def test_a_short_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "MIN_STEPS", 10_000)
    with pytest.raises(UserError, match="too few to fit a scaling law") as excinfo:
        run_scale(budget="100h")
    assert "times as many" in excinfo.value.remedy
