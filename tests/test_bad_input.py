"""What a user, the disk or another process can do wrong: two lines and exit code 2, nothing lost.

The messages that the README lists are taken from here, each from the mistake itself.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import api, cli, files, mac, selfcheck
from mlxgpt.config import Config
from mlxgpt.corpus import hub

ROOT = Path(__file__).parents[1]
Capture = pytest.CaptureFixture[str]
SMALL = """train --tier 1 --n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2
    --max-steps 4 --eval-interval 2 --sample-tokens 4 --warmup-steps 0"""
TRAIN = SMALL.split()
LONG = f"{SMALL} --source my.txt --max-steps 150 --eval-interval 10 --dropout 0.1".split()


@pytest.fixture(autouse=True)
def no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check has tests of its own."""
    monkeypatch.setattr(selfcheck, "check", lambda config: iter([]))


@pytest.fixture
def place(home: Path, trained: Path, text_file: Path) -> Path:
    """Where a person works: words.txt, and a finished run of it."""
    shutil.copytree(trained / "runs", home / "runs")
    shutil.copytree(trained / "data", home / "data")
    return home


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capsys: Capture, *line: str) -> str:
    """The problem that a command names; it must leave no result, and everything as it was."""
    before = contents(Path.cwd())
    capsys.readouterr()
    code = cli.main(list(line))
    output = capsys.readouterr()
    assert code == 2, output.err
    assert output.out == ""
    problem, remedy = output.err.splitlines()[-2:]
    assert problem.startswith("mlxgpt: ")
    assert remedy.startswith("  → ")
    assert len(remedy) > 10
    assert contents(Path.cwd()) == before
    return problem.removeprefix("mlxgpt: ")


# Each mistake of the README's table: what happens, and the line it ends with.


def no_network(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def not_there(text: hub.HubText) -> None:
        raise ConnectionError

    patch.setattr(hub, "_splits", not_there)
    patch.setattr(hub, "_answers", lambda text: False)
    return refused(capsys, "prepare", "shakespeare")


def latin_1(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    return refused(capsys, "prepare", "my.txt")


def binary(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_bytes(b"GIF89a\0\1")
    return refused(capsys, "prepare", "my.txt")


def empty(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text(" \n")
    return refused(capsys, "prepare", "my.txt")


def one_character(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("a" * 5000)
    return refused(capsys, "prepare", "my.txt")


def short(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be")
    assert cli.main(["prepare", "my.txt"]) == 0
    return refused(capsys, "train", "--tier", "1", "--source", "my.txt")


def small_for_a_batch(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be " * 60)
    assert cli.main(["prepare", "my.txt"]) == 0
    return refused(capsys, "train", "--tier", "1", "--source", "my.txt")


def other_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be")
    assert cli.main(["prepare", "my.txt"]) == 0
    Path("my.txt").write_text("something else altogether")
    return refused(capsys, "train", "--tier", "1", "--source", "my.txt")


def other_settings(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.chdir(place)
    assert cli.main([*TRAIN, "--source", "data/words"]) == 0
    return refused(capsys, *TRAIN, "--source", "data/words", "--n-layer", "2")


def typo(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.toml").write_text("[model]\nn_layers = 6\n")
    return refused(capsys, "train", "--config", "my.toml")


def diverged(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    line = [*TRAIN, "--source", "data/words", "--learning-rate", "1e30", "--grad-clip", "0"]
    capsys.readouterr()
    assert cli.main([*line, "--log-interval", "1", "--max-steps", "20"]) == 2
    return capsys.readouterr().err.splitlines()[-2].removeprefix("mlxgpt: ")


def two_at_once(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    with files.only_one(Path("runs/done"), "training"):
        return refused(capsys, *TRAIN, "--source", "data/words", "--run", "done")


def full_disk(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(files, "sync", full)
    Path("my.txt").write_text("to be or not to be")
    return refused(capsys, "prepare", "my.txt")


def no_run(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    shutil.rmtree("runs")
    return refused(capsys, "generate")


def damaged(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    for path in Path("runs").rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    return refused(capsys, "generate")


def unknown_letter(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "generate", "to be €")


def too_large(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, *TRAIN, "--source", "data/words", "--n-embd", "400000")


def intel(
    place: Path, capsys: Capture, patch: pytest.MonkeyPatch, *, translated: bool = False
) -> str:
    with patch.context() as other:
        other.setattr(sys, "platform", "darwin")
        other.setattr(os, "uname", lambda: type("uname", (), {"machine": "x86_64"}))
        other.setattr(mac, "_translated", lambda: translated)
        return refused(capsys, "runs")


def rosetta(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return intel(place, capsys, patch, translated=True)


Mistake = Callable[[Path, Capture, pytest.MonkeyPatch], str]
MISTAKES: list[Mistake] = [
    no_network,
    latin_1,
    binary,
    empty,
    one_character,
    short,
    small_for_a_batch,
    other_text,
    other_settings,
    typo,
    diverged,
    two_at_once,
    full_disk,
    no_run,
    damaged,
    unknown_letter,
    too_large,
    intel,
    rosetta,
]


def listed() -> list[str]:
    """The messages in the README's table; … stands for what differs from case to case."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What can go wrong")[1]
    rows = re.findall(r"^\| ``? ?(.+?) ?``? \|", section.split("\n## ")[0], flags=re.MULTILINE)
    assert rows
    return rows


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_readme_shows_what_a_person_sees(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    problem = mistake(place, capsys, monkeypatch)
    matching = [
        row for row in listed() if re.fullmatch(".*".join(map(re.escape, row.split("…"))), problem)
    ]
    assert len(matching) == 1, f"the README's table has not exactly one row for: {problem}"


def test_the_readme_lists_nothing_else() -> None:
    assert len(listed()) == len(MISTAKES)


# Files of a run and its data, damaged in every way.

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "middle bit": lambda content: flip(content, len(content) // 2),
    "last byte": lambda content: content[:-2] + bytes([content[-2] ^ 4]) + content[-1:],
    "newer": lambda content: content.replace(b'"format": 1', b'"format": 7'),
}
FILES = (
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


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def results(capsys: Capture) -> list[tuple[int, str]]:
    found = []
    for command in COMMANDS:
        capsys.readouterr()
        code = cli.main(command)
        output = capsys.readouterr()
        # The speed differs from time to time.
        found.append((code, re.sub(r'"tokens_per_second": [\d.]+', "", output.out)))
        assert code in (0, 2), output.err
        if code == 2:
            assert output.err.splitlines()[-1].startswith("  → ")
    return found


@pytest.mark.parametrize("file", FILES)
def test_damage_is_told_or_harmless(place: Path, capsys: Capture, file: str) -> None:
    """Whatever happens to a file, a command gives the result it gave before, or none."""
    whole = results(capsys)
    assert [code for code, _ in whole] == [0, 0]
    path = Path(file)
    content = path.read_bytes()
    for name, damage in DAMAGES.items():
        changed = damage(content)
        if changed == content:
            continue
        path.write_bytes(changed)
        for (code, out), expected in zip(results(capsys), whole, strict=True):
            assert (code, out) == expected or (code == 2 and out == ""), f"{file}, {name}"
    path.unlink()
    for (code, out), expected in zip(results(capsys), whole, strict=True):
        assert (code, out) == expected or (code == 2 and out == ""), f"{file}, gone"


@pytest.mark.parametrize("file", [f for f in FILES if "metrics" not in f and "best" not in f])
def test_files_of_another_run_are_told(
    place: Path, capsys: Capture, tiny: Config, file: str
) -> None:
    Path("other.txt").write_text("what is another text, and longer than it seems? " * 30)
    other = Path("other")
    changed = {"n_embd": 32, "run": "done", "runs_dir": other / "runs", "data_dir": other / "data"}
    api.prepare("other.txt", name="words", data_dir=other / "data")
    api.train(config=tiny, source=other / "data" / "words", **changed)  # type: ignore[arg-type]
    whole = results(capsys)
    shutil.copy(other / file, file)
    after = results(capsys)
    assert 2 in [code for code, _ in after] or after == whole
    for (code, out), expected in zip(after, whole, strict=True):
        assert code == 2 or (code, out) == expected


def test_a_damaged_run_does_not_hide_the_others(place: Path, capsys: Capture) -> None:
    shutil.copytree("runs/done", "runs/broken")
    Path("runs/broken/run.json").write_text("{")
    assert cli.main(["runs"]) == 0
    output = capsys.readouterr()
    assert "done" in output.out
    assert "broken" not in output.out
    assert "runs/broken/run.json is damaged" in output.err


def test_a_folder_that_is_no_run(place: Path, capsys: Capture) -> None:
    Path("empty").mkdir()
    for name in ("empty", "data/words", "words.txt", "", "."):
        assert "there is no run" in refused(capsys, "generate", "--run", name)


@pytest.mark.parametrize("prompt", ["", "to be " * 170_000])
def test_prompts_of_no_and_of_a_million_characters(
    place: Path, capsys: Capture, prompt: str
) -> None:
    assert cli.main(["generate", prompt, "--max-tokens", "5", "--json"]) == 0
    output = capsys.readouterr()
    text = json.loads(output.out)["texts"][0]
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 5
    assert ("the model reads the last 8" in output.err) == bool(prompt)


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
def test_sampling_out_of_range(place: Path, capsys: Capture, flags: str) -> None:
    refused(capsys, "generate", "to", *flags.split())


# The disk and the folders.


def program(*line: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        [sys.executable, "-m", "mlxgpt", *line],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def limited(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes: as on a disk that is full, writing fails."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_is_full_while_preparing(home: Path) -> None:
    Path("my.txt").write_text("to be or not to be " * 500)
    result = program("prepare", "my.txt", preexec_fn=limited(10_000))
    assert result.returncode == 2
    assert "cannot write data/my: File too large" in result.stderr
    assert [p.name for p in home.rglob("*") if p.is_file()] == ["my.txt"]
    assert program("prepare", "my.txt").returncode == 0


@pytest.mark.parametrize("size", [300, 2_000, 5_000])
def test_a_disk_that_is_full_while_training(home: Path, size: int) -> None:
    """Wherever the room ends, in metrics or in a checkpoint: what was saved can be resumed."""
    Path("my.txt").write_text("to be or not to be " * 500)
    assert program("prepare", "my.txt").returncode == 0
    line = [*TRAIN, "--source", "my.txt", "--run", "a", "--log-interval", "1"]
    first = program(*line, "--max-steps", "2", "--decay-steps", "40")
    assert first.returncode == 0, first.stderr
    more = [*line, "--max-steps", "40", "--decay-steps", "40"]
    result = program(*more, preexec_fn=limited(size))
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "File too large" in result.stderr or "Unable to write" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("  → free some space")
    assert program("generate", "to", "--run", "a", "--max-tokens", "3").returncode == 0
    resumed = program(*more)
    assert resumed.returncode == 0, resumed.stderr
    assert not list(Path("runs/a").rglob(".*"))


def test_folders_that_cannot_be_written(place: Path, capsys: Capture) -> None:
    Path("file").write_text("")
    for flag, line in (
        ("--runs-dir", [*TRAIN, "--source", "data/words"]),
        ("--data-dir", ["prepare", "words.txt"]),
    ):
        assert "cannot write in file" in refused(capsys, *line, flag, "file/inside")


def test_a_file_that_cannot_be_read(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", denied)
        capsys.readouterr()
        assert cli.main(["prepare", "words.txt"]) == 2
    assert "cannot read words.txt: Permission denied" in capsys.readouterr().err


def test_two_processes_want_the_same_data(home: Path) -> None:
    """Both get it, or one is told to wait; what is there in the end is whole."""
    Path("my.txt").write_text("to be or not to be " * 20_000)
    line = [sys.executable, "-m", "mlxgpt", "prepare", "my.txt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0 or "another process is preparing data/my" in err
    assert 0 in [process.returncode for process in both]
    assert program("prepare", "my.txt").returncode == 0
    assert [p.name for p in Path("data").iterdir()] == ["my"]


# Being interrupted.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "my.txt").write_text("to be or not to be, that is the question " * 200)
    result = program(*LONG, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("moment", ["preparing", "self-check", "what it writes", "step 70/150"])
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_any_moment(home: Path, uninterrupted: Path, moment: str, times: int) -> None:
    """Wherever it hits (preparing, checking, training, saving), there is no traceback, and the
    same command goes on to the same weights.
    """
    shutil.copy(uninterrupted / "my.txt", home / "my.txt")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxgpt", *LONG],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(moment):
            break
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)  # two signals at once are one
    err = "".join(lines) + process.communicate()[1]
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Exception" not in err
    again = program(*LONG)
    assert again.returncode == 0, again.stderr
    last = "runs/tier1-my/checkpoints/step-0000150/model.safetensors"
    assert (home / last).read_bytes() == (uninterrupted / last).read_bytes()
    assert np.fromfile(home / "data/my/train.bin", dtype="<u2").size == 7380


# Terminals.


def test_a_training_that_nobody_watches_goes_on(place: Path) -> None:
    line = " ".join([*TRAIN, "--source", "data/words", "--run", "a", "--log-interval", "1"])
    command = f"{sys.executable} -m mlxgpt {line} 2>&1 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", command], env=environment, capture_output=True, check=True)
    assert Path("runs/a/checkpoints/step-0000004/manifest.json").exists()


@pytest.mark.parametrize("line", ["runs", "info", "eval", "generate to --samples 2", "--help"])
def test_output_that_nobody_reads(place: Path, line: str) -> None:
    command = f"{sys.executable} -m mlxgpt {line} | true"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
