from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mlxgpt.backend import device
from mlxgpt.config import Config, override_config, toml
from mlxgpt.data.dataset import open_dataset
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.stats import min_training_bytes
from mlxgpt.training import estimate
from mlxgpt.training.estimate import (
    Estimate,
    check_memory_limit,
    check_model_memory,
    estimate_memory_bytes,
    estimate_training,
    find_reference_result,
)
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT


def test_estimate_training(trained: Path, tiny_model: Config) -> None:
    dataset = open_dataset(trained / "data" / "words")
    config = override_config(
        tiny_model, {"vocab_size": dataset.meta.vocab_size, "max_steps": 100, "eval_interval": 30}
    )
    result = estimate_training(config, dataset)
    assert result.step_seconds > 0
    assert result.eval_token_seconds > 0
    assert result.val_tokens == len(dataset.val.ids)
    assert 10e6 < result.peak_bytes < 10e9
    assert (result.steps, result.evaluations) == (100, 4), "after 30, 60, 90 and at the end"
    assert result.reference is None
    assert result.evaluated_tokens == 4 * result.val_tokens, "it is short: all of it each time"
    expected = 100 * result.step_seconds + result.evaluated_tokens * result.eval_token_seconds
    assert result.seconds == pytest.approx(expected)


@pytest.mark.parametrize("known", [None, 0.5])
def test_only_a_few_of_many_micro_batches_are_timed(
    trained: Path, tiny_model: Config, monkeypatch: pytest.MonkeyPatch, known: float | None
) -> None:
    """With a fake clock: a micro-batch takes 3 s, an update 1 s and compilation 2 s."""
    dataset = open_dataset(trained / "data" / "words")
    config = override_config(
        tiny_model, {"vocab_size": 23, "gradient_accumulation_steps": 40, "batch_size": 2}
    )
    now, micro_batches_run = 0.0, 0

    def take_steps(step_function: object, tokens: object, config: Config, steps: int) -> None:
        nonlocal now, micro_batches_run
        micro_batches = steps * config.train.gradient_accumulation_steps
        now += 3 * micro_batches + steps + 2 * (micro_batches_run == 0)
        micro_batches_run += micro_batches

    monkeypatch.setattr(estimate, "take_steps", take_steps)
    monkeypatch.setattr(estimate.time, "monotonic", lambda: now)
    monkeypatch.setattr(estimate, "_time_eval_token", lambda *_: 1.0)
    result = estimate_training(config, dataset, known)
    if known:
        assert result.step_seconds == known
        assert micro_batches_run == 2
    else:
        assert result.step_seconds == pytest.approx(40 * 3 + 1)
        assert micro_batches_run == 5
    assert result.eval_token_seconds == (1.0 if not known else 0.5 / config.tokens_per_step / 3)


@pytest.mark.parametrize(
    ("start", "steps", "every", "evaluations"),
    [(0, 100, 50, 2), (0, 100, 30, 4), (50, 100, 50, 1), (60, 100, 30, 2), (100, 100, 50, 0)],
)
def test_estimate_of_the_remaining_steps(
    tiny: Config, start: int, steps: int, every: int, evaluations: int
) -> None:
    config = override_config(tiny, {"max_steps": steps, "eval_interval": every})
    remaining = Estimate(1.0, 1.0, 0, 0).for_plan(config, start)
    assert remaining.steps == steps - start
    assert remaining.evaluations == sum(
        step % every == 0 or step == steps for step in range(start + 1, steps + 1)
    )
    assert remaining.evaluations == evaluations


@pytest.mark.parametrize("seconds", [20.0, 61.0, 600.0])
@pytest.mark.parametrize("val_tokens", [1000, 50_000, 10_000_000])
def test_steps_within_a_time_budget(tiny: Config, seconds: float, val_tokens: int) -> None:
    step_estimate = Estimate(0.25, 1e-3, 0, val_tokens)
    config = override_config(tiny, {"eval_interval": 50, "block_size": 64, "batch_size": 64})
    steps = step_estimate.steps_within(seconds, config)

    def seconds_for(steps: int) -> float:
        return step_estimate.for_plan(override_config(config, {"max_steps": steps})).seconds

    assert seconds_for(steps) <= seconds < seconds_for(steps + 1)
    assert step_estimate.steps_within(0.1, config) == 0, "not even one"


def test_the_suggested_settings_fit_into_memory(tiny_model: Config) -> None:
    """By the same estimate; a smaller batch is suggested first, then a smaller model."""
    config = override_config(tiny_model, {"batch_size": 64, "block_size": 128})
    required = estimate_memory_bytes(config)
    limit = required // 3
    with pytest.raises(UserError, match="training needs") as excinfo:
        check_memory_limit(config, required, limit)
    words = excinfo.value.remedy.split()
    batch, accumulation = int(words[2]), int(words[4].rstrip(","))
    assert batch * accumulation == 64, "the same effective batch size"
    assert estimate_memory_bytes(override_config(config, {"batch_size": batch})) <= limit
    check_memory_limit(config, required, required)
    single_sequence = override_config(
        config, {"batch_size": 1, "gradient_checkpointing": True, "n_layer": 6}
    )
    with pytest.raises(UserError) as excinfo:
        check_memory_limit(
            single_sequence,
            estimate_memory_bytes(single_sequence),
            min_training_bytes(single_sequence),
        )
    layers = int(excinfo.value.remedy.rpartition(" ")[2].rstrip("."))
    assert 1 <= layers < 6
    with pytest.raises(UserError) as excinfo:
        check_memory_limit(config, required, min_training_bytes(config) + 1)
    assert "--gradient-checkpointing" in excinfo.value.remedy


def test_a_model_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = override_config(Config(), {"vocab_size": 50_257})  # GPT-2: 124M parameters, 2 GB
    assert 1.9e9 < min_training_bytes(model) < 2.1e9
    assert 1e8 < device.total_memory_bytes() < 1e15
    check_model_memory(model)
    monkeypatch.setattr(device, "total_memory_bytes", lambda: int(1.9e9))
    with pytest.raises(
        UserError, match=r"needs at least 2.0 GB of memory, but this machine has 1.9"
    ):
        check_model_memory(model)


def test_the_memory_estimate_grows_with_all_sizes(tiny_model: Config) -> None:
    before = estimate_memory_bytes(tiny_model)
    for change in ({"batch_size": 8}, {"n_layer": 4}, {"block_size": 16}, {"vocab_size": 999}):
        assert estimate_memory_bytes(override_config(tiny_model, change)) > before
    checkpointed = estimate_memory_bytes(
        override_config(tiny_model, {"gradient_checkpointing": True})
    )
    assert min_training_bytes(tiny_model) < checkpointed < before


def test_reference_results_match_model_data_and_optimizer(
    trained: Path, tiny_model: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(trained / "data" / "words")
    model_config = tiny_model.model
    shape = [
        model_config.n_layer,
        model_config.n_head,
        model_config.n_embd,
        model_config.block_size,
        model_config.vocab_size,
    ]
    entry = (
        '[[run]]\nshape = {}\ndata = "{}"\ntokens = 5\nval_loss = {}\n'
        'bits_per_byte = 2.0\nreport = "r.md"\n'
    )
    fingerprint = dataset.meta.fingerprint
    lines = [
        entry.format(shape, fingerprint, 1.6),
        entry.format(shape, fingerprint, 1.5),
        entry.format([*shape[:-1], 1], fingerprint, 1.0),
        entry.format(shape, "other", 0.5),
    ]
    (tmp_path / "reference_results.toml").write_text("\n".join(lines))
    monkeypatch.setattr(estimate, "__file__", str(tmp_path / "estimate.py"))
    result = find_reference_result(tiny_model, dataset)
    assert result is not None
    assert result.val_loss == 1.5
    assert find_reference_result(override_config(tiny_model, {"n_layer": 3}), dataset) is None
    muon_config = override_config(tiny_model, {"optimizer": "muon"})
    assert find_reference_result(muon_config, dataset) is None
    lines.append(entry.format(shape, fingerprint, 1.2) + 'optimizer = "muon"\n')
    (tmp_path / "reference_results.toml").write_text("\n".join(lines))
    results = [find_reference_result(config, dataset) for config in (tiny_model, muon_config)]
    assert [reference and reference.val_loss for reference in results] == [1.5, 1.2]


def test_every_reference_result_is_in_its_report() -> None:
    tree = tomllib.loads(
        (ROOT / "mlxgpt" / "training" / "reference_results.toml").read_text(encoding="utf-8")
    )
    for run in tree["run"]:
        report = (ROOT / run["report"]).read_text(encoding="utf-8")
        assert f"{run['val_loss']:.4f}" in report
        assert f"{run['bits_per_byte']:.3f}" in report


def test_parameter_counts_of_the_builtin_configs() -> None:
    from mlxgpt.model.stats import count_parameters

    gpt2 = toml.load_config(toml.find_builtin_configs()["gpt2-124m"])
    assert count_parameters(gpt2.model) == 124_439_808  # transformers' GPT2Model, tied
    gpt1 = toml.load_config(toml.find_builtin_configs()["gpt1-117m"])
    assert count_parameters(gpt1.model) == 116_534_784 + 2 * 768  # plus the final layer norm
    tier2 = toml.load_tier_config(2)
    assert 10e6 < count_parameters(tier2.model) < 30e6
    small = override_config(tier2, {"n_layer": 1, "n_embd": 48, "n_head": 1})
    assert count_parameters(small.model) == sum(
        value.size for value in flatten_params(GPT(small.model).parameters()).values()
    )
