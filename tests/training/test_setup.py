from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config, toml
from mlxgpt.data import hub, sources
from mlxgpt.data.hub import DatasetUnavailableError
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage import checkpoint, loading
from mlxgpt.storage import run as runs
from mlxgpt.training import estimate, selfcheck, validation
from mlxgpt.training import metrics as step_metrics
from mlxgpt.training.selfcheck import CheckResult
from mlxgpt.training.step import TrainStep
from mlxgpt.utils.errors import UserError
from tests.helpers.training_runs import Recorder, final_state, last_saved_step, metrics

pytestmark = pytest.mark.usefixtures("no_check")  # the self-check is tested separately


def test_a_run_folder_is_complete(train: Any) -> None:
    recorder = Recorder()
    summary = train("a", recorder)
    run = Path("runs/a")
    assert {path.name for path in run.iterdir()} == {
        "config.toml",
        "run.json",
        "tokenizer.json",
        "metrics.jsonl",
        "samples.txt",
        "history.jsonl",
        "best.json",
        "checkpoints",
        "snapshots",
    }
    assert summary.step == summary.steps == 12
    assert not summary.interrupted
    assert not summary.resumed
    assert summary.try_it == "mlxgpt generate --run runs/a 'to be or not the rain in'"
    records = metrics("a")
    assert [line["step"] for line in records] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in records if "val_loss" in line] == [4, 8, 12]
    best = min((line for line in records if "val_loss" in line), key=lambda line: line["val_loss"])
    assert (summary.best_step, summary.val_loss) == (best["step"], best["val_loss"])
    assert [step for step, _ in recorder.samples] == [4, 8, 12]
    assert all(len(text) == 10 for _, text in recorder.samples)
    for record in recorder.records[1:]:
        assert {"tokens_per_second", "peak_share", "memory_bytes"} <= record.keys()
    config = runs.open_run(run).config
    assert config.train.dtype in ("float32", "bfloat16"), "decided, and kept"
    assert config.model.vocab_size == len(set(Path("words.txt").read_text()))


def test_the_validation_loss_matches_eval(train: Any) -> None:
    train("a")
    actual = api.evaluate(run="a", checkpoint="newest").loss
    assert actual == pytest.approx(metrics("a")[-1]["val_loss"], rel=1e-6)


@pytest.mark.exact_bits
def test_evaluation_and_sampling_do_not_affect_training(train: Any) -> None:
    train("often", eval_interval=1, log_interval=1, save_interval=1)
    train("seldom", eval_interval=12, sample_tokens=0)
    often, seldom = final_state("often"), final_state("seldom")
    assert all((value == seldom[name]).all() for name, value in often.items())


@pytest.mark.exact_bits
def test_the_seed_determines_the_run(train: Any) -> None:
    train("a", seed=1, dropout=0.0)
    train("b", seed=2, dropout=0.0)
    a, b = metrics("a"), metrics("b")
    assert a[0]["loss"] != b[0]["loss"]
    train("c", seed=1, dropout=0.0)
    assert metrics("c") == a


def test_resuming_with_different_settings_is_refused(train: Any) -> None:
    train("a")
    with pytest.raises(UserError) as excinfo:
        train("a", learning_rate=1.0, n_head=1)
    assert excinfo.value.problem == (
        "a exists with different settings: n_head 2 → 1, learning_rate 0.01 → 1.0"
    )
    assert "--run NAME" in excinfo.value.remedy
    with pytest.raises(UserError, match=r"max_steps 12 → 20; the run is finished") as excinfo:
        train("a", max_steps=20)
    assert "mlxgpt train --init-from a --max-steps N" in excinfo.value.remedy
    Path("other.txt").write_text("another text altogether, quite another text, longer " * 9)
    with pytest.raises(UserError, match=r"was trained on .*, not on"):
        train("a", source="other.txt")
    assert last_saved_step("a") == 12


def test_the_best_checkpoint_is_kept(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0])
    original = validation.Evaluator.__call__
    monkeypatch.setattr(estimate, "_time_eval_token", lambda *_: 1.0)
    monkeypatch.setattr(
        validation.Evaluator, "__call__", lambda self: replace(original(self), loss=next(losses))
    )
    assert train("a").best_step == 8
    assert checkpoint.list_steps(Path("runs/a/checkpoints")) == [8, 12]
    assert runs.open_run(Path("runs/a")).checkpoint_path().name == "step-0000008"


def test_a_nonfinite_loss_is_never_the_best(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([math.nan, 2.0, math.inf])

    def validate(self: Any, step: int) -> tuple[Evaluation, Evaluation, None]:
        result = Evaluation(next(losses), bits_per_byte=1.0, perplexity=1.0, tokens=9)
        return result, result, None

    monkeypatch.setattr(validation.Validation, "__call__", validate)
    summary = train("a")
    assert (summary.best_step, summary.val_loss) == (8, 2.0)
    val_losses = [line["val_loss"] for line in metrics("a") if "val_loss" in line]
    assert val_losses == [None, 2.0, None], "as JSON can have it"


def test_each_evaluation_is_logged(train: Any) -> None:
    train("a", eval_interval=3, log_interval=4)
    lines = [(line["step"], "val_loss" in line) for line in metrics("a")]
    assert lines == [(3, True), (4, False), (6, True), (8, False), (9, True), (12, True)]


def test_tokens_per_second_since_the_last_log_line(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes 1 s for 4 × 8 tokens; a log line right after the first step has no speed."""
    now, original = 0.0, TrainStep.__call__

    def take_one_second(step: TrainStep, *args: Any) -> Any:
        nonlocal now
        now += 1
        return original(step, *args)

    monkeypatch.setattr(TrainStep, "__call__", take_one_second)
    monkeypatch.setattr(step_metrics, "time", SimpleNamespace(monotonic=lambda: now))
    recorder = Recorder()
    train("a", recorder, log_interval=3)
    rates = [(record["step"], record["tokens_per_second"]) for record in recorder.records]
    assert rates == [(step, 32.0) for step in (3, 4, 6, 8, 9, 12)]
    recorder = Recorder()
    train("b", recorder, log_interval=1)
    assert [record["tokens_per_second"] for record in recorder.records] == [0.0, *[32.0] * 11]


def test_a_folder_without_a_run_is_left_unchanged(train: Any) -> None:
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists but is not a run"):
        train("a")
    assert Path("runs/a/thesis.txt").read_text() == "precious"


def test_a_failed_self_check_stops_before_anything_is_written(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        selfcheck,
        "run_self_check",
        lambda config: iter([CheckResult("causality", False, "sees ahead")]),
    )
    with pytest.raises(UserError, match="the self-check failed: causality: sees ahead"):
        train("a")
    assert list(Path("runs").iterdir()) == []


def test_divergence_is_reported(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"diverged: 1\d consecutive steps with a non-finite"
    ) as excinfo:
        train("a", learning_rate=1e30, grad_clip=0.0, max_steps=100)
    for cause in ("--learning-rate below 1e+30", "--warmup-steps", "--grad-clip 1"):
        assert cause in excinfo.value.remedy
    saved = runs.open_run(Path("runs/a")).load_first_valid(
        sorted(Path("runs/a/checkpoints").iterdir(), reverse=True)
    )
    assert all(mx.isfinite(value).all() for value in saved.parameters.values())


def test_nonfinite_logits_only_skip_the_sample(train: Any) -> None:
    recorder = Recorder()
    settings = {"max_steps": 6, "eval_interval": 3, "sample_tokens": 4}
    assert train("a", recorder, learning_rate=1e30, grad_clip=0.0, **settings).step == 6
    assert any(
        line.startswith("skipping the sample: the model's logits are")
        for line in recorder.log_lines
    )


def test_a_time_budget_is_converted_to_steps_once(train: Any) -> None:
    recorder = Recorder()
    summary = train("a", recorder, max_minutes=0.02, dropout=0.0)
    assert summary.step == summary.steps >= 1
    config = runs.open_run(Path("runs/a")).config
    planned_steps = config.train.max_steps
    assert recorder.estimate is not None
    assert recorder.estimate.steps == planned_steps
    assert (
        recorder.estimate.steps_within(1.2, override_config(config, {"eval_interval": 4}))
        == planned_steps
    ), "what fits into that time"
    repeated = train("a", max_minutes=0.02, dropout=0.0)
    assert repeated.steps == planned_steps, "the plan is not made anew"
    with pytest.raises(UserError, match="not a valid duration"):
        train("b", max_minutes=-1.0)


def test_a_short_time_budget_shortens_the_warmup(train: Any, tiny: Config) -> None:
    config = override_config(tiny, {"warmup_steps": 2000})
    train("a", config=config, max_minutes=0.02)
    planned_config = runs.open_run(Path("runs/a")).config
    assert planned_config.optim.warmup_steps == math.ceil(planned_config.train.max_steps / 10)
    assert train("a", config=config, max_minutes=0.02).resumed, "it is the same run"
    train("b", config=config)
    assert runs.open_run(Path("runs/b")).config.optim.warmup_steps == 2000


def test_changed_data_is_refused(train: Any, text_file: Path) -> None:
    train("a")
    shutil.rmtree("data/words")
    text_file.write_text(text_file.read_text()[::-1])
    with pytest.raises(UserError, match="data/words has changed since a was trained on it"):
        train("a")


def test_exceeding_the_memory_limit_is_refused_before_training(train: Any) -> None:
    with pytest.raises(
        UserError, match=r"training needs .* GB of memory, but the limit is 0\.01"
    ) as excinfo:
        train("a", memory_limit=0.01)
    assert "use --batch-size 1 --gradient-checkpointing" in excinfo.value.remedy
    assert not Path("runs/a").exists()
    for size in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="is not a valid size"):
            train("a", memory_limit=size)


def test_a_run_is_named_after_config_and_dataset(home: Path, text_file: Path, tiny: Config) -> None:
    assert api.train(config=tiny, source=text_file).run == Path("runs/custom-words")


def test_without_a_connection_tier_1_uses_synthetic_stories(
    home: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    def unreachable(*_: object) -> None:
        raise DatasetUnavailableError("no hub", "mend it.")

    small = override_config(tiny, {"block_size": 8, "max_steps": 2})
    monkeypatch.setattr(hub, "load_hub_rows", unreachable)
    monkeypatch.setattr(sources, "SYNTHETIC_MEGABYTES", 0.02)
    monkeypatch.setattr(toml, "load_tier_config", lambda number, recipe: small)
    summary = api.train(tier=1)
    assert summary.run == Path("runs/tier1-synthetic")
    assert summary.data == Path("data/synthetic")
    assert summary.warning is not None
    assert "synthetic" in summary.warning
    assert summary.warning in notes
    for options in ({"config": small}, {"tier": 1, "source": "shakespeare"}):
        with pytest.raises(DatasetUnavailableError, match="no hub"):
            api.train(**options)


def test_a_vocabulary_smaller_than_that_of_the_dataset_is_refused(train: Any, tiny: Config) -> None:
    with pytest.raises(UserError, match="vocab_size = 5 is too small"):
        train("a", vocab_size=5)
    train("b", config=override_config(tiny, {"vocab_size": 5}))  # not binding in a config
    assert runs.open_run(Path("runs/b")).config.model.vocab_size > 5
    train("a", vocab_size=64)
    assert runs.open_run(Path("runs/a")).config.model.vocab_size == 64


def test_load_model_loads_the_saved_weights(train: Any) -> None:
    train("a")
    model, saved = loading.load_model(runs.open_run(Path("runs/a")), "newest")
    for name, value in flatten_params(model.parameters()).items():
        assert mx.array_equal(value, saved.parameters[name])
    assert saved.step == 12
    assert override_config(Config(), {}).model != model.config


@pytest.mark.parametrize(
    "moment", ["training.selfcheck.run_self_check", "training.setup.estimate_training"]
)
def test_ctrl_c_before_the_first_step_keeps_the_data(
    train: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(f"mlxgpt.{moment}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("a", recorder)
    assert "keeping data/words; the same command reuses it" in recorder.log_lines
    assert not Path("runs/a").exists()
    assert train("a").step == 12


def test_a_run_with_only_warmup_steps_logs_a_warning(train: Any) -> None:
    recorder = Recorder()
    train("a", recorder, warmup_steps=11)
    assert not any("warmup steps" in line for line in recorder.log_lines)
    train("b", recorder, warmup_steps=24)
    (line,) = (line for line in recorder.log_lines if "warmup steps" in line)
    assert "24 warmup steps, 12 steps in total): the learning rate only reaches 0.0048" in line
    assert line.endswith("--warmup-steps 1")
