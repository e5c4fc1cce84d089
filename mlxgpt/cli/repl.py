"""`mlxgpt generate --interactive`: prompts at a line with history and editing, texts as they come.

What is typed begins a text, and a line that begins with a slash is a command. Ctrl-C stops a text,
and not the program. Works in a terminal that can do nothing, and with its input from a file.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from mlxgpt import config
from mlxgpt.cli.console import without_repeats
from mlxgpt.config import Sampling
from mlxgpt.config.schema import settings
from mlxgpt.data.normalize import normalize_text
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.utils.errors import UserError

HELP = """\
Type how a text begins; an empty line is the beginning of a text. Ctrl-C stops a text.
/again             the same prompt once more, with another seed
/run NAME          another run; /run alone: the newest
/settings          what is set; to change it, for instance /temperature 0.7; without a value,
                   back to the default:
                   {names}
/help  /quit       or Ctrl-D"""

CHANGEABLE = tuple(f.name for f in fields(Sampling) if f.name != "samples")


class Conversation:
    """Reads lines, writes texts.

    Args:
        load: opens a run by its name; None: the newest.
        model: the one to begin with.
        sampling: settings to begin with, by their names.
        read: asks for a line, after a prompt to show; raises EOFError at the end.
        write: takes pieces of a text.
        say: takes a line that is no text.
    """

    def __init__(
        self,
        load: Callable[[str | None], LoadedModel],
        model: LoadedModel,
        sampling: dict[str, Any],
        *,
        read: Callable[[str], str],
        write: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._load, self._model, self._sampling = load, model, sampling
        self._read, self._write, self._say = read, write, say
        self._prompt = ""
        self._logged: dict[str, logging.LogRecord] = {}
        self._commands: dict[str, Callable[[str], None]] = {
            "again": lambda _: self._continue(self._prompt, fresh=True),
            "run": self._other_run,
            "settings": lambda _: self._say(self._settings()),
            "help": lambda _: self._help(),
        }

    def run(self) -> None:
        """Talk until Ctrl-D or /quit. What is logged of every long text is logged once."""
        self._say("/help says what you can do here")
        with without_repeats() as self._logged:
            while True:
                line = None
                try:
                    line = normalize_text(self._read("> "))
                    if line.strip() in ("/quit", "/exit"):
                        return
                    self._take(line)
                except EOFError:
                    self._write("\n")
                    return
                except UserError as error:
                    self._say(f"{error.problem}\n  → {error.remedy}")
                except KeyboardInterrupt:
                    self._write("\n")
                    if line is not None:
                        self._say("stopped")

    def _take(self, line: str) -> None:
        if not line.startswith("/"):
            self._prompt = line
            self._continue(line)
            return
        name, _, value = line[1:].strip().partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if name in self._commands:
            self._commands[name](value)
        elif name in CHANGEABLE:
            self._change(name, value)
        else:
            raise UserError(f"there is no /{name.replace('_', '-')}", "/help lists what there is.")

    def _continue(self, prompt: str, *, fresh: bool = False) -> None:
        given = self._sampling | ({"seed": None} if fresh else {})
        stream = self._model.stream(prompt, **given)
        self._write(stream.prompt)
        for piece in stream:
            self._write(piece)
        self._write("\n")
        stream.log_long_texts()
        result = stream.result
        rate = f"{result.tokens_per_second:,.0f} a second"
        self._say(f"{result.tokens:,} tokens, {rate}, seed {result.seed}")

    def _change(self, name: str, value: str) -> None:
        """Set, or where no value is given, back to the default."""
        kind = next(kind for field, kind, _ in settings(Sampling) if field == name)
        changed = {key: old for key, old in self._sampling.items() if key != name}
        if value:
            changed[name] = _parsed(name, value, kind)
            config.sampling(changed)  # refused, if it cannot be
        self._sampling = changed
        self._say(self._settings())

    def _other_run(self, name: str) -> None:
        self._logged.clear()
        self._model = self._load(name or None)

    def _settings(self) -> str:
        of = config.sampling(self._sampling)
        shown = {name: getattr(of, name) for name in CHANGEABLE}
        return "  ".join(
            f"{name} {value}" for name, value in shown.items() if value not in (None, ())
        )

    def _help(self) -> None:
        self._say(HELP.format(names="  ".join("/" + n.replace("_", "-") for n in CHANGEABLE)))


def converse(
    given: dict[str, Any], write: Callable[[str], None], say: Callable[[str], None]
) -> None:
    """Talk with the user at stdin.

    Args:
        given: arguments of `load`, and sampling settings, by their names.
        write: takes pieces of a text.
        say: takes a line that is not text.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (with it input() has history and editing)

    names = ("run", "checkpoint", "quantize", "runs_dir", "data_dir")
    chosen = {name: given[name] for name in names if name in given}
    sampling = {name: value for name, value in given.items() if name not in names}
    config.sampling(sampling)  # what cannot be is refused before a model is read
    others = {name: chosen[name] for name in names[2:] if name in chosen}
    Conversation(
        lambda run: load(run, **others),
        load(**chosen),
        sampling,
        read=input,
        write=write,
        say=say,
    ).run()


def _parsed(name: str, value: str, kind: Any) -> Any:
    if kind == tuple[str, ...]:
        with contextlib.suppress(ValueError):
            return tuple(shlex.split(value))
        raise UserError(f"a quotation mark is missing in {value}", f'/{name} "one" "another"')
    try:
        return float(value) if kind is float else int(value)
    except ValueError as error:
        flag = name.replace("_", "-")
        raise UserError(f"/{flag} {value} is no number", f"for instance /{flag} 1") from error
