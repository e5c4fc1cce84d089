"""Fine-tuning on prompts and answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxgpt
from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.data.chat_template import CHATML, IM_END
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.storage import run as runs
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.finetune import load_init_weights
from mlxgpt.training.patience import is_out_of_patience
from mlxgpt.utils.errors import UserError
from tests.helpers.example_rows import write_rows
from tests.helpers.training_runs import (
    MODERN_PARTS,
    Recorder,
    copy_fox_run,
    final_state,
    metrics,
    train_fox_model,
)

BLOCK_SIZE = 64


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALKS = [{"messages": [user(f"Who is {n}?"), assistant(f"A fox, {n}.")]} for n in range(12)]
STRINGS = [{"prompt": f"{n} is", "completion": f" a fox {n}."} for n in range(12)]


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Path:
    """A folder with a small run, its data, and files of examples."""
    folder = tmp_path_factory.mktemp("finetune")
    config = override_config(tiny, {"block_size": BLOCK_SIZE, **MODERN_PARTS})
    train_fox_model(folder, config, stories=400)
    write_rows(folder / "talk.jsonl", *TALKS)
    write_rows(folder / "strings.jsonl", *STRINGS)
    return folder


@pytest.fixture
def base(trained_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    return copy_fox_run(trained_base, tmp_path, monkeypatch)


def tune(source: str, **settings: Any) -> mlxgpt.TrainingSummary:
    defaults: dict[str, Any] = {
        "run": "tuned",
        "max_steps": 6,
        "eval_interval": 3,
        "save_interval": 3,
        "log_interval": 1,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "sample_tokens": 5,
    }
    return api.train(init_from="fox", source=source, **{**defaults, **settings})


def test_special_tokens_get_the_mean_of_all_embeddings(base: runs.Run) -> None:
    config = override_config(base.config, {"source": ("talk.jsonl",)})
    new_config, weights = load_init_weights(base, config, {})
    before = runs.open_run(base.folder).load_first_valid([base.checkpoint_path()]).parameters
    size = base.tokenizer.vocab_size
    assert new_config.model.vocab_size == weights.tokenizer.vocab_size == size + 2
    tables = {"wte.weight", "lm_head.weight", "wve.0.weight"}
    assert tables <= before.keys()
    for name, value in before.items():
        old, new = np.array(value), np.array(weights.parameters[name])
        if name in tables:
            np.testing.assert_array_equal(new[:size], old)
            np.testing.assert_allclose(new[size:], [old.mean(axis=0)] * 2, rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(new, old)
    assert weights.chat_template == CHATML
    assert weights.tokenizer.end_of_text == weights.tokenizer.added_tokens.ids[IM_END]


def test_a_run_on_conversations_keeps_its_template_and_shows_what_it_forgets(
    base: runs.Run,
) -> None:
    recorder = Recorder()
    summary = tune("talk.jsonl", callbacks=[recorder])
    run = runs.open_run(Path("runs/tuned"))
    assert run.chat_template() == CHATML
    assert run.bos is None
    assert summary.try_it == "mlxgpt chat runs/tuned"
    with pytest.raises(UserError, match="contains prompts and answers"):
        api.appraise(run="tuned")
    evaluations = [record for record in recorder.records if "val_loss" in record]
    assert [record["step"] for record in evaluations] == [3, 6]
    assert all(record["base_val_loss"] > 0 for record in evaluations)
    step, text = recorder.samples[0]
    assert step == 3
    assert "val loss on the base model" in api.report("tuned").read_text()
    assert text.startswith("<|im_start|>user\nWho is ")


def test_the_forgetting_loss_is_that_of_the_base_model_before_training(
    base: runs.Run, notes: list[str]
) -> None:
    tune("strings.jsonl", learning_rate=0.0, muon_learning_rate=0.0, weight_decay=0.0)
    expected = api.evaluate(run="fox").loss
    records = list(runs.open_run(Path("runs/tuned")).metrics())
    assert records[-1]["base_val_loss"] == pytest.approx(expected, abs=1e-5)
    assert f"loss on the base model's validation data, before: {expected:.4f}" in notes


def test_without_the_base_models_data_forgetting_is_not_measured(
    base: runs.Run, notes: list[str]
) -> None:
    shutil.rmtree("data")
    tune("strings.jsonl")
    assert any("not measuring what the model forgets" in line for line in notes)
    assert all("base_val_loss" not in r for r in runs.open_run(Path("runs/tuned")).metrics())


@pytest.mark.parametrize("source", ["talk.jsonl", "strings.jsonl"])
def test_validation_counts_only_answers(base: runs.Run, source: str) -> None:
    """The loss of the trained tokens alone, computed from the model's logits."""
    summary = tune(source)
    model = mlxgpt.load("tuned", checkpoint="newest")
    dataset = open_dataset(summary.data)
    losses = []
    for n in range(len(dataset.val)):  # type: ignore[arg-type]
        ids, trained = dataset.val.example(n)  # type: ignore[union-attr]
        logits = model.logits(ids[:-1]).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses += (-log_probs[np.arange(len(trained)), ids[1:]])[trained].tolist()
    assert api.evaluate(run="tuned", checkpoint="newest").loss == pytest.approx(
        np.mean(losses), abs=1e-4
    )
    records = list(runs.open_run(Path("runs/tuned")).metrics())
    assert records[-1]["val_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert records[-1]["val_tokens"] == len(losses)


@pytest.mark.exact_bits
def test_a_resumed_run_on_examples_has_the_same_bits(base: runs.Run) -> None:
    class Stop(Callback):
        def on_log(self, record: dict[str, Any]) -> None:
            if record["step"] == 4:
                raise KeyboardInterrupt

    tune("talk.jsonl", run="whole")
    with pytest.raises(KeyboardInterrupt):
        tune("talk.jsonl", callbacks=[Stop()])
    assert tune("talk.jsonl").resumed
    whole, parts = final_state("whole"), final_state("tuned")
    assert all((parts[name] == value).all() for name, value in whole.items())
    assert metrics("whole") == metrics("tuned")


def test_a_run_ends_when_the_validation_loss_no_longer_improves(base: runs.Run) -> None:
    """And is finished: the same command does not train it further; more patience does."""
    other_answers = [row | {"completion": " zzz!"} for row in STRINGS]
    write_rows(Path("val.jsonl"), *other_answers)
    settings = {"val_source": ["val.jsonl"], "max_steps": 60}
    summary = tune("strings.jsonl", patience=2, **settings)
    losses = [r["val_loss"] for r in runs.open_run(summary.run).metrics() if "val_loss" in r]
    assert summary.step < 60
    assert len(losses) - 1 - int(np.argmin(losses)) == 2
    assert summary.out_of_patience
    assert not summary.interrupted
    assert summary.best_step == 3 * (1 + int(np.argmin(losses)))
    assert tune("strings.jsonl", patience=2, **settings).step == summary.step
    assert tune("strings.jsonl", patience=3, **settings).step == summary.step + 3


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 3.0], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, True),
        ([3.0, None], 1, True),
        ([3.0, 4.0, 5.0], 0, False),
    ],
)
def test_patience(
    base: runs.Run, losses: list[float | None], patience: int, expected: bool
) -> None:
    (base.folder / "metrics.jsonl").unlink()
    for step, loss in enumerate(losses, 1):
        base.log({"step": step, "val_loss": loss})
    config = override_config(base.config, {"patience": patience})
    assert is_out_of_patience(base, config) is expected


def test_conversations_need_roles(tiny: Config, tmp_path: Path) -> None:
    """A character model has no tokens for them."""
    (tmp_path / "abc.txt").write_text(END_OF_TEXT.join(f"abc {n}." for n in range(300)))
    write_rows(tmp_path / "talk.jsonl", *TALKS)
    folders = {"runs_dir": tmp_path / "runs", "data_dir": tmp_path / "data"}
    api.train(config=tiny, source=tmp_path / "abc.txt", run="base", **folders)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one token per character, and none for roles"):
        api.train(init_from="base", source=tmp_path / "talk.jsonl", **folders)  # type: ignore[arg-type]


def test_examples_need_a_model_to_start_from(base: runs.Run, tiny: Config) -> None:
    with pytest.raises(UserError, match="contains prompts and answers, not text") as caught:
        api.train(config=tiny, source="talk.jsonl")
    assert "--init-from RUN" in caught.value.remedy
    tune("talk.jsonl")
    (folder,) = Path("data").glob("talk-*")
    for options in ({"config": tiny}, {"init_from": "fox"}):
        with pytest.raises(UserError, match="prepared for another run"):
            api.train(source=str(folder), run="other", **options)


def test_a_tuned_run_can_be_tuned_further(base: runs.Run) -> None:
    """Its own template and tokens are used."""
    tune("talk.jsonl")
    api.train(init_from="tuned", source="talk.jsonl", run="twice", max_steps=2, eval_interval=2)
    first, second = (runs.open_run(Path("runs") / name) for name in ("tuned", "twice"))
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.chat_template() == CHATML
