from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt import config as configs
from mlxgpt.config import Config, override_config, toml
from mlxgpt.config.fields import iter_fields
from mlxgpt.utils.errors import UserError


@st.composite
def field_values(draw: st.DrawFn) -> dict[str, Any]:
    """Draw valid values for every config field."""
    values: dict[str, Any] = {}
    for cls in configs.SECTIONS.values():
        for name, kind, field in iter_fields(cls):
            low, high = field.metadata["low"], field.metadata["high"]
            if kind is bool:
                values[name] = draw(st.booleans())
            elif kind is int:
                values[name] = draw(st.integers(low, min(high or 10**6, 10**6)))
            elif kind is float:
                values[name] = draw(st.floats(low, high or 1e6, allow_nan=False))
            elif field.metadata["choices"]:
                values[name] = draw(st.sampled_from(field.metadata["choices"]))
            else:
                values[name] = draw(st.lists(st.text(min_size=1), max_size=3))
    values["n_embd"] = values["n_head"] * 2 * draw(st.integers(1, 32))
    values["value_gate"] &= values["value_embeddings"]
    values["lora_layers"] %= values["n_layer"] + 1
    values["dora"] &= values["lora_rank"] > 0
    return values


@given(field_values())
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    config = override_config(Config(), values)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(toml.config_to_toml(config), encoding="utf-8")
    assert toml.load_config(path) == config


@pytest.mark.parametrize("name", sorted(toml.find_builtin_configs()))
def test_built_in_configs_are_valid_and_commented(name: str) -> None:
    path = toml.find_builtin_configs()[name]
    toml.load_config(path)
    tree = tomllib.loads(path.read_text())
    lines = path.read_text().splitlines()
    for key in [key for section in tree.values() for key in section]:
        index = next(
            line_number
            for line_number, text in enumerate(lines)
            if text.split("=")[0].strip() == key
        )
        assert "#" in lines[index] or lines[index - 1].startswith("#"), f"{key} is not explained"


def test_invalid_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[model]\nn_layer = = 3\n")
    with pytest.raises(UserError, match=r"my\.toml is not valid TOML: .*line 2"):
        toml.load_config(path)
    with pytest.raises(UserError, match=r"cannot read the config .*gone\.toml"):
        toml.load_config(tmp_path / "gone.toml")


@pytest.mark.parametrize("line", ["dropout = 1" + "0" * 400, "n_layer = 1" + "0" * 4000])
def test_number_that_is_too_large_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "my.toml").write_text(f"[model]\n{line}\n")
    with pytest.raises(UserError, match="is too large"):
        toml.load_config(tmp_path / "my.toml")


def test_removed_setting_is_ignored(tmp_path: Path) -> None:
    """Configs of older runs may contain it."""
    path = tmp_path / "config.toml"
    path.write_text("[model]\nn_layer = 3\nzero_init = false\n")
    assert toml.load_config(path).model.n_layer == 3


def test_former_name_of_a_schedule_is_accepted(tmp_path: Path) -> None:
    """Older configs use `linear`, the former name of `wsd`."""
    path = tmp_path / "config.toml"
    path.write_text('[optim]\nschedule = "linear"\n')
    assert toml.load_config(path).optim.schedule == "wsd"


def test_byte_order_mark_and_windows_line_endings_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[model]\r\nn_layer = 3\r\n")
    assert toml.load_config(tmp_path / "a.toml").model.n_layer == 3
