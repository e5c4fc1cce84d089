"""`mlxgpt generate --interactive`, and the base of `mlxgpt chat`: a prompt line with history and
editing, texts streamed.

A line that begins with a slash is a command, any other line is a prompt. Ctrl-C stops the current
text, not the program. Also works in a dumb terminal and with stdin from a file.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from mlxgpt import config
from mlxgpt.cli.console import deduplicate_logs
from mlxgpt.config import SamplingParams
from mlxgpt.config.fields import iter_fields
from mlxgpt.data.normalize import normalize_text
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.utils.errors import UserError

HELP = """\
{first_lines}
/run NAME          switch to another run; without a name: the newest run
/settings          show the sampling settings. Change one with, for example, /temperature 0.7;
                   without a value, it is reset to its default:
                   {names}
/help              show this help
/quit              quit (or Ctrl-D)"""

REPL_SETTINGS = tuple(f.name for f in fields(SamplingParams) if f.name != "samples")


class Repl(ABC):
    """Reads lines and commands, and streams texts.

    Args:
        load_model: loads a run by name; None: the newest.
        model: the initial model.
        sampling: initial sampling settings, by name.
        read_line: reads a line after showing a prompt; raises EOFError at the end of input.
        write_text: writes a piece of generated text.
        print_line: prints a line that is not generated text.
    """

    greeting: ClassVar[str]
    help_lines: ClassVar[str]

    def __init__(
        self,
        load_model: Callable[[str | None], LoadedModel],
        model: LoadedModel,
        sampling: dict[str, Any],
        *,
        read_line: Callable[[str], str],
        write_text: Callable[[str], None],
        print_line: Callable[[str], None],
    ) -> None:
        self._load_model, self._model, self._sampling = load_model, model, sampling
        self._read_line, self._write_text, self._print_line = read_line, write_text, print_line
        self._logged_records: dict[str, logging.LogRecord] = {}
        self._commands: dict[str, Callable[[str], None]] = {
            "again": lambda _: self._repeat(),
            "run": self._switch_run,
            "settings": lambda _: self._print_line(self._format_settings()),
            "help": lambda _: self._print_help(),
        }

    def run(self) -> None:
        """Run until Ctrl-D or /quit. The notes on long texts are logged only once."""
        self._print_line(f"{self.greeting}, or /help for commands")
        with deduplicate_logs() as self._logged_records:
            while True:
                line = None
                try:
                    line = normalize_text(self._read_line("> "))
                    if line.strip() in ("/quit", "/exit"):
                        return
                    self._handle_line(line)
                except EOFError:
                    self._write_text("\n")
                    return
                except UserError as error:
                    self._print_line(f"{error.problem}\n  → {error.remedy}")
                except KeyboardInterrupt:
                    self._write_text("\n")
                    if line is not None:
                        self._print_line("stopped")

    @abstractmethod
    def _answer(self, line: str) -> None:
        """Generate from a line."""

    @abstractmethod
    def _repeat(self) -> None:
        """Generate from the last line with another seed."""

    def _handle_line(self, line: str) -> None:
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, value = line[1:].strip().partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if name in self._commands:
            self._commands[name](value)
        elif name in REPL_SETTINGS:
            self._change_setting(name, value)
        else:
            raise UserError(
                f"unknown command /{name.replace('_', '-')}", "/help lists the commands."
            )

    def _change_setting(self, name: str, value: str) -> None:
        """Change a sampling setting; without a value, reset it to the default."""
        field_type = next(
            field_type for field, field_type, _ in iter_fields(SamplingParams) if field == name
        )
        new_sampling = {key: current for key, current in self._sampling.items() if key != name}
        if value:
            new_sampling[name] = _parse_setting(name, value, field_type)
            config.parse_sampling_params(new_sampling)  # raises if the value is invalid
        self._sampling = new_sampling
        self._print_line(self._format_settings())

    def _switch_run(self, name: str) -> None:
        self._logged_records.clear()
        self._set_model(self._load_model(name or None))

    def _set_model(self, model: LoadedModel) -> None:
        self._model = model

    def _format_settings(self) -> str:
        params = config.parse_sampling_params(self._sampling)
        values = {name: getattr(params, name) for name in REPL_SETTINGS}
        return "  ".join(
            f"{name} {value}" for name, value in values.items() if value not in (None, ())
        )

    def _print_help(self) -> None:
        names = "  ".join("/" + name.replace("_", "-") for name in REPL_SETTINGS)
        self._print_line(HELP.format(first_lines=self.help_lines, names=names))


class GenerateRepl(Repl):
    """Continues prompts."""

    greeting = "type a prompt"
    help_lines = (
        "Type a prompt; an empty line generates without a prompt. Ctrl-C stops generation.\n"
        "/again             generate from the same prompt with a new seed"
    )
    _prompt = ""

    def _answer(self, line: str) -> None:
        self._prompt = line
        self._generate(line, self._sampling)

    def _repeat(self) -> None:
        self._generate(self._prompt, self._sampling | {"seed": None})

    def _generate(self, prompt: str, sampling: dict[str, Any]) -> None:
        stream = self._model.stream(prompt, **sampling)
        self._write_text(stream.prompt)
        for piece in stream:
            self._write_text(piece)
        self._write_text("\n")
        stream.log_long_texts()
        result = stream.result
        rate = f"{result.tokens_per_second:,.0f} tok/s"
        self._print_line(f"{result.tokens:,} tokens, {rate}, seed {result.seed}")


def run_repl(
    make_repl: Callable[..., Repl],
    args: dict[str, Any],
    write_text: Callable[[str], None],
    print_line: Callable[[str], None],
) -> None:
    """Run an interactive program on stdin.

    Args:
        make_repl: makes it, with the arguments of `Repl`.
        args: arguments of `load`, and sampling settings, by name.
        write_text: writes a piece of generated text.
        print_line: prints a line that is not generated text.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (with it input() has history and editing)

    load_arg_names = ("run", "checkpoint", "adapter", "quantize", "runs_dir", "data_dir")
    load_args = {name: args[name] for name in load_arg_names if name in args}
    sampling = {name: value for name, value in args.items() if name not in load_arg_names}
    config.parse_sampling_params(sampling)  # refuse invalid settings before loading a model
    shared_args = {name: load_args[name] for name in load_arg_names[3:] if name in load_args}
    make_repl(
        lambda run: load(run, **shared_args),
        load(**load_args),
        sampling,
        read_line=input,
        write_text=write_text,
        print_line=print_line,
    ).run()


def _parse_setting(name: str, value: str, field_type: Any) -> Any:
    if field_type == tuple[str, ...]:
        with contextlib.suppress(ValueError):
            return tuple(shlex.split(value))
        raise UserError(
            f"missing quotation mark in {value}", f'use, for example, /{name} "one" "two".'
        )
    try:
        return float(value) if field_type is float else int(value)
    except ValueError as error:
        flag = name.replace("_", "-")
        raise UserError(
            f"/{flag} {value} is not a valid number", f"use, for example, /{flag} 1."
        ) from error
