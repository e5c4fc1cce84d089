"""`python benchmarks/compare_losses.py`, with mlxgpt's own trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compare_losses
import pytest
from baselines import trainers

from mlxgpt import api
from mlxgpt.config import Config, toml
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import Capture

SETTINGS: dict[str, Any] = {"n_layer": 1, "n_embd": 64, "n_head": 1, "block_size": 256}


@pytest.fixture
def data(home: Path) -> Path:
    text = home / "numbers.txt"
    text.write_text(" ".join(map(str, range(3000))), encoding="utf-8")
    return api.prepare(str(text), tokenizer="char", name="numbers").folder


def compare(data: Path, results: Path, *args: str) -> dict[str, Any]:
    options = ["--shape", "1x64", "--steps", "4", "--results", str(results)]
    compare_losses.main([str(data), *args, *options])
    return json.loads(results.read_text(encoding="utf-8").splitlines()[-1])


def test_mlxgpt_reaches_the_loss_of_a_run(
    home: Path, data: Path, no_check: None, capsys: Capture
) -> None:
    result = compare(data, home / "results.jsonl", "mlxgpt", "--config", "tier1-racing")
    summary = api.train(
        config="tier1-racing", source=str(data), seed=1, max_steps=4, batch_size=8, **SETTINGS
    )
    expected = api.evaluate(run=str(summary.run), checkpoint="newest")
    assert result["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-4)
    assert result["tokens"] == 4 * 8 * 256
    capsys.readouterr()
    compare(data, home / "results.jsonl", "mlxgpt", "--config", "tier1-racing")
    assert "already in" in capsys.readouterr().out
    plot = home / "plot.svg"
    compare_losses.main(["--results", str(home / "results.jsonl"), "--plot", str(plot)])
    assert "petaFLOPs" in plot.read_text(encoding="utf-8")
    table = capsys.readouterr().out
    assert f"{result['bits_per_byte']:.4f}" in table
    assert "mlxgpt tier1-racing" in table


def test_a_time_limit_sets_the_steps_and_the_schedule(home: Path, data: Path) -> None:
    config = toml.load_tier_config(1, "racing")
    dataset = compare_losses.open_dataset(data)
    made = []

    class FakeTrainer:
        parameters, flops = 10, 100

        def __init__(self, config: Config) -> None:
            made.append(self)
            self.max_steps = config.train.max_steps
            self.taken: list[int] = []

        def step(self, step: int, inputs: Any, targets: Any) -> None:
            assert inputs.shape == targets.shape == (8, 256)
            self.taken.append(step)

        def losses(self, inputs: Any, targets: Any) -> Any:
            return 0.0 * targets

    result = compare_losses._train_and_evaluate(FakeTrainer, config, dataset, minutes=1e-4)
    timed, trained = made
    assert timed.taken == list(range(2 * compare_losses.TIMED_STEPS))
    assert trained.taken == list(range(trained.max_steps))
    assert result["tokens"] == trained.max_steps * config.tokens_per_step
    assert result["bits_per_byte"] == 0


def test_a_script_is_executed_up_to_a_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("from unknown_data import Loader\nRATE = 2\nSTART = 1\nraise SystemExit(1)\n")
    names = trainers._load_source(
        script, before="\nSTART = 1", modules={"unknown_data": ("Loader",)}
    )
    assert (names["RATE"], names["Loader"]) == (2, None)
    with pytest.raises(UserError, match="has no line 'OTHER = 1'"):
        trainers._load_source(script, before="\nOTHER = 1", modules={})


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["mlxgpt", "--shape", "wide"], "--shape wide is not a valid shape"),
        (["mlxgpt", "--config", "nowhere.toml"], "nowhere.toml"),
        (["nanochat"], "None is not a folder"),
        (["parameter-golf", "--code", "."], "cannot load parameter-golf"),
    ],
)
def test_invalid_arguments_are_two_lines(
    data: Path, capsys: Capture, args: list[str], problem: str
) -> None:
    assert compare_losses.main([str(data), *args]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 2
    assert compare_losses.main([str(data / "missing"), "mlxgpt"]) == 2
