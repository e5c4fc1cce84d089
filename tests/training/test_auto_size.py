from __future__ import annotations

from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.backend import device
from mlxgpt.config import Config, ModelConfig, override_config
from mlxgpt.data.dataset import Dataset, open_dataset
from mlxgpt.model.stats import count_parameters, flops_per_token
from mlxgpt.storage.run import open_run
from mlxgpt.training import auto_size
from mlxgpt.training.auto_size import (
    HEAD_SIZE,
    MODEL_SIZES,
    TOKENS_PER_PARAMETER,
    choose_model_size,
)
from mlxgpt.training.estimate import Estimate, estimate_memory_bytes
from mlxgpt.utils.errors import UserError

BASE = override_config(
    Config(ModelConfig(block_size=256, vocab_size=2048, dropout=0.0)),
    {"batch_size": 4, "eval_interval": 100},
)


@pytest.fixture
def dataset(trained: Path) -> Dataset:
    return open_dataset(trained / "data" / "words")


def machine(monkeypatch: pytest.MonkeyPatch, flops: float, waits: float = 0.0) -> None:
    """One of so many operations a second, where no step takes less than `waits`."""

    def measure(config: Config, dataset: Dataset) -> Estimate:
        tokens = config.train.batch_size * config.model.block_size
        seconds = max(waits, tokens * flops_per_token(config.model) / flops)
        return Estimate(seconds, seconds / tokens / 3, 10**6, 100_000)

    monkeypatch.setattr(auto_size, "estimate_training", measure)


def tokens_in(config: Config, flops: float, seconds: float) -> float:
    return seconds * flops / flops_per_token(config.model)


@pytest.mark.parametrize("minutes", [2, 5, 20, 120])
def test_it_is_the_largest_that_sees_enough_of_the_text(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset, notes: list[str], minutes: float
) -> None:
    machine(monkeypatch, 1e11)
    found = choose_model_size(BASE, dataset, 60 * minutes)
    m = found.model
    assert m.n_embd == HEAD_SIZE * m.n_head
    assert m.vocab_size == dataset.meta.vocab_size
    rest = {"n_embd": m.n_embd, "n_head": m.n_head, "n_layer": m.n_layer}
    assert override_config(BASE, {**rest, "vocab_size": m.vocab_size}).model == m, (
        "all else is kept"
    )

    def seen(config: Config) -> float:
        return tokens_in(config, 1e11, 60 * minutes) / count_parameters(config.model)

    enough = TOKENS_PER_PARAMETER / 2  # since these are a few words, a thousand times
    assert seen(found) > enough
    larger = override_config(
        found,
        auto_size._shape_overrides(*MODEL_SIZES[MODEL_SIZES.index((m.n_layer, m.n_embd)) + 1]),
    )
    assert 0.8 * seen(larger) < enough, "but for evaluations it would not"
    _, chosen, memorized = notes
    assert f"{m.n_layer} layers of width {m.n_embd}" in chosen
    assert f"{count_parameters(m):,} parameters" in chosen
    assert "beyond about 5 epochs" in memorized
    monkeypatch.setattr(auto_size, "OVERFIT_EPOCHS", 1e9)
    choose_model_size(BASE, dataset, 60 * minutes)
    assert notes[-1] == chosen
    # Of new text each parameter needs twice as many tokens.
    monkeypatch.setattr(auto_size, "MAX_EFFECTIVE_EPOCHS", 1e9)
    of_new_text = choose_model_size(BASE, dataset, 60 * minutes)
    assert seen(of_new_text) > TOKENS_PER_PARAMETER or of_new_text.model.n_embd == MODEL_SIZES[0][1]
    assert count_parameters(of_new_text.model) <= count_parameters(m)


def test_more_time_and_a_faster_machine_buy_a_larger_model(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    def width(flops: float, seconds: float) -> int:
        machine(monkeypatch, flops)
        return choose_model_size(BASE, dataset, seconds).model.n_embd

    widths = [width(1e11, 60 * minutes) for minutes in (1, 5, 30, 300)]
    assert widths == sorted(set(widths))
    assert width(2e12, 300) > width(1e11, 300)
    assert width(1e6, 1) == MODEL_SIZES[0][1], "the smallest, where there is time for none"


@pytest.mark.parametrize(("waits", "batch"), [(0.0, 8), (0.02, 32)])
def test_batches_are_as_small_as_cost_nothing(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset, waits: float, batch: int
) -> None:
    """A device that takes as long for one sequence as for many gets many."""
    small = override_config(
        BASE, {**auto_size._shape_overrides(*MODEL_SIZES[0]), "vocab_size": dataset.meta.vocab_size}
    )
    each = 256 * flops_per_token(small.model)
    machine(monkeypatch, 32 * each / 0.02, waits)
    assert choose_model_size(BASE, dataset, 300).train.batch_size == batch


def test_a_curve_has_ten_points(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    machine(monkeypatch, 1e11)
    for minutes in (1, 5, 60):
        found = choose_model_size(BASE, dataset, 60 * minutes)
        tokens = 8 * 256 * found.train.eval_interval
        assert round(tokens_in(found, 1e11, 60 * minutes) / tokens) == 10


def test_what_has_no_memory_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    machine(monkeypatch, 1e15)
    monkeypatch.setattr(device, "free_memory_bytes", lambda: 10**9)
    found = choose_model_size(BASE, dataset, 3600)
    assert estimate_memory_bytes(found) <= 10**9
    monkeypatch.setattr(device, "free_memory_bytes", lambda: 10)
    with pytest.raises(UserError, match="this training takes"):
        choose_model_size(BASE, dataset, 3600)


def test_a_run_of_a_chosen_size_is_resumed_at_that_size(
    home: Path, text_file: Path, no_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_size, "MODEL_SIZES", ((2, 64), (2, 128)))
    monkeypatch.setattr(auto_size, "MIN_STEP_TOKENS", 8)
    monkeypatch.setattr(auto_size, "MAX_STEP_TOKENS", 8)
    small = {"block_size": 8, "sample_tokens": 0}

    def width(enough: float) -> int:
        """Of a training in which each parameter has to see as many tokens."""
        monkeypatch.setattr(auto_size, "TOKENS_PER_PARAMETER", enough)
        given = {"recipe": "modern", "max_minutes": 0.05, "source": text_file, **small}
        summary = api.train(**given)  # type: ignore[arg-type]
        assert summary.run.name == "modern-0.05min-words-bpe2048"
        assert summary.step == summary.steps
        return open_run(summary.run).config.model.n_embd

    assert width(1e-9) == 128
    assert width(1e9) == 128, "of the run that is there"


def test_a_size_is_chosen_or_given(text_file: Path) -> None:
    with pytest.raises(UserError, match="n_layer is given, and would be chosen") as caught:
        api.train(recipe="modern", max_minutes=2, source=text_file, n_layer=3)
    assert "--tier 2" in caught.value.remedy
