"""DPO: training on preference pairs, with the initial weights as reference."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxgpt
from mlxgpt import api
from mlxgpt.cli.main import main
from mlxgpt.config import Config, override_config
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.example_array import PairArray
from mlxgpt.storage import run as runs
from mlxgpt.training import reference
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.finetune import load_init_weights
from mlxgpt.training.reference import add_reference
from mlxgpt.utils.errors import UserError
from tests.helpers.example_rows import write_rows
from tests.helpers.training_runs import (
    Recorder,
    copy_fox_run,
    final_state,
    metrics,
    train_fox_model,
)

PAIRS = [
    {"prompt": f"{'so ' * (n % 5)}{n} is", "chosen": f" a fox {n}.", "rejected": " a big dog" * 2}
    for n in range(30)
]
CHATS = [
    {
        name: [{"role": role, "content": row[name]}]
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }
    for row in PAIRS
]


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Path:
    """A folder with a small run, its data, and files of pairs."""
    folder = tmp_path_factory.mktemp("dpo")
    train_fox_model(folder, override_config(tiny, {"block_size": 64, "dropout": 0.0}), stories=400)
    write_rows(folder / "pairs.jsonl", *PAIRS)
    write_rows(folder / "chats.jsonl", *CHATS)
    return folder


@pytest.fixture
def base(trained_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    return copy_fox_run(trained_base, tmp_path, monkeypatch)


def tune(source: str = "pairs.jsonl", **settings: Any) -> runs.Run:
    defaults: dict[str, Any] = {
        "init_from": "fox",
        "run": "tuned",
        "max_steps": 8,
        "eval_interval": 4,
        "log_interval": 1,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "sample_tokens": 5,
    }
    return runs.open_run(api.train(source=source, **{**defaults, **settings}).run)


def answer_logprob(model: mlxgpt.LoadedModel, ids: np.ndarray, trained: np.ndarray) -> float:
    logits = model.logits(ids[:-1]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(logprobs[np.arange(len(trained)), ids[1:]][trained].sum())


@pytest.mark.parametrize(
    "options",
    [{}, {"source": "chats.jsonl"}, {"lora_rank": 4, "learning_rate": 1e-2}],
    ids=["strings", "messages", "lora"],
)
def test_the_loss_starts_at_ln_2_and_the_chosen_answers_win(
    base: runs.Run, options: dict[str, Any]
) -> None:
    run = tune(max_steps=40, **options)
    records = list(run.metrics())
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = records[-1]
    assert last["val_loss"] < 0.5
    assert last["val_accuracy"] == 1.0
    assert last["val_margin"] > 0.5
    assert last["val_kl"] > 0.001
    assert run.config.train.beta == 0.1
    assert run.config.loss_unit == "nats per pair"


def test_the_metrics_are_those_of_the_logits(base: runs.Run) -> None:
    run = tune(beta=0.3)
    tuned, origin = (mlxgpt.load(name, checkpoint="newest") for name in ("tuned", "fox"))
    assert run.data_name
    val = open_dataset(Path("data") / run.data_name).val
    assert isinstance(val, PairArray)
    rewards, divergences = [], []
    for n in range(len(val)):
        ids, trained = val.example(n)
        rewards.append(
            0.3 * (answer_logprob(tuned, ids, trained) - answer_logprob(origin, ids, trained))
        )
        logits = [m.logits(ids[:-1]).astype(np.float64)[trained] for m in (tuned, origin)]
        p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in logits)
        divergences += (p * np.log(p / q)).sum(axis=-1).tolist()
    margins = np.array(rewards[0::2]) - np.array(rewards[1::2])
    record = list(run.metrics())[-1]
    assert record["val_margin"] == pytest.approx(margins.mean(), abs=1e-4)
    assert record["val_accuracy"] == pytest.approx((margins > 0).mean())
    assert record["val_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-4)
    assert record["val_kl"] == pytest.approx(np.mean(divergences), rel=1e-3)


@pytest.mark.exact_bits
@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}], ids=["all weights", "lora"])
def test_a_resumed_run_has_the_same_bits(base: runs.Run, options: dict[str, Any]) -> None:
    class Stop(Callback):
        def on_log(self, record: dict[str, Any]) -> None:
            if record["step"] == 6:
                raise KeyboardInterrupt

    tune(run="whole", **options)
    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[Stop()], **options)
    tune(**options)
    whole, parts = final_state("whole"), final_state("tuned")
    assert all((parts[name] == value).all() for name, value in whole.items())
    assert metrics("whole") == metrics("tuned")


def test_micro_batches_do_not_change_the_steps(base: runs.Run) -> None:
    """However pairs are divided among micro-batches and threads."""
    states = []
    for batch_size in (1, 4):
        name = f"by{batch_size}"
        tune(run=name, batch_size=batch_size, gradient_accumulation_steps=4 // batch_size)
        states.append(final_state(name))
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], atol=2e-5, err_msg=name)


def test_a_zero_gradient_is_reported(base: runs.Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mlxgpt"):
        tune(beta=1e-30)
    lines = [r.getMessage() for r in caplog.records if "gradient of step" in r.getMessage()]
    assert lines == ["the gradient of step 1 is zero: it changed nothing"]


def test_beta_needs_pairs_and_a_model(base: runs.Run, tiny: Config) -> None:
    write_rows(Path("talk.jsonl"), *[{"prompt": "a", "completion": f"b{n}"} for n in range(9)])
    with pytest.raises(UserError, match=r"--beta is for DPO, and talk.jsonl has no"):
        tune("talk.jsonl", beta=0.1)
    with pytest.raises(UserError, match="starts from a trained model, and there is none"):
        api.train(config=tiny, source="pairs.jsonl", beta=0.1)


def test_the_reference_is_computed_once_and_checked(
    base: runs.Run, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_computations() -> int:
        return sum("computing the reference" in line for line in notes)

    tune()
    tune(run="again", beta=1.0)
    assert count_computations() == 1
    (path,) = Path("data").glob("pairs-*/reference-*.bin")
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"abc")
    tune(run="third")
    assert count_computations() == 2
    assert path.read_bytes() == content
    shutil.copytree("runs/tuned", "runs/other")
    tune(run="fourth", init_from="other")
    assert count_computations() == 3
    assert len(list(Path("data").glob("pairs-*/reference-*.bin"))) == 2
    monkeypatch.setattr(reference.files, "write_atomically", _raise_full_disk)
    path.unlink()
    config = override_config(base.config, {"source": ("pairs.jsonl",)})
    dataset = open_dataset(path.parent)
    config, weights = load_init_weights(base, config, {})
    train = add_reference(dataset, config, weights).train
    assert isinstance(train, PairArray)
    assert train.reference is not None
    assert any("cannot store the reference's log-probabilities" in line for line in notes)


def _raise_full_disk(path: Path, content: bytes) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_the_display_and_the_report_show_pairs(
    base: runs.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    command = ["train", "--init-from", "fox", "--source", "pairs.jsonl", "--run", "tuned"]
    assert main([*command, "--max-steps", "4", "--eval-interval", "2"]) == 0
    printed = capsys.readouterr().err
    for text in (
        "27 for training, 3 for validation, 0 answers cut",
        "DPO, beta 0.1, starts at ln 2 = 0.6931 nats per pair",
        "chosen:",
        "rejected:",
        "margin",
        "accuracy",
        "KL",
        "nats per pair (best",
    ):
        assert text in printed
    page = api.report("tuned").read_text()
    assert "KL divergence from the reference" in page
    assert "nats per pair" in page
    assert "mlxgpt train --init-from fox --source pairs.jsonl" in page
    assert not recorder.records


def test_a_tuned_run_is_evaluated_on_chosen_answers_and_its_bases_texts(base: runs.Run) -> None:
    run = tune()
    assert run.data_name
    val = open_dataset(Path("data") / run.data_name).val
    assert isinstance(val, PairArray)
    model, counts, total = mlxgpt.load("tuned"), 0, 0.0
    for n in range(0, len(val), 2):
        ids, trained = val.example(n)
        total -= answer_logprob(model, ids, trained)
        counts += int(trained.sum())
    assert api.evaluate(run="tuned").loss == pytest.approx(total / counts, abs=1e-4)
    assert api.appraise(run="tuned").columns["model"]["ended"] is not None


def test_a_shifted_mask_would_be_noticed(base: runs.Run) -> None:
    """Log-probabilities of all tokens but the last are others: the masks are exact."""
    config = override_config(base.config, {"source": ("pairs.jsonl",)})
    run = tune()
    assert run.data_name
    config, weights = load_init_weights(base, config, {})
    dataset = add_reference(open_dataset(Path("data") / run.data_name), config, weights)
    assert isinstance(dataset.train, PairArray)
    assert dataset.train.reference is not None
    model = mlxgpt.load("fox")
    for n in range(6):
        ids, trained = dataset.train.example(n)
        expected = answer_logprob(model, ids, trained)
        assert dataset.train.reference[n // 2, n % 2] == pytest.approx(expected, abs=1e-3)
        shifted = answer_logprob(model, ids, np.roll(trained, -1))
        assert abs(shifted - expected) > 1e-2
