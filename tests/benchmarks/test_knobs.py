"""`python benchmarks/knobs.py` on a tiny text."""

from __future__ import annotations

import sys
from pathlib import Path

import knobs
import pytest

from mlxgpt.config.resolve import resolve_config
from tests.helpers.commands import Capture


@pytest.mark.parametrize("text", knobs.TEXTS)
def test_every_value_is_a_valid_config_with_the_same_tokens_per_step(text: str) -> None:
    _, config = resolve_config(None, "tier1", **knobs.BASE, **knobs.TEXTS[text])
    for knob in (*knobs.KNOBS, knobs.VOCABULARIES[text]):
        for value in knob.values:
            changed = knobs.override_config(config, knob.changes(value))
            if knob.name != "batch_size":
                assert changed.tokens_per_step == knobs.STEP_TOKENS, (knob.name, value)
            if knob.name == "n_embd":
                assert changed.model.n_embd == 64 * changed.model.n_head


@pytest.mark.usefixtures("no_check")
def test_a_knob_is_turned_and_plotted(
    home: Path, text_file: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    text_file.write_text(text * 4)
    monkeypatch.setattr(
        knobs, "BASE", {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 4}
    )
    monkeypatch.setattr(knobs, "KNOBS", (knobs.Knob("n_layer", (1, 2)),))
    arguments = ["--source", "words.txt", "--tokens", "96", "--seeds", "2", "--knobs", "n_layer"]
    monkeypatch.setattr(sys, "argv", ["knobs.py", "characters", *arguments, "--plot", "a.svg"])
    knobs.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("| ")][:1] == ["n_layer"]
    base, other = lines[-2:]
    assert base.split("|")[5].strip() == "base"
    assert "±" in other.split("|")[5]
    assert base.split("|")[3].strip() == other.split("|")[3].strip() == "3"  # 96 / (4 · 8) steps
    assert "<svg" in (home / "a.svg").read_text()
