from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxgpt.cli.repl import REPL_SETTINGS, GenerateRepl
from mlxgpt.inference import generate
from mlxgpt.inference.decode import BatchDecoder
from mlxgpt.loaded_model import load


class Person:
    """Types lines, and sees what comes."""

    def __init__(self, *lines: str | BaseException) -> None:
        self._lines = iter(lines)
        self.seen, self.said = "", list[str]()

    def read(self, prompt: str) -> str:
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, piece: str) -> None:
        self.seen += piece

    def talk(self, **sampling: object) -> Person:
        GenerateRepl(
            load,
            load("done"),
            sampling,
            read_line=self.read,
            write_text=self.write,
            print_line=self.said.append,
        ).run()
        return self


def test_what_is_typed_begins_a_text(place: Path) -> None:
    person = Person("to", "", "/quit", "never").talk(seed=1, max_tokens=9)
    expected = [
        load("done").generate(prompt, seed=1, max_tokens=9).texts[0] for prompt in ("to", "")
    ]
    assert person.seen == "\n".join([*expected, ""])
    assert re.fullmatch(r"9 tokens, [\d,]+ a second, seed 1", person.said[2])


def test_marks_and_line_ends_of_a_file_are_no_part_of_a_prompt(place: Path) -> None:
    person = Person("\ufeff/settings", "\ufeffto", "to\r", "/quit").talk(seed=1, max_tokens=9)
    model = load("done")
    texts = [model.generate(prompt, seed=1, max_tokens=9).texts[0] for prompt in ("to", "to\n")]
    assert person.seen == "\n".join([*texts, ""])
    assert "seed 1" in person.said[1]


def test_again_is_the_same_prompt_with_another_seed(place: Path) -> None:
    person = Person("to", "/again", "/again").talk(seed=1, max_tokens=30)
    texts = person.seen.split("\nto")
    assert len(set(texts)) == 3
    assert person.seen.startswith("to")
    assert len({line.rpartition(" ")[2] for line in person.said if "seed" in line}) == 3


def test_settings_are_changed_and_put_back(place: Path) -> None:
    person = Person(
        "/temperature 0", "/max-tokens 5", '/stop "a b" c', "/top-k 3", "/settings",
        "/temperature", "/stop", "/settings",
    ).talk()  # fmt: skip
    first, last = person.said[5], person.said[-1]
    assert "temperature 0.0" in first
    assert "max_tokens 5" in first
    assert "stop ('a b', 'c')" in first
    assert "top_k 3" in first
    assert "temperature 0.8" in last
    assert "stop" not in last


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/nonsense", "there is no /nonsense"),
        ("/samples 3", "there is no /samples"),
        ("/temperature warm", "/temperature warm is no number"),
        ("/temperature 900", "too large"),
        ("/top-k 2.5", "/top-k 2.5 is no number"),
        ('/stop "a', "quotation mark"),
        ("/run nowhere", "no run 'nowhere'"),
        ("~", "never seen"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(place: Path, line: str, problem: str) -> None:
    person = Person("/settings", line, "/settings", "to", "/quit").talk(seed=1, max_tokens=9)
    assert problem in person.said[2]
    assert "\n  → " in person.said[2]
    assert person.said[1] == person.said[3]
    assert person.seen == load("done").generate("to", seed=1, max_tokens=9).texts[0] + "\n"


def test_another_run(place: Path) -> None:
    (place / "runs" / "done").rename(place / "runs" / "other")
    with pytest.raises(Exception, match="no run 'done'"):
        Person().talk()
    (place / "runs" / "other").rename(place / "runs" / "done")
    person = Person("/run done", "to", "/run", "to").talk(seed=1, max_tokens=5)
    assert person.seen.count("to") == 2


def test_help_names_every_setting(place: Path) -> None:
    text = Person("/help").talk().said[-1]
    for name in REPL_SETTINGS:
        assert "/" + name.replace("_", "-") in text


def test_ctrl_c_stops_a_text_and_not_the_program(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generate.generate_step
    stops = iter([True, False])

    def stopped(batch: BatchDecoder) -> Iterator[list[int]]:
        stop = next(stops)
        for n, row in enumerate(real(batch)):
            if stop and n == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(generate, "generate_step", stopped)
    person = Person("to", KeyboardInterrupt(), "to").talk(seed=1, max_tokens=9)
    assert person.said[1] == "stopped"
    first, _, second = person.seen.partition("\n\n")
    assert second.startswith(first)
    assert len(second) > len(first) + 1


def test_what_is_forgotten_is_logged_once_for_each_model(place: Path, notes: list[str]) -> None:
    """Of a text that outgrows the block."""
    Person("to", "/again", "/again").talk(max_tokens=30)
    (line,) = (line for line in notes if "has forgotten" in line)
    assert line.startswith("beyond 8 tokens the model ")
    assert "from the last 4 to 8" in line
    notes.clear()
    Person("to", "/again", "/run", "to").talk(max_tokens=30)
    assert [note for note in notes if note == line] == [line, line]
    notes.clear()
    Person("t").talk(max_tokens=4)
    assert not any("forgotten" in line for line in notes)


@pytest.mark.parametrize("terminal", ["xterm-256color", "dumb"])
def test_in_a_terminal(place: Path, terminal: str) -> None:
    """Editing, history, Ctrl-C in the middle of a text, Ctrl-D; in a dumb one too."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlxgpt", "generate", "--interactive", "--seed", "1"]
    child = subprocess.Popen(
        [*command, "--max-tokens", "200000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": terminal},
    )
    os.close(theirs)
    screen = ""

    def until(text: str, after: int = 0) -> None:
        nonlocal screen
        began = time.monotonic()
        while text not in screen[after:]:
            left = began + 300 - time.monotonic()
            assert select.select([ours], [], [], max(0, left))[0], screen
            screen += os.read(ours, 1 << 16).decode(errors="replace")

    try:
        until("> ")
        os.write(ours, b"too\x7f be\n")  # and a letter taken back
        until("to be")
        until("\n", screen.index("to be") + 6)
        os.killpg(child.pid, signal.SIGINT)
        until("stopped")
        before = screen.index("stopped")  # what follows may have come with it
        until("> ", before)
        os.write(ours, b"/max-tokens 5\n")
        until("max_tokens 5", before)
        before = screen.index("max_tokens 5", before)
        os.write(ours, b"\x1b[A\x1b[A\n" if terminal != "dumb" else b"to be\n")
        until("5 tokens", before)
        assert "to be" in screen[before:]
        until("> ", screen.index("5 tokens", before))
        os.write(ours, b"\x04")
        assert child.wait(300) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
