from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlxgpt import config as configs
from mlxgpt.config import Config, ModelConfig, TrainConfig, override_config
from mlxgpt.config.fields import iter_fields
from mlxgpt.utils.errors import UserError


def test_field_names_are_unique_and_have_help() -> None:
    names = [name for cls in configs.SECTIONS.values() for name, _, _ in iter_fields(cls)]
    names += [name for name, _, _ in iter_fields(configs.SamplingParams)]
    assert len(names) - len(set(names)) == 1, "only seed, of a run and of a generation"
    for cls in (*configs.SECTIONS.values(), configs.SamplingParams):
        assert all(field.metadata["help"] for _, _, field in iter_fields(cls))


def test_defaults_are_gpt2_small() -> None:
    assert ModelConfig() == ModelConfig(12, 12, 768, 1024, 0, 0.1, True)
    optim = Config().optim
    assert (optim.learning_rate, optim.weight_decay, optim.beta1, optim.beta2) == (
        6e-4,
        0.1,
        0.9,
        0.95,
    )


@pytest.mark.parametrize(
    ("tree", "problem", "remedy"),
    [
        ({"model": {"n_layers": 6}}, "unknown setting 'n_layers'", "n_layer"),
        ({"modle": {}}, "unknown section [modle]", "model"),
        ({"n_layer": 6}, "outside its section", "[model]"),
        ({"optim": {"n_layer": 6}}, "wrong section", "[model]"),
        (
            {"model": {"n_embd": 9, "n_head": 3, "position": "rope"}},
            "needs an even one",
            "n_embd = 12",
        ),
        ({"model": 6}, "is a section", "[model]"),
        ({"model": {"n_layer": 0}}, "n_layer = 0 is too small", "1"),
        ({"model": {"dropout": 1.5}}, "dropout = 1.5 is too large", "0.9"),
        ({"model": {"n_layer": "six"}}, "wrong type", "an integer"),
        ({"model": {"n_layer": 6.5}}, "wrong type", "an integer"),
        ({"model": {"n_layer": True}}, "wrong type", "an integer"),
        ({"model": {"bias": 1}}, "wrong type", "true or false"),
        ({"model": {"n_embd": 100, "n_head": 12}}, "n_embd = 100", "n_embd = 96 or 108"),
        ({"model": {"value_gate": True}}, "value_gate = true needs", "omit value_gate"),
        ({"lora": {"dora": True}}, "dora = true needs a lora_rank", "lora_rank = 8"),
        ({"lora": {"lora_layers": 13}}, "exceeds n_layer = 12", "omit it for all"),
        ({"train": {"dtype": "float16"}}, "dtype = 'float16'", "bfloat16"),
        ({"optim": {"learning_rate": float("nan")}}, "learning_rate = nan", "default"),
        ({"optim": {"learning_rate": float("inf")}}, "learning_rate = inf", "finite"),
        ({"data": {"source": [1]}}, "wrong type", "a string or a list of strings"),
    ],
)
def test_invalid_settings_are_refused_with_the_nearest_valid_value(
    tree: dict[str, Any], problem: str, remedy: str
) -> None:
    with pytest.raises(UserError) as excinfo:
        configs.config_from_tree(tree)
    assert problem in excinfo.value.problem
    assert remedy in excinfo.value.remedy


def test_override_config_replaces_only_the_named_fields() -> None:
    config = override_config(Config(), {"n_layer": 3, "batch_size": 5, "source": "a.txt"})
    assert config.model == replace(ModelConfig(), n_layer=3)
    assert config.train == replace(TrainConfig(), batch_size=5)
    assert config.data.source == ("a.txt",)
    with pytest.raises(UserError, match="batch_sizes"):
        override_config(Config(), {"batch_sizes": 5})


def test_weight_affecting_fields() -> None:
    config = Config()

    def changed_fields(**values: Any) -> list[str]:
        return configs.weight_affecting_fields(config, override_config(config, values))

    assert changed_fields(eval_interval=1, log_interval=1, save_interval=1, sample_tokens=1) == []
    assert changed_fields(learning_rate=1e-3, n_layer=2) == ["n_layer", "learning_rate"]
    assert changed_fields(seed=1) == ["seed"]
    assert changed_fields(max_steps=10_000) == ["max_steps"]
    config = override_config(config, {"decay_steps": 5000})
    assert changed_fields(max_steps=10_000) == []
    assert changed_fields(max_steps=10_000, decay_steps=10_000) == ["decay_steps", "max_steps"]


def test_sampling_params_are_validated() -> None:
    assert configs.parse_sampling_params({"top_k": 5, "seed": 3}).top_k == 5
    with pytest.raises(UserError, match=r"top_p = 1\.5 is too large"):
        configs.parse_sampling_params({"top_p": 1.5})
    with pytest.raises(UserError, match="temperature = -1"):
        configs.parse_sampling_params({"temperature": -1})


def test_model_fingerprint_covers_what_affects_its_logits() -> None:
    model = ModelConfig(2, 2, 16, 8, 65)
    variants = [
        replace(model, **change)
        for change in ({"n_head": 4}, {"n_layer": 3}, {"position": "rope"}, {"mlp": "swiglu"})
    ]
    assert len({config.fingerprint for config in (model, *variants)}) == 5
    assert replace(model, dropout=0.5).fingerprint == model.fingerprint
    # Must not change: existing checkpoints contain it.
    assert model.fingerprint.startswith("fc296a031021f901")
