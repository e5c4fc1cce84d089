"""The generated pages of docs/ are current."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.helpers.commands import ROOT


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


@pytest.mark.parametrize("name", GENERATOR.PAGES)
def test_generated_page_is_current(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == GENERATOR.PAGES[name](), "run: python docs/make_reference.py"


def test_every_setting_and_command_is_documented() -> None:
    settings = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    commands = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert "| `n_layer` | 4 | 6 |" in settings
    assert "| `temperature` | 0.8 |" in settings
    for name in GENERATOR.COMMANDS:
        assert f"\n## mlxgpt {name}\n" in commands
