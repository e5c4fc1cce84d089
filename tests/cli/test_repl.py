from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from mlxgpt.cli.repl import REPL_SETTINGS, ChatRepl, GenerateRepl, Repl
from mlxgpt.inference import generate
from mlxgpt.inference.decode import BatchDecoder
from mlxgpt.loaded_model import load


class ScriptedUser:
    """Types scripted lines and records the output."""

    def __init__(self, *lines: str | BaseException) -> None:
        self._lines = iter(lines)
        self.output, self.messages = "", list[str]()

    def read(self, prompt: str) -> str:
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, piece: str) -> None:
        self.output += piece

    def run_repl(
        self, repl: Callable[..., Repl] = GenerateRepl, /, **sampling: object
    ) -> ScriptedUser:
        repl(
            load,
            load("done"),
            sampling,
            read_line=self.read,
            write_text=self.write,
            print_line=self.messages.append,
        ).run()
        return self


def test_typed_line_is_the_prompt(place: Path) -> None:
    user = ScriptedUser("to", "", "/quit", "never").run_repl(seed=1, max_tokens=9)
    expected = [
        load("done").generate(prompt, seed=1, max_tokens=9).texts[0] for prompt in ("to", "")
    ]
    assert user.output == "\n".join([*expected, ""])
    assert re.fullmatch(r"9 tokens, [\d,]+ tok/s, seed 1", user.messages[2])


def test_byte_order_marks_and_line_endings_are_normalized(place: Path) -> None:
    user = ScriptedUser("\ufeff/settings", "\ufeffto", "to\r", "/quit").run_repl(
        seed=1, max_tokens=9
    )
    model = load("done")
    texts = [model.generate(prompt, seed=1, max_tokens=9).texts[0] for prompt in ("to", "to\n")]
    assert user.output == "\n".join([*texts, ""])
    assert "seed 1" in user.messages[1]


def test_again_repeats_the_prompt_with_another_seed(place: Path) -> None:
    user = ScriptedUser("to", "/again", "/again").run_repl(seed=1, max_tokens=30)
    texts = user.output.split("\nto")
    assert len(set(texts)) == 3
    assert user.output.startswith("to")
    assert len({line.rpartition(" ")[2] for line in user.messages if "seed" in line}) == 3


def test_settings_are_changed_and_reset(place: Path) -> None:
    user = ScriptedUser(
        "/temperature 0", "/max-tokens 5", '/stop "a b" c', "/top-k 3", "/settings",
        "/temperature", "/stop", "/settings",
    ).run_repl()  # fmt: skip
    first, last = user.messages[5], user.messages[-1]
    assert "temperature 0.0" in first
    assert "max_tokens 5" in first
    assert "stop ('a b', 'c')" in first
    assert "top_k 3" in first
    assert "temperature 0.8" in last
    assert "stop" not in last


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/nonsense", "unknown command /nonsense"),
        ("/samples 3", "unknown command /samples"),
        ("/temperature warm", "/temperature warm is not a valid number"),
        ("/temperature 900", "too large"),
        ("/top-k 2.5", "/top-k 2.5 is not a valid number"),
        ('/stop "a', "quotation mark"),
        ("/run nowhere", "no run named 'nowhere'"),
        ("~", "does not know these characters"),
    ],
)
def test_mistake_prints_an_error_and_changes_nothing(place: Path, line: str, problem: str) -> None:
    user = ScriptedUser("/settings", line, "/settings", "to", "/quit").run_repl(
        seed=1, max_tokens=9
    )
    assert problem in user.messages[2]
    assert "\n  → " in user.messages[2]
    assert user.messages[1] == user.messages[3]
    assert user.output == load("done").generate("to", seed=1, max_tokens=9).texts[0] + "\n"


def test_switching_to_another_run(place: Path) -> None:
    (place / "runs" / "done").rename(place / "runs" / "other")
    with pytest.raises(Exception, match="no run named 'done'"):
        ScriptedUser().run_repl()
    (place / "runs" / "other").rename(place / "runs" / "done")
    user = ScriptedUser("/run done", "to", "/run", "to").run_repl(seed=1, max_tokens=5)
    assert user.output.count("to") == 2


def test_help_lists_every_setting(place: Path) -> None:
    text = ScriptedUser("/help").run_repl().messages[-1]
    for name in REPL_SETTINGS:
        assert "/" + name.replace("_", "-") in text


def test_ctrl_c_stops_the_text_but_not_the_repl(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = generate.generate_step
    stops = iter([True, False])

    def generate_and_interrupt(batch: BatchDecoder) -> Iterator[list[int]]:
        stop = next(stops)
        for n, row in enumerate(original(batch)):
            if stop and n == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(generate, "generate_step", generate_and_interrupt)
    user = ScriptedUser("to", KeyboardInterrupt(), "to").run_repl(seed=1, max_tokens=9)
    assert user.messages[1] == "stopped"
    first, _, second = user.output.partition("\n\n")
    assert second.startswith(first)
    assert len(second) > len(first) + 1


def test_truncated_context_is_logged_once_per_model(place: Path, notes: list[str]) -> None:
    """When a text outgrows the block size."""
    ScriptedUser("to", "/again", "/again").run_repl(max_tokens=30)
    (line,) = (line for line in notes if "longer than the block size" in line)
    assert line.startswith("the text is longer than the block size of 8 tokens")
    assert "sees the last 4 to 8" in line
    notes.clear()
    ScriptedUser("to", "/again", "/run", "to").run_repl(max_tokens=30)
    assert [note for note in notes if note == line] == [line, line]
    notes.clear()
    ScriptedUser("t").run_repl(max_tokens=4)
    assert not any("forgotten" in line for line in notes)


@pytest.mark.parametrize("terminal", ["xterm-256color", "dumb"])
def test_repl_in_a_terminal(place: Path, terminal: str) -> None:
    """Editing, history, Ctrl-C within a text, Ctrl-D; also in a dumb terminal."""
    terminal_fd, child_fd = pty.openpty()
    command = [sys.executable, "-m", "mlxgpt", "generate", "--interactive", "--seed", "1"]
    child = subprocess.Popen(
        [*command, "--max-tokens", "200000"],
        stdin=child_fd,
        stdout=child_fd,
        stderr=child_fd,
        start_new_session=True,
        env={**os.environ, "TERM": terminal},
    )
    os.close(child_fd)
    screen = ""

    def wait_for(text: str, after: int = 0) -> None:
        nonlocal screen
        start = time.monotonic()
        while text not in screen[after:]:
            remaining = start + 300 - time.monotonic()
            assert select.select([terminal_fd], [], [], max(0, remaining))[0], screen
            screen += os.read(terminal_fd, 1 << 16).decode(errors="replace")

    try:
        wait_for("> ")
        os.write(terminal_fd, b"too\x7f be\n")  # with a backspace
        wait_for("to be")
        wait_for("\n", screen.index("to be") + 6)
        os.killpg(child.pid, signal.SIGINT)
        wait_for("stopped")
        before = screen.index("stopped")  # later output may already be on the screen
        wait_for("> ", before)
        os.write(terminal_fd, b"/max-tokens 5\n")
        wait_for("max_tokens 5", before)
        before = screen.index("max_tokens 5", before)
        os.write(terminal_fd, b"\x1b[A\x1b[A\n" if terminal != "dumb" else b"to be\n")
        wait_for("5 tokens", before)
        assert "to be" in screen[before:]
        wait_for("> ", screen.index("5 tokens", before))
        os.write(terminal_fd, b"\x04")
        assert child.wait(300) == 0
    finally:
        child.kill()
        child.wait()
        os.close(terminal_fd)


CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture
def chat_run(place: Path) -> Path:
    """A run with a chat template that writes a line for each message."""
    folder = place / "runs" / "done"
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def reply_to(prompt: str, **sampling: object) -> str:
    return load("done").generate(prompt, **sampling).texts[0].removeprefix(prompt)


def test_a_chat_sees_the_conversation_so_far(chat_run: Path) -> None:
    user = ScriptedUser("to", "or", "/clear", "to").run_repl(ChatRepl, seed=1, max_tokens=3)
    first = reply_to("to\n", seed=1, max_tokens=3)
    second = reply_to(f"to\n{first}\nor\n", seed=1, max_tokens=3)
    assert user.output == "\n".join([first, second, first, "", ""])


def test_a_system_message_comes_first_and_stays(chat_run: Path) -> None:
    repl = partial(ChatRepl, system="be")
    user = ScriptedUser("to", "/clear", "to").run_repl(repl, seed=1, max_tokens=3)
    assert user.output == 2 * (reply_to("be\nto\n", seed=1, max_tokens=3) + "\n") + "\n"


def test_another_reply_replaces_the_last_one(chat_run: Path) -> None:
    user = ScriptedUser("/again", "to", "/again", "/seed 1", "or").run_repl(
        ChatRepl, seed=1, max_tokens=9
    )
    assert "there is no message yet" in user.messages[1]
    first, second, third = user.output.rstrip("\n").split("\n")[:3]
    assert first == reply_to("to\n", seed=1, max_tokens=9)
    assert second != first
    assert third == reply_to(f"to\n{second}\nor\n", seed=1, max_tokens=9)


def test_a_message_that_cannot_be_encoded_is_not_kept(chat_run: Path) -> None:
    user = ScriptedUser("~", "to").run_repl(ChatRepl, seed=1, max_tokens=3)
    assert "does not know these characters" in user.messages[1]
    assert user.output == reply_to("to\n", seed=1, max_tokens=3) + "\n\n"


def test_the_oldest_exchanges_are_forgotten(chat_run: Path) -> None:
    user = ScriptedUser(*["not to"] * 9).run_repl(ChatRepl, seed=1, max_tokens=3)
    assert any("forgot the oldest 2 messages" in message for message in user.messages)


def test_a_run_without_a_chat_template_cannot_chat(chat_run: Path) -> None:
    shutil.copytree(chat_run, chat_run.with_name("plain"))
    (chat_run.with_name("plain") / "chat_template.jinja").unlink()
    user = ScriptedUser("/run plain", "to").run_repl(ChatRepl, seed=1, max_tokens=3)
    assert "plain has no chat template" in user.messages[1]
    assert user.output == reply_to("to\n", seed=1, max_tokens=3) + "\n\n"
