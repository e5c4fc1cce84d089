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
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.cli.chat_repl import ChatRepl
from mlxgpt.cli.repl import REPL_SETTINGS, GenerateRepl, Repl
from mlxgpt.inference import generate
from mlxgpt.inference.decode import BatchDecoder
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.utils.errors import UserError


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The prompt and the seed of each reply; the context has room for 8 characters."""
    assert load("done").run.config.model.block_size == 8
    iter_tokens, calls = LoadedModel.iter_tokens, list[tuple[str, Any]]()

    def record(model: LoadedModel, ids: Any, **sampling: Any) -> Iterator[Any]:
        calls.append((model.tokenizer.decode(ids), sampling.get("seed")))
        return iter_tokens(model, ids, **sampling)

    monkeypatch.setattr(LoadedModel, "iter_tokens", record)
    return calls


def chat(*lines: str | BaseException, max_tokens: int = 1, **options: Any) -> ScriptedUser:
    """Chat with seed 1; replies have a single character."""
    repl = partial(ChatRepl, **options)
    return ScriptedUser(*lines).run_repl(repl, seed=1, max_tokens=max_tokens)


def test_a_chat_sees_the_conversation_so_far(chat_run: Path, calls: list[tuple[str, Any]]) -> None:
    user = chat("o", "r", "/clear", "t")
    first = user.output[0]
    assert calls == [("o\n", 1), (f"o\n{first}\nr\n", 1), ("t\n", 1)]
    text = load("done").generate("o\n", seed=1, max_tokens=1).texts[0]
    assert text == f"o\n{first}"
    assert user.output[1] == "\n"


def test_a_system_message_comes_first_and_stays(
    chat_run: Path, calls: list[tuple[str, Any]]
) -> None:
    user = chat("o", "/clear", "r", "/run done", "t", system="b")
    assert [prompt for prompt, _ in calls] == ["b\no\n", "b\nr\n", "b\nt\n"]
    assert not any("forgot" in message for message in user.messages)


def test_another_reply_replaces_the_last_one(chat_run: Path, calls: list[tuple[str, Any]]) -> None:
    user = chat("/again", "o", "/again", "r")
    assert "there is no message yet" in user.messages[1]
    second = user.output[2]
    assert calls == [("o\n", 1), ("o\n", None), (f"o\n{second}\nr\n", 1)]


def test_a_message_that_cannot_be_encoded_is_not_kept(
    chat_run: Path, calls: list[tuple[str, Any]]
) -> None:
    user = chat("~", "o")
    assert "does not know these characters" in user.messages[1]
    assert calls == [("o\n", 1)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("broken", "mend it.")])
@pytest.mark.parametrize("tokens", [0, 1])
def test_an_interrupted_reply_leaves_whole_exchanges(
    chat_run: Path,
    calls: list[tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    tokens: int,
) -> None:
    """Templates may refuse two messages in a row from the same side."""
    iter_tokens = LoadedModel.iter_tokens

    def fail_after_tokens(model: LoadedModel, ids: Any, **sampling: Any) -> Iterator[Any]:
        yield from islice(iter_tokens(model, ids, **sampling), tokens)
        raise error

    monkeypatch.setattr(LoadedModel, "iter_tokens", fail_after_tokens)
    user = chat("o", "r", max_tokens=2)
    assert [prompt for prompt, _ in calls] == [
        "o\n", f"o\n{user.output[0]}\nr\n" if tokens else "r\n"
    ]  # fmt: skip


def test_an_empty_reply_is_part_of_the_conversation(
    chat_run: Path, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    iter_tokens = LoadedModel.iter_tokens
    monkeypatch.setattr(
        LoadedModel,
        "iter_tokens",
        lambda *args, **options: islice(iter_tokens(*args, **options), 0),
    )
    chat("o", "r")
    assert [prompt for prompt, _ in calls] == ["o\n", "o\n\nr\n"]


def test_the_oldest_exchanges_are_forgotten(chat_run: Path, calls: list[tuple[str, Any]]) -> None:
    """Two messages and a reply are 6 characters, which fit into 7 of 8; three messages do not."""
    user = chat("o", "r", "t")
    second = user.output[2]
    assert [prompt for prompt, _ in calls][2] == f"r\n{second}\nt\n"
    assert [message for message in user.messages if "forgot" in message] == [
        "context full: forgot the oldest 2 messages"
    ]


def test_the_reply_length_sets_the_room_for_messages(
    chat_run: Path, calls: list[tuple[str, Any]]
) -> None:
    """At most half of the context is kept free for the reply."""
    cases = [("o", 1, 6), ("o", 8, 2), ("", 8, 4)]  # the message, max_tokens, length of the prompt
    for message, max_tokens, length in cases:
        chat(message, f"/max-tokens {max_tokens}", message)
        assert len(calls[-1][0]) == length


def test_a_run_without_a_chat_template_cannot_chat(
    chat_run: Path, calls: list[tuple[str, Any]]
) -> None:
    plain = chat_run.with_name("plain")
    shutil.copytree(chat_run, plain)
    (plain / "chat_template.jinja").unlink()
    user = chat("o", "/run plain", "r")
    assert "plain has no chat template" in user.messages[1]
    assert calls[-1][0] == f"o\n{user.output[0]}\nr\n", "the conversation continues"
