"""Damaged files and invalid values never give a wrong result."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.cli import main as cli
from mlxgpt.config import Config
from tests.helpers.commands import Capture, expect_error

pytestmark = pytest.mark.usefixtures("no_check")  # the self-check is tested separately


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "middle bit": lambda content: flip_bit(content, len(content) // 2),
    "last byte": lambda content: content[:-2] + bytes([content[-2] ^ 4]) + content[-1:],
    "newer": lambda content: re.sub(rb'"format": \d', b'"format": 7', content),
}
DAMAGED_FILES = (
    "runs/done/run.json",
    "runs/done/tokenizer.json",
    "runs/done/config.toml",
    "runs/done/best.json",
    "runs/done/metrics.jsonl",
    "runs/done/checkpoints/step-0000012/manifest.json",
    "runs/done/checkpoints/step-0000012/model.safetensors",
    "runs/done/checkpoints/step-0000012/optimizer.safetensors",
    "data/words/meta.json",
    "data/words/tokenizer.json",
    "data/words/train.bin",
    "data/words/val.bin",
)
COMMANDS = (
    ["generate", "to", "--run", "done", "--checkpoint", "12", "--seed", "1", "--json"],
    ["eval", "--run", "done", "--checkpoint", "12", "--json"],
)


def flip_bit(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :]


def run_commands(capsys: Capture) -> list[tuple[int, str]]:
    outcomes = []
    for command in COMMANDS:
        capsys.readouterr()
        code = cli.main(command)
        output = capsys.readouterr()
        # The speed varies between runs.
        outcomes.append((code, re.sub(r'"tokens_per_second": [\d.]+', "", output.out)))
        assert code in (0, 2), output.err
        if code == 2:
            assert output.err.splitlines()[-1].startswith("  → ")
    return outcomes


@pytest.mark.parametrize("file", DAMAGED_FILES)
def test_damage_is_reported_or_harmless(place: Path, capsys: Capture, file: str) -> None:
    """A command gives the same result as before the damage, or an error."""
    reference = run_commands(capsys)
    assert [code for code, _ in reference] == [0, 0]
    path = Path(file)
    content = path.read_bytes()
    for name, damage in DAMAGES.items():
        damaged = damage(content)
        if damaged == content:
            continue
        path.write_bytes(damaged)
        for (code, out), expected in zip(run_commands(capsys), reference, strict=True):
            assert (code, out) == expected or (code == 2 and out == ""), f"{file}, {name}"
    path.unlink()
    for (code, out), expected in zip(run_commands(capsys), reference, strict=True):
        assert (code, out) == expected or (code == 2 and out == ""), f"{file}, gone"


@pytest.mark.parametrize(
    "file", [f for f in DAMAGED_FILES if "metrics" not in f and "best" not in f]
)
def test_files_of_another_run_are_reported(
    place: Path, capsys: Capture, tiny: Config, file: str
) -> None:
    Path("other.txt").write_text("what is another text, and longer than it seems? " * 30)
    other_folder = Path("other")
    settings = {
        "n_embd": 32,
        "run": "done",
        "runs_dir": other_folder / "runs",
        "data_dir": other_folder / "data",
    }
    api.prepare("other.txt", name="words", data_dir=other_folder / "data")
    api.train(config=tiny, source=other_folder / "data" / "words", **settings)  # type: ignore[arg-type]
    reference = run_commands(capsys)
    shutil.copy(other_folder / file, file)
    outcomes = run_commands(capsys)
    assert 2 in [code for code, _ in outcomes] or outcomes == reference
    for (code, out), expected in zip(outcomes, reference, strict=True):
        assert code == 2 or (code, out) == expected


def test_a_damaged_run_does_not_hide_the_others(place: Path, capsys: Capture) -> None:
    shutil.copytree("runs/done", "runs/broken")
    Path("runs/broken/run.json").write_text("{")
    assert cli.main(["runs"]) == 0
    output = capsys.readouterr()
    assert "done" in output.out
    assert "broken" not in output.out
    assert "runs/broken/run.json is damaged" in output.err


def test_a_folder_without_a_run_is_refused(place: Path, capsys: Capture) -> None:
    Path("empty").mkdir()
    for name in ("empty", "data/words", "words.txt", "", "."):
        assert "there is no run" in expect_error(capsys, "generate", "--run", name)


@pytest.mark.parametrize("prompt", ["", "to be " * 170_000])
def test_empty_and_million_character_prompts(place: Path, capsys: Capture, prompt: str) -> None:
    assert cli.main(["generate", prompt, "--max-tokens", "5", "--json"]) == 0
    output = capsys.readouterr()
    text = json.loads(output.out)["texts"][0]
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 5
    assert ("the model only sees the last 8" in output.err) == bool(prompt)


@pytest.mark.parametrize(
    "flags",
    [
        "--temperature -1",
        "--temperature nan",
        "--top-k -1",
        "--top-p 1.5",
        "--min-p -0.1",
        "--repetition-penalty 0",
        "--max-tokens 0",
        "--samples 0",
        "--seed -1",
        "--checkpoint 13",
    ],
)
def test_sampling_settings_out_of_range_are_refused(
    place: Path, capsys: Capture, flags: str
) -> None:
    expect_error(capsys, "generate", "to", *flags.split())
