from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.experiments.variants import (
    Variant,
    check_same_text,
    format_diff,
    parse_vary,
    weight_affecting,
    weight_affecting_diff,
)
from mlxgpt.utils.errors import UserError


def test_a_field_is_varied_in_the_order_given(tiny: Config) -> None:
    configs = parse_vary(tiny, "dropout=0.2, 0,0.1")
    assert list(configs) == ["dropout=0.2", "dropout=0", "dropout=0.1"]
    assert [config.model.dropout for config in configs.values()] == [0.2, 0.0, 0.1]
    assert {replace(c, model=tiny.model) for c in configs.values()} == {tiny}


def test_values_of_every_kind(tiny: Config) -> None:
    assert [c.model.bias for c in parse_vary(tiny, "bias=true,false").values()] == [True, False]
    assert [c.optim.beta2 for c in parse_vary(tiny, "beta2=0.9,9.5e-1").values()] == [0.9, 0.95]
    assert [c.data.tokenizer for c in parse_vary(tiny, "tokenizer=char,bpe").values()] == [
        "char",
        "bpe",
    ]
    assert [c.model.n_head for c in parse_vary(tiny, "n-head=2,4").values()] == [2, 4], "as a flag"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dropout", "has no values"),
        ("dropout=0.1", "has no values"),
        ("dropuot=0,1", "unknown setting 'dropuot'"),
        ("dropout=0,2", "dropout = 2.0 is too large"),
        ("n_head=2,3", "is not divisible by"),
        ("bias=0,1", "wrong type"),
        ("dropout=0.1,0.1", "end with the same weights"),
        ("log_interval=1,2", "end with the same weights"),
        ("seed=1,2", "seed cannot be varied"),
        ("max-steps=1,2", "max_steps cannot be varied"),
    ],
)
def test_invalid_vary_values_are_refused(tiny: Config, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_vary(tiny, text)


def test_differences_are_limited_to_weight_affecting_settings(tiny: Config) -> None:
    changed = override_config(
        tiny, {"n_layer": 3, "log_interval": 5, "source": "x.txt", "beta2": 0.5}
    )
    diff = weight_affecting_diff(tiny, changed)
    assert diff == {"n_layer": (2, 3), "beta2": (0.95, 0.5)}
    assert format_diff(diff) == "n_layer 3 (2), beta2 0.5 (0.95)"
    assert {"tokenizer", "seed", "dtype", "max_steps"} <= weight_affecting(tiny).keys()


def test_variants_on_different_texts_are_refused(home: Path, tiny: Config, text: str) -> None:
    def variant(name: str, text: str) -> Variant:
        (home / f"{name}.txt").write_text(text, encoding="utf-8")
        data = api.prepare(f"{name}.txt")
        return Variant(name, tiny, data, data)

    check_same_text([variant("a", text), variant("b", text)])
    with pytest.raises(UserError, match=r"different datasets: a 1,\d+ bytes, c 1,\d+ bytes"):
        check_same_text([variant("a", text), variant("c", text[:-50])])
