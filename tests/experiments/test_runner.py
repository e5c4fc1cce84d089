from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.config.toml import config_to_toml
from mlxgpt.data import prepare as preparation
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.holdout import hold_out_from_train
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.distributed.group import LOCAL_GROUP, ProcessGroup
from mlxgpt.experiments import planning, training_runs
from mlxgpt.experiments import runner as study
from mlxgpt.experiments.results import ComparisonRecord
from mlxgpt.storage import run as runs
from mlxgpt.training import loop, setup
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.estimate import Estimate
from mlxgpt.training.job import TrainJob
from mlxgpt.training.loop import DivergedError
from mlxgpt.utils.errors import UserError
from tests.helpers.comparisons import CompareRecorder, run_comparison

pytestmark = pytest.mark.usefixtures("no_check")


@pytest.fixture(autouse=True)
def project_folder(home: Path, text_file: Path) -> Path:
    """The current folder, which contains words.txt."""
    return home


def results(record: ComparisonRecord) -> dict[str, list[float]]:
    return {s.name: [t.bits_per_byte for t in s.trainings] for s in record.variants}


@pytest.mark.exact_bits
def test_variants_train_as_separate_runs_without_the_held_out_part(
    home: Path, tiny: Config
) -> None:
    record = run_comparison(tiny, seeds=2)
    assert list(results(record)) == ["learning_rate=1e-2", "learning_rate=1e-3"]
    for variant, rate in zip(record.variants, (1e-2, 1e-3), strict=True):
        for training, seed in zip(variant.trainings, (7, 8), strict=True):
            assert training.seed == seed
            run = runs.open_run(home / "runs" / "compare" / "trainings" / training.key)
            assert (run.config.optim.learning_rate, run.config.train.seed) == (rate, seed)
            assert run.config.train.max_steps == 12
            assert training.curve is not None
            assert training.curve.steps[-1] == 12
            assert training.bits_per_byte == training.curve.final_bits_per_byte
    # With the usual training loop on the same data.
    data = hold_out_from_train(api.prepare("words.txt"))
    config = setup.fit_to_data(override_config(tiny, {"dropout": 0.0, "dtype": "float32"}), data)
    config = override_config(config, {"sample_tokens": 0})
    job = TrainJob(config, data, home / "alone", None, setup.NO_ESTIMATE)
    loop.run_training_loop(
        setup.check_and_estimate(job, LOCAL_GROUP, CompareRecorder()),
        LOCAL_GROUP,
        CompareRecorder(),
    )
    last = list(runs.open_run(home / "alone").metrics())[-1]
    assert last["val_bits_per_byte"] == record.variants[0].trainings[0].bits_per_byte


def test_runs_alternate_between_variants_and_are_reused(tiny: Config, notes: list[str]) -> None:
    first = CompareRecorder()
    record = run_comparison(tiny, first, seeds=3)
    first_name, second_name = results(record)
    assert first.trained == [
        (first_name, 7),
        (second_name, 7),
        (second_name, 8),
        (first_name, 8),
        (first_name, 9),
        (second_name, 9),
    ]
    assert first.counts == [[1, 0], [1, 1], [1, 2], [2, 2], [3, 2], [3, 3]]

    repeated = CompareRecorder()
    notes.clear()
    assert results(run_comparison(tiny, repeated, seeds=3)) == results(record)
    assert repeated.trained == []
    assert notes == [
        f"3 seeds per variant: {first_name} 12 steps, {second_name} 12 steps",
        "reusing runs from runs/compare/trainings",
    ]

    extended = CompareRecorder()
    extended_record = run_comparison(
        tiny, extended, seeds=3, name="other", vary="learning_rate=1e-2,1e-3,1e-4"
    )
    assert [seed for _, seed in extended.trained] == [7, 8, 9], "of the new one alone"
    assert {name: results(extended_record)[name] for name in (first_name, second_name)} == results(
        record
    )


def test_config_files_are_compared_by_name(home: Path, tiny: Config) -> None:
    for name, change in (("plain", {}), ("deep", {"n_layer": 3})):
        config = override_config(tiny, {"dropout": 0.0, **change})
        (home / f"{name}.toml").write_text(config_to_toml(config))
    record = run_comparison(tiny, variants=("plain.toml", "deep.toml"), source="words.txt", seeds=1)
    assert [s.name for s in record.variants] == ["plain", "deep"]
    assert record.variants[1].changes == {"n_layer": (2, 3)}
    assert record.variants[1].parameters > record.variants[0].parameters


def test_tokenizers_are_compared_by_bits_per_byte_of_the_same_text(tiny: Config) -> None:
    """Characters and BPE, on the same bytes except for part of a token."""
    record = run_comparison(tiny, vary="tokenizer=char,bpe", vocab_size=300, seeds=1)
    char, bpe = record.variants
    assert 2 < char.trainings[0].bits_per_byte < 9
    assert 1 < bpe.trainings[0].bits_per_byte < 12
    assert char.changes == {}
    assert bpe.changes == {"tokenizer": ("char", "bpe")}


@pytest.mark.parametrize("budget", ["384tokens", "12steps"])
def test_batch_sizes_have_the_same_budget(tiny: Config, budget: str) -> None:
    record = run_comparison(tiny, vary="batch_size=4,2", budget=budget, seeds=1)
    tokens = {"384tokens": [384, 384], "12steps": [384, 192]}[budget]
    assert [s.tokens for s in record.variants] == tokens
    assert [s.steps for s in record.variants] == [12, 24 if budget.endswith("tokens") else 12]


def test_the_schedule_is_scaled_to_the_budget(home: Path, tiny: Config) -> None:
    """Warmup takes at most a tenth of the steps, and the decay is scaled in proportion."""
    config = override_config(tiny, {"max_steps": 100, "decay_steps": 80, "warmup_steps": 20})
    record = run_comparison(config, budget="30steps", seeds=1)
    key = record.variants[0].trainings[0].key
    run_config = runs.open_run(home / "runs" / "compare" / "trainings" / key).config
    assert run_config.train.max_steps == 30
    assert (run_config.optim.warmup_steps, run_config.optim.decay_steps) == (3, 24)


def test_a_time_budget_is_planned_once_from_alternating_timings(
    home: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of steps follows from the median of three timings, and is kept when resuming."""
    times = iter([0.5, 1.0, 0.4, 1.0, 9.0, 1.0])

    def fake_estimate(config: Config, *_: object) -> Estimate:
        return Estimate(next(times), 0.0, 1000, 0)

    monkeypatch.setattr(setup, "estimate_training", fake_estimate)
    monkeypatch.setattr(planning, "estimate_training", fake_estimate)
    record = run_comparison(tiny, vary="n_layer=1,2", budget="6s", seeds=1)
    assert [s.steps for s in record.variants] == [12, 6]
    assert record.variants[1].changes == {"n_layer": (1, 2)}, "what was asked for"
    repeated = CompareRecorder()
    repeated_record = run_comparison(tiny, repeated, vary="n_layer=1,2", budget="6s", seeds=1)
    assert results(repeated_record) == results(record)
    assert repeated.trained == []
    monkeypatch.setattr(planning, "estimate_training", lambda *_: Estimate(1.0, 0.0, 1000, 0))
    monkeypatch.setattr(setup, "estimate_training", lambda *_: Estimate(1.0, 0.0, 1000, 0))
    replanned = run_comparison(tiny, vary="n_layer=1,2", budget="3s", seeds=1)
    assert [s.steps for s in replanned.variants] == [3, 3], "another time is another plan"


@pytest.mark.exact_bits
def test_resuming_an_interrupted_comparison_gives_the_same_results(
    home: Path, tiny: Config, notes: list[str]
) -> None:
    uninterrupted = run_comparison(tiny, seeds=2, name="whole")
    shutil.rmtree(home / "runs")

    class StoppingRecorder(CompareRecorder):
        def on_log(self, record: dict) -> None:
            if record["step"] == 5 and len(self.trained) == 3:
                signal.raise_signal(signal.SIGINT)

    stopped = run_comparison(tiny, StoppingRecorder(), seeds=2)
    assert stopped.interrupted
    assert [len(s.trainings) for s in stopped.variants] == [1, 1]
    resumed = CompareRecorder()
    record = run_comparison(tiny, resumed, seeds=2)
    assert not record.interrupted
    assert len(resumed.trained) == 2, "what was begun, and what was missing"
    assert any("resuming" in note for note in notes)
    assert results(record) == results(uninterrupted)


def fake_training(
    monkeypatch: pytest.MonkeyPatch, bits_per_byte: Callable[[str, int], float]
) -> None:
    """Replace training by results that are given per variant and seed."""

    def fake_train(
        self: training_runs.TrainingRuns, variant: study.Variant, seed: int, done: int, total: int
    ) -> study.RunResult:
        value = bits_per_byte(variant.name, seed)
        curve = None if math.isinf(value) else training_runs.build_learning_curve(run)
        return study.RunResult(seed, f"{variant.name}-{seed}", value, curve)

    run = runs.open_run(Path("runs/compare/trainings") / next(iter_trainings()))
    monkeypatch.setattr(training_runs.TrainingRuns, "train", fake_train)


def iter_trainings():  # type: ignore[no-untyped-def]
    return (path.name for path in Path("runs/compare/trainings").iterdir() if path.is_dir())


NOISE = [0.01, -0.02, 0.015, -0.005, 0.02, -0.012, 0.001, -0.018, 0.009, 0.0]


def test_seeds_are_added_until_it_is_decided(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clearly worse variant gets no more seeds, a close one and the baseline do."""
    run_comparison(tiny, seeds=1, name="any")

    def bits_per_byte(name: str, seed: int) -> float:
        n = (seed - 7) % 10
        return {
            "dropout=0": 2.0,
            "dropout=0.1": 2.0 + NOISE[n],
            "dropout=0.5": 2.9 + NOISE[-n],
            "dropout=0.9": math.inf,
        }[name]

    fake_training(monkeypatch, bits_per_byte)
    record = run_comparison(
        tiny, vary="dropout=0,0.1,0.5,0.9", until_decided=True, seeds=8, name="decided"
    )
    counts = {s.name: len(s.trainings) for s in record.variants}
    assert counts == {"dropout=0": 8, "dropout=0.1": 8, "dropout=0.5": 3, "dropout=0.9": 1}
    assert [s.verdict for s in record.variants] == ["baseline", "undecided", "worse", "diverged"]
    assert record.level < 0.05 / 3

    small = run_comparison(
        tiny, vary="dropout=0,0.1,0.5", until_decided=True, min_effect=0.2, name="small"
    )
    assert [len(s.trainings) for s in small.variants] == [3, 3, 3]
    assert small.variants[1].verdict == "undecided"


def test_a_diverging_baseline_ends_the_comparison(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_comparison(tiny, seeds=1, name="any")
    fake_training(monkeypatch, lambda name, seed: math.inf if name.endswith("1e-2") else 2.0)
    record = run_comparison(tiny, seeds=3, vary="learning_rate=1e-2,1e-3,1e-4")
    assert [len(s.trainings) for s in record.variants] == [1, 1, 1]
    assert record.variants[0].verdict == "diverged"


def test_a_diverged_run_is_not_retried(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def diverge(job: TrainJob, group: ProcessGroup, callbacks: Callback) -> object:
        rates.append(job.config.optim.learning_rate)
        if rates[-1] == 1e-3:
            raise DivergedError("training has diverged", "use another.")
        return loop.run_training_loop(job, group, callbacks)

    monkeypatch.setattr(training_runs, "run_training_loop", diverge)
    for _ in range(2):
        record = run_comparison(tiny, seeds=2)
        assert [len(s.trainings) for s in record.variants] == [1, 1]
        assert [s.verdict for s in record.variants] == ["baseline", "diverged"]
    assert rates == [1e-2, 1e-3]


def test_evaluations_on_the_validation_text_are_opt_in_and_counted(
    home: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_comparison(tiny, seeds=2)
    assert (record.judged_on, record.final_looks, record.looks) == ("held back", 0, [2])
    for times in (1, 2):
        final = run_comparison(tiny, seeds=2, on_validation=True)
        assert (final.judged_on, final.final_looks) == ("validation", times)
    assert run_comparison(tiny, seeds=2).final_looks == 2, "it stands in the ledger"
    assert run_comparison(tiny, seeds=3).looks == [2, 3]
    # `mlxgpt eval` gives the same result for this run and text.
    variant = final.variants[1]
    folder = home / "runs" / "compare" / "trainings" / variant.trainings[0].key
    data = api.prepare("words.txt")
    loss = api.evaluate(run=str(folder), checkpoint="12", source=write_validation_text(home, data))
    assert variant.trainings[0].bits_per_byte == pytest.approx(loss.bits_per_byte, rel=1e-6)
    assert results(final) != results(record)
    report_names = {path.name for path in (home / "runs" / "compare" / "mine").glob("*.md")}
    assert report_names == {"mine.md", "mine-final.md"}


def write_validation_text(home: Path, data: object) -> str:
    text = data.tokenizer.decode(data.val.ids)  # type: ignore[attr-defined]
    (home / "val.txt").write_text(text, encoding="utf-8")
    return "val.txt"


def test_shared_data_is_opened_once(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening includes hashing, which is slow for large data."""
    run_comparison(tiny, seeds=1)
    requests, original = [], preparation.find_or_prepare

    def counting(request: PrepareRequest, *args: Any) -> Dataset:
        requests.append(request)
        return original(request, *args)

    monkeypatch.setattr(preparation, "find_or_prepare", counting)
    run_comparison(tiny, seeds=1)
    assert len(requests) == 1
    run_comparison(tiny, seeds=1, name="two", vary="tokenizer=char,bpe", vocab_size=300)
    assert len(requests) == 3


def test_a_missing_final_evaluation_is_made_up(home: Path, tiny: Config) -> None:
    """As when the process is killed between the last checkpoint and its evaluation."""
    record = run_comparison(tiny, seeds=1)
    key = record.variants[0].trainings[0].key
    metrics = home / "runs" / "compare" / "trainings" / key / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert '"step": 12,' in lines[-1]
    metrics.write_text("".join(lines[:-1]))
    assert results(run_comparison(tiny, seeds=1)) == results(record)


def test_an_unexpected_run_folder_is_refused(home: Path, tiny: Config) -> None:
    record = run_comparison(tiny, seeds=1)
    first_key, second_key = (s.trainings[0].key for s in record.variants)
    trainings = home / "runs" / "compare" / "trainings"
    shutil.rmtree(trainings / first_key)
    shutil.copytree(trainings / second_key, trainings / first_key)
    with pytest.raises(UserError, match="does not contain the expected run"):
        run_comparison(tiny, seeds=1)


COMMON = {"source": "words.txt", "block_size": 8}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"budget": "5 minutes"}, "not a valid budget"),
        ({"seeds": 0}, "--seeds 0 is too few"),
        ({"seeds": 2, "until_decided": True}, "--seeds 2 is too few"),
        ({"min_effect": 0.005}, "--min-effect 0.005 is not a valid difference"),
        ({"min_effect": -1.0, "until_decided": True}, "--min-effect -1.0 is not a valid"),
        ({"vary": "n_head=2"}, "has no values"),
        ({"vary": "batch_size=4,9999"}, "fewer than one step needs"),
        ({"name": "../x"}, "not a valid folder name"),
        ({"name": "trainings"}, "not a valid folder name"),
        ({"variants": ("tier1",)}, "nothing to compare"),
        ({"vary": "lora_rank=0,4"}, "trains from scratch, without LoRA"),
        ({"variants": ("tier1", "tier1"), **COMMON}, "tier1 and tier1-2 would train identically"),
        ({"variants": ("tier1", "tier2"), "tier": 1}, "--tier and --config require --vary"),
        ({"variants": ("tier1", "tier2"), "vary": "dropout=0,1"}, "files and --vary"),
        ({"source": "nothing.txt"}, "nothing.txt"),
    ],
)
def test_invalid_arguments_are_refused_before_training(
    home: Path, tiny: Config, given: dict, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        run_comparison(tiny, **given)
    assert not list(home.glob("runs/compare/trainings/*"))


def test_the_saved_record_contains_everything_for_a_report(home: Path, tiny: Config) -> None:
    record = run_comparison(tiny, seeds=2)
    folder = home / "runs" / "compare" / "mine"
    assert {path.name for path in folder.iterdir()} >= {"ledger.json", "mine.json", "mine.md"}
    tree = json.loads((folder / "mine.json").read_text())
    for variant_tree, variant in zip(tree["variants"], record.variants, strict=True):
        for training, expected in zip(variant_tree["trainings"], variant.trainings, strict=True):
            assert expected.curve is not None
            assert training["curve"]["bits_per_byte"] == expected.curve.bits_per_byte
            assert len(training["curve"]["seconds"]) == len(expected.curve.tokens) == 4
