"""Models of runs that contain only adapters: fused with their base, which must be the right one."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxgpt
from mlxgpt import api
from mlxgpt.cli import main as cli
from mlxgpt.config import Config, override_config
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage import run as runs
from mlxgpt.storage.loading import load_base_model, load_model
from mlxgpt.training.callbacks import Callback
from mlxgpt.utils.errors import UserError
from tests.helpers.example_rows import write_rows
from tests.helpers.training_runs import (
    MODERN_PARTS,
    copy_fox_run,
    final_state,
    metrics,
    train_fox_model,
)

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"Who is {n}?"},
            {"role": "assistant", "content": f"A fox, {n}."},
        ]
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Path:
    """A folder with a small run with every part of the racing recipe, its data, and examples."""
    folder = tmp_path_factory.mktemp("lora")
    shape = {"block_size": 64, "n_embd": 32, "dropout": 0.0, **MODERN_PARTS}
    train_fox_model(folder, override_config(tiny, shape), stories=400)
    write_rows(folder / "talk.jsonl", *TALKS)
    return folder


@pytest.fixture
def base(trained_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    return copy_fox_run(trained_base, tmp_path, monkeypatch)


def tune(**settings: Any) -> runs.Run:
    defaults: dict[str, Any] = {
        "run": "tuned",
        "init_from": "fox",
        "source": "talk.jsonl",
        "lora_rank": 4,
        "max_steps": 8,
        "eval_interval": 4,
        "log_interval": 1,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "sample_tokens": 5,
    }
    return runs.open_run(api.train(**{**defaults, **settings}).run)


def logits(run: str, **options: Any) -> np.ndarray:
    return mlxgpt.load(run, **options).logits(np.arange(20))


def weights(run: runs.Run) -> dict[str, np.ndarray]:
    model, _ = load_model(run, "newest")
    return {name: np.array(value) for name, value in flatten_params(model.parameters()).items()}


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_of_adapters_contains_nothing_else(base: runs.Run, dora: bool) -> None:
    """And is used like any other: generate, eval, chat, train --init-from."""
    run = tune(dora=dora)
    saved = final_state("tuned")
    kinds = {"lora_a", "lora_b", "new_rows"} | ({"m"} if dora else set())
    assert {name.rpartition(".")[2] for name in saved if "states" not in name} == kinds
    size = sum(path.stat().st_size for path in run.folder.glob("checkpoints/*/model.safetensors"))
    base_size = sum(path.stat().st_size for path in base.folder.glob("checkpoints/*/model.*"))
    assert size < base_size / 2
    before, after = weights(base), weights(run)
    changed = {name for name in before if (before[name] != after[name][: len(before[name])]).any()}
    adapted = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"h.{n}.{name}.weight" for n in (0, 1) for name in adapted}
    rows = base.tokenizer.vocab_size
    mean = before["wte.weight"][:rows].mean(axis=0)
    assert abs(after["wte.weight"][rows:] - mean).max() > 1e-3
    records = [record for record in run.metrics() if "val_loss" in record]
    assert api.evaluate(run="tuned", checkpoint="newest").loss == pytest.approx(
        records[-1]["val_loss"], abs=1e-5
    )
    assert api.generate("Once", run="tuned", max_tokens=4).tokens
    api.train(
        init_from="tuned",
        source="talk.jsonl",
        run="next",
        max_steps=2,
        warmup_steps=0,
        batch_size=2,
    )


def test_without_the_adapter_it_is_the_base(
    base: runs.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune()
    np.testing.assert_array_equal(logits("tuned", adapter=False), logits("fox"))
    assert abs(logits("tuned") - np.pad(logits("fox"), ((0, 0), (0, 2))))[:, :270].max() > 1e-3
    line = ["generate", "--run", "tuned", "--no-adapter", "--interactive", "--max-tokens", "2"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n"))
    assert cli.main(line) == 0
    assert "runs/fox, step 12, without the adapter" in capsys.readouterr().err
    with pytest.raises(UserError, match="--no-adapter uses the base's checkpoint, not 4"):
        mlxgpt.load("tuned", adapter=False, checkpoint="4")
    with pytest.raises(UserError, match="fox has no adapter"):
        mlxgpt.load("fox", adapter=False)


@pytest.mark.exact_bits
def test_resuming_adapters_is_exact(base: runs.Run) -> None:
    class Stop(Callback):
        def on_log(self, record: dict[str, Any]) -> None:
            if record["step"] == 6:
                raise KeyboardInterrupt

    tune(run="whole")
    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[Stop()])
    tune()
    whole, parts = final_state("whole"), final_state("tuned")
    assert all((parts[name] == value).all() for name, value in whole.items())
    assert metrics("whole") == metrics("tuned")
    with pytest.raises(UserError, match="lora_rank 4 → 2"):
        tune(lora_rank=2)


def test_snapshots_are_of_the_adapted_model(base: runs.Run) -> None:
    run = tune(learning_rate=0.0)
    model, _ = load_model(run, "0")
    assert model.wte.weight.shape[0] == run.config.model.vocab_size


def test_adapters_that_change_nothing_are_reported(base: runs.Run, notes: list[str]) -> None:
    tune(learning_rate=0.0, dora=True)
    logits("tuned")
    assert "the adapter of tuned changes nothing" in notes


def test_the_base_must_be_the_one_that_it_was_trained_with(base: runs.Run) -> None:
    run = tune()
    path = base.checkpoint_path()
    other = base.folder.with_name("away")
    base.folder.rename(other)
    with pytest.raises(UserError, match="contains only an adapter; the model it belongs to, 'fox'"):
        logits("tuned")
    other.rename(base.folder)
    (path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="is not the model that the adapter of tuned was trained"):
        load_base_model(run)
    shutil.rmtree(path)
    with pytest.raises(UserError, match="is not the model that the adapter of tuned was trained"):
        load_base_model(run)


def test_adapters_of_an_adapted_model(base: runs.Run) -> None:
    tune()
    second = tune(run="second", init_from="tuned")
    opened, _, step = load_base_model(second)
    assert (opened.name, step) == ("tuned", 8)
    assert abs(logits("second") - logits("tuned")).max() > 1e-3
    # A run.json that was changed by hand, so that two runs are each other's base.
    file = Path("runs/tuned/run.json")
    text = file.read_text().replace('"run": "fox"', '"run": "second"')
    file.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}))
    with pytest.raises(UserError):
        logits("second")


def test_lora_needs_a_base_in_the_same_folder(base: runs.Run, tiny: Config) -> None:
    with pytest.raises(UserError, match="trains adapters of a trained model") as caught:
        api.train(config=tiny, source="talk.jsonl", lora_rank=4)
    assert "--init-from RUN" in caught.value.remedy
    with pytest.raises(UserError, match="fox is not in") as caught:
        tune(runs_dir="other", init_from="runs/fox")
    assert "--runs-dir" in caught.value.remedy
    with pytest.raises(UserError, match="lora_layers = 3 exceeds n_layer = 2"):
        tune(lora_layers=3)
    with pytest.raises(UserError, match="dora = true needs a lora_rank"):
        tune(lora_rank=0, dora=True)
