from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from mlxgpt.cli.main import main
from mlxgpt.cli.prompts import read_prompts
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "to be\n\n  or not \n", ["to be", "  or not "]),
        ("a.txt", '{"prompt": "to"}\n', ['{"prompt": "to"}']),
        ("a.jsonl", '"to\\nbe"\n\n{"prompt": "", "id": 3}\n', ["to\nbe", ""]),
        ("a.json", '{"prompt": "É"}', ["É"]),
        ("a.json", '{\n "prompt": "to"\n}\n', ["to"]),
        ("a.json", '[\n "to",\n {"prompt": "be"}\n]', ["to", "be"]),
        ("a.txt", "\ufeffto\u2028be\n", ["to\u2028be"]),
        ("a.txt", "a\x85b\r\nc\vd\fe\x1cf\rg\u2029h", ["a\x85b", "c\vd\fe\x1cf", "g\u2029h"]),
        ("a.ndjson", '\ufeff"to\u2028be"\r\n"or"\r\n', ["to\u2028be", "or"]),
    ],
)
def test_prompts_one_per_line_or_from_json(
    tmp_path: Path, name: str, content: str, expected: list[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"\n \n", "contains no prompts"),
        ("a.txt", b"\xff\xfet\0o\0", "a.txt is UTF-16 text"),
        (
            "a.txt",
            b"caf\xe9 au lait",
            "a.txt is not UTF-8 text .byte 3.; it looks like WINDOWS-1252",
        ),
        ("a.txt", gzip.compress(b"to be", mtime=0), "a.txt is compressed with gzip"),
        ("a.csv", b"prompt\nto\n", "a.csv is a table"),
        (
            "a.txt",
            b"x" * (files.MAX_SMALL_FILE_BYTES + 1),
            "cannot read .*larger than 1,048,576 bytes",
        ),
        ("a.json", b'["to", 2]', "a.json, entry 2 has no prompt"),
        ("a.jsonl", b'"to"\n{"text": "be"}\n', "a.jsonl:2 has no prompt"),
        ("a.jsonl", b"to\n", "a.jsonl:1 has no prompt"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 has no prompt"),
        ("gone.txt", None, "cannot read"),
    ],
)
def test_invalid_prompt_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read_prompts(tmp_path / name)


def test_generate_from_a_prompts_file(place: Path, capsys: Capture) -> None:
    Path("p.txt").write_text("to be\nor\n")
    assert main(["generate", "--prompts", "p.txt", "--seed", "1", "--max-tokens", "9"]) == 0
    output = capsys.readouterr().out
    for n, prompt in enumerate(("to be", "or"), 1):
        assert main(["generate", prompt, "--seed", "1", "--max-tokens", "9"]) == 0
        assert f"--- {n}\n{capsys.readouterr().out}" in output


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["to", "--prompts", "p.txt"], "--prompts: not allowed with argument prompt"),
        (["--interactive", "--prompts", "p.txt"], "not allowed with argument --interactive"),
        (["--interactive", "to"], "not allowed with argument --interactive"),
        (["--interactive", "--json"], "one prompt after the other"),
        (["--interactive", "--samples", "2"], "one prompt after the other"),
        (["--interactive", "--temperature", "-1"], "temperature"),
        (["--quantize", "5"], "5 bits"),
    ],
)
def test_conflicting_arguments_are_refused(
    place: Path, more: list[str], problem: str, capsys: Capture
) -> None:
    assert main(["generate", *more]) == 2
    assert problem in capsys.readouterr().err
