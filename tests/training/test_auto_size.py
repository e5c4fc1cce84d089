from __future__ import annotations

import logging
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

BASE_CONFIG = override_config(
    Config(ModelConfig(block_size=256, vocab_size=2048, dropout=0.0)),
    {"batch_size": 4, "eval_interval": 100},
)


@pytest.fixture
def dataset(trained: Path) -> Dataset:
    return open_dataset(trained / "data" / "words")


def simulate_machine(
    monkeypatch: pytest.MonkeyPatch, flops: float, min_step_seconds: float = 0.0
) -> None:
    """Simulate a machine with this many FLOPs per second and a minimum time per step."""

    def estimate(config: Config, dataset: Dataset) -> Estimate:
        tokens = config.train.batch_size * config.model.block_size
        seconds = max(min_step_seconds, tokens * flops_per_token(config.model) / flops)
        return Estimate(seconds, seconds / tokens / 3, 10**6, 100_000)

    monkeypatch.setattr(auto_size, "estimate_training", estimate)


def tokens_within(config: Config, flops: float, seconds: float) -> float:
    return seconds * flops / flops_per_token(config.model)


@pytest.mark.parametrize("minutes", [2, 5, 20, 120])
def test_the_largest_model_with_enough_tokens_is_chosen(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset, notes: list[str], minutes: float
) -> None:
    simulate_machine(monkeypatch, 1e11)
    chosen_config = choose_model_size(BASE_CONFIG, dataset, 60 * minutes)
    chosen_model = chosen_config.model
    assert chosen_model.n_embd == HEAD_SIZE * chosen_model.n_head
    assert chosen_model.vocab_size == dataset.meta.vocab_size
    shape = {
        "n_embd": chosen_model.n_embd,
        "n_head": chosen_model.n_head,
        "n_layer": chosen_model.n_layer,
    }
    assert (
        override_config(BASE_CONFIG, {**shape, "vocab_size": chosen_model.vocab_size}).model
        == chosen_model
    ), "all else is kept"

    def tokens_per_parameter(config: Config) -> float:
        return tokens_within(config, 1e11, 60 * minutes) / count_parameters(config.model)

    required = TOKENS_PER_PARAMETER / 2  # halved, since the short text is repeated many times
    assert tokens_per_parameter(chosen_config) > required
    larger = override_config(
        chosen_config,
        auto_size.shape_overrides(
            *MODEL_SIZES[MODEL_SIZES.index((chosen_model.n_layer, chosen_model.n_embd)) + 1]
        ),
    )
    assert 0.8 * tokens_per_parameter(larger) < required, "but for evaluations it would not"
    _, size_line, overfit_line = notes
    assert f"{chosen_model.n_layer} layers, n_embd {chosen_model.n_embd}" in size_line
    assert f"{count_parameters(chosen_model):,} parameters" in size_line
    assert "more than about 5 epochs" in overfit_line
    monkeypatch.setattr(auto_size, "OVERFIT_EPOCHS", 1e9)
    choose_model_size(BASE_CONFIG, dataset, 60 * minutes)
    assert notes[-1] == size_line
    # With enough new text, each parameter needs twice as many tokens.
    monkeypatch.setattr(auto_size, "MAX_EFFECTIVE_EPOCHS", 1e9)
    new_text_config = choose_model_size(BASE_CONFIG, dataset, 60 * minutes)
    assert (
        tokens_per_parameter(new_text_config) > TOKENS_PER_PARAMETER
        or new_text_config.model.n_embd == MODEL_SIZES[0][1]
    )
    assert count_parameters(new_text_config.model) <= count_parameters(chosen_model)


def test_more_time_or_a_faster_machine_give_a_larger_model(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    def width(flops: float, seconds: float) -> int:
        simulate_machine(monkeypatch, flops)
        return choose_model_size(BASE_CONFIG, dataset, seconds).model.n_embd

    widths = [width(1e11, 60 * minutes) for minutes in (1, 5, 30, 300)]
    assert widths == sorted(set(widths))
    assert width(2e12, 300) > width(1e11, 300)
    assert width(1e6, 1) == MODEL_SIZES[0][1], "the smallest, where there is time for none"


@pytest.mark.parametrize(("waits", "batch"), [(0.0, 8), (0.02, 32)])
def test_the_smallest_batch_without_loss_of_speed_is_chosen(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset, waits: float, batch: int
) -> None:
    """A device that needs the same time for one or many sequences gets a large batch."""
    smallest = override_config(
        BASE_CONFIG,
        {**auto_size.shape_overrides(*MODEL_SIZES[0]), "vocab_size": dataset.meta.vocab_size},
    )
    sequence_flops = 256 * flops_per_token(smallest.model)
    simulate_machine(monkeypatch, 32 * sequence_flops / 0.02, waits)
    assert choose_model_size(BASE_CONFIG, dataset, 300).train.batch_size == batch


def test_a_run_has_ten_evaluations(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    simulate_machine(monkeypatch, 1e11)
    for minutes in (1, 5, 60):
        config = choose_model_size(BASE_CONFIG, dataset, 60 * minutes)
        tokens = 8 * 256 * config.train.eval_interval
        assert round(tokens_within(config, 1e11, 60 * minutes) / tokens) == 10


def test_models_that_do_not_fit_into_memory_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    simulate_machine(monkeypatch, 1e15)
    monkeypatch.setattr(device, "free_memory_bytes", lambda: 10**9)
    config = choose_model_size(BASE_CONFIG, dataset, 3600)
    assert estimate_memory_bytes(config) <= 10**9
    monkeypatch.setattr(device, "free_memory_bytes", lambda: 10)
    with pytest.raises(UserError, match="training needs"):
        choose_model_size(BASE_CONFIG, dataset, 3600)


def test_resuming_keeps_the_chosen_size(
    home: Path, text_file: Path, no_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_size, "MODEL_SIZES", ((2, 64), (2, 128)))
    monkeypatch.setattr(auto_size, "MIN_STEP_TOKENS", 8)
    monkeypatch.setattr(auto_size, "MAX_STEP_TOKENS", 8)
    small_settings = {"block_size": 8, "sample_tokens": 0}

    def train_and_get_width(tokens_per_parameter: float) -> int:
        """Train with this TOKENS_PER_PARAMETER; return the model's width."""
        monkeypatch.setattr(auto_size, "TOKENS_PER_PARAMETER", tokens_per_parameter)
        options = {"recipe": "modern", "max_minutes": 0.05, "source": text_file, **small_settings}
        summary = api.train(**options)  # type: ignore[arg-type]
        assert summary.run.name == "modern-0.05min-words-bpe2048"
        assert summary.step == summary.steps
        return open_run(summary.run).config.model.n_embd

    assert train_and_get_width(1e-9) == 128
    assert train_and_get_width(1e9) == 128, "of the run that is there"


@pytest.mark.parametrize("recipe", [None, "racing", "modern"])
def test_racing_is_the_recipe_for_a_time_budget_without_a_tier(
    home: Path,
    text_file: Path,
    no_check: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recipe: str | None,
) -> None:
    monkeypatch.setattr(auto_size, "MODEL_SIZES", ((2, 64),))
    monkeypatch.setattr(auto_size, "MIN_STEP_TOKENS", 8)
    monkeypatch.setattr(auto_size, "MAX_STEP_TOKENS", 8)
    caplog.set_level(logging.INFO)
    options = {"max_minutes": 0.02, "source": text_file, "block_size": 8, "sample_tokens": 0}
    summary = api.train(recipe=recipe, **options)  # type: ignore[arg-type]
    is_racing = recipe != "modern"
    assert summary.run.name.startswith("racing-" if is_racing else "modern-")
    assert open_run(summary.run).config.model.token_shift == is_racing
    assert ("only mlxgpt runs the model" in caplog.text) == is_racing


def test_no_size_is_chosen_for_the_classic_recipe(text_file: Path) -> None:
    with pytest.raises(UserError, match="does not choose a model size") as excinfo:
        api.train(recipe="classic", max_minutes=2, source=text_file)
    assert "--tier 1 or --tier 2" in excinfo.value.remedy


def test_size_settings_conflict_with_a_time_budget(text_file: Path) -> None:
    with pytest.raises(UserError, match="n_layer is set, but --max-minutes") as excinfo:
        api.train(recipe="modern", max_minutes=2, source=text_file, n_layer=3)
    assert "--tier 2" in excinfo.value.remedy
