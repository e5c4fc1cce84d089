from __future__ import annotations

import argparse
import itertools
from typing import Any

import pytest

from mlxgpt import config
from mlxgpt.cli import aliases
from mlxgpt.cli.config_flags import COMMON_SETTINGS, UNITS
from mlxgpt.cli.main import main
from mlxgpt.cli.parser import COMMANDS, make_parser
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import Capture


def parse(*line: str) -> dict[str, Any]:
    return vars(make_parser().parse_args(list(line)))


def find_command_parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize(("alias", "flag"), aliases.ALIASES.items())
def test_alias_equals_its_flag(alias: str, flag: str) -> None:
    parsers = find_command_parsers().values()
    with_flag = [p for p in parsers if f"--{flag}" in p._option_string_actions]
    assert with_flag, "of some command"
    assert not any(f"--{alias}" in p._option_string_actions for p in parsers)
    command = with_flag[0].prog.split()[-1]
    is_boolean = "--no-" + flag in with_flag[0]._option_string_actions
    values = [] if is_boolean else ["3"]
    for spelling in (alias, alias.replace("-", "_")):
        assert parse(command, f"--{spelling}", *values) == parse(command, f"--{flag}", *values)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train --max_steps 5 --n_layer=2", {"max_steps": 5, "n_layer": 2}),
        ("train --max_iters=5 --warmup_iters 2", {"max_steps": 5, "warmup_steps": 2}),
        ("train --bias=False --tied=True", {"bias": False, "tied": True}),
        ("train --no_bias", {"bias": False}),
        ("train --init_from mine", {"init_from": "mine"}),
        ("train --lora-layers all --lora_rank 4", {"lora_layers": 0, "lora_rank": 4}),
        ("train --lora-layers 3 --dora", {"lora_layers": 3, "dora": True}),
        ("generate --no-adapter x", {"adapter": False, "prompt": "x"}),
        ("export --to peft --adapters", {"to": "peft", "adapters": True}),
        ("generate --temp 0 x", {"temperature": 0.0, "prompt": "x"}),
        ("generate --seed 1 -- --max_tokens", {"seed": 1, "prompt": "--max_tokens"}),
        ("generate --stop=--max_tokens", {"stop": ["--max_tokens"]}),
    ],
)
def test_spelling_of_other_tools_is_accepted(line: str, expected: dict[str, Any]) -> None:
    parsed = parse(*line.split())
    assert {name: parsed[name] for name in expected} == expected
    assert len(parsed) == len(expected) + 1 + ("json" in parsed)


PARSERS = find_command_parsers()
# Except flags that the command itself has.
SUGGESTED = [
    (command, flag)
    for command, flags in aliases.SUGGESTIONS.items()
    for flag in (flags if command else ())
    if f"--{flag}" not in PARSERS[command]._option_string_actions
]


@pytest.mark.parametrize(("command", "flag"), SUGGESTED)
def test_flags_of_other_tools_get_a_suggestion(command: str, flag: str, capsys: Capture) -> None:
    suggestion = aliases.SUGGESTIONS[command][flag]
    assert main([command, f"--{flag.replace('-', '_')}", "3"]) == 2
    problem, remedy = capsys.readouterr().err.splitlines()
    assert problem == f"mlxgpt: unknown argument '--{flag.replace('-', '_')}': {suggestion.reason}"
    assert remedy == f"  → {suggestion.remedy}"


def test_suggestions_name_only_existing_flags() -> None:
    every_flag = {flag for parser in PARSERS.values() for flag in parser._option_string_actions}
    remedies = [s.remedy for flags in aliases.SUGGESTIONS.values() for s in flags.values()]
    remedies += [s.remedy for s in aliases.VALUE_SUGGESTIONS.values()]
    remedies += aliases.COMMAND_SUGGESTIONS.values()
    for remedy in remedies:
        words = [word.strip(".,;:)") for word in remedy.split()]
        flags = {word for word in words if word.startswith("--") and word != "--"}
        assert flags <= every_flag | {"--hostfile", "--version"}, remedy
        for before, word in itertools.pairwise(words):
            if before == "mlxgpt" and word.isalpha():
                assert word in COMMANDS, remedy


@pytest.mark.parametrize(
    ("line", "problem", "remedy"),
    [
        ("train --iters 9", "mlx-lm counts micro-batches", "--max-steps N, with N = iters /"),
        ("train --out_dir x", "unknown argument '--out_dir'", "--run NAME"),
        ("train --dtype float16", "--dtype float16: float16 is not supported", "bfloat16"),
        ("train --dtype=float16", "--dtype float16: float16 is not supported", "bfloat16"),
        ("train --schedule linear", "it is called wsd", "--schedule wsd"),
        ("train --init_from scratch", "from random weights anyway", "leave it out"),
        ("train --compile=False", "nothing to set", "compiled automatically"),
        ("train --device cpu", "MLX uses the GPU", "MLXGPT_DEVICE=cpu"),
        ("train --from gpt2", "unknown argument '--from'", "--init-from RUN"),
        ("train tinystories --tier 2", "unknown argument 'tinystories'", "--source tinystories"),
        ("train my.toml", "unknown argument 'my.toml'", "--config my.toml"),
        ("train config/train_gpt2.py", "unknown argument", "--config FILE.toml"),
        ("generate --start hello", "the prompt has no flag", 'mlxgpt generate "PROMPT"'),
        ("generate --model gpt2 x", "a model is a run", "--run RUN"),
        ("export --to hf --out x", "unknown argument '--out'", "--output"),
        ("eval a --run b", "not allowed with argument RUN", "one of them"),
        ("info a --run b", "not allowed with argument RUN", "one of them"),
        ("runs mine", "lists all runs", "mlxgpt info mine"),
    ],
)
def test_unknown_arguments_get_a_suggestion(
    line: str, problem: str, remedy: str, capsys: Capture
) -> None:
    assert main(line.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert problem in lines[0]
    assert remedy in lines[1]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        *((name, f"use: {text}") for name, text in aliases.COMMAND_SUGGESTIONS.items()),
        ("tarin", "did you mean mlxgpt train?"),
        ("generat", "did you mean mlxgpt generate?"),
        ("zzz", "see: mlxgpt --help"),
    ],
)
def test_unknown_command_gets_a_suggestion(name: str, remedy: str) -> None:
    assert name not in COMMANDS
    with pytest.raises(UserError) as error:
        parse(name, "--tier", "1")
    assert (error.value.problem, error.value.remedy) == (f"unknown command {name!r}", remedy)


@pytest.mark.parametrize("command", ["eval", "info", "play"])
def test_run_is_an_argument_or_a_flag(command: str) -> None:
    assert parse(command, "mine")["run"] == parse(command, "--run", "mine")["run"] == "mine"
    assert parse(command, "--runs-dir", "r", "mine")["run"] == "mine"
    assert "run" not in parse(command)


def test_run_to_export_or_plot_is_an_argument_or_a_flag() -> None:
    for line in (["export", "--to", "hf"], ["runs", "--plot"]):
        assert parse(*line, "mine") == parse(*line, "--run", "mine")
        assert parse(line[0], "mine", *line[1:])["run"] == "mine"


@pytest.mark.parametrize("command", ["train", "compare", "check", "info"])
def test_help_shows_common_settings_and_help_all_shows_all(command: str, capsys: Capture) -> None:
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([command, flag])
        texts.append(capsys.readouterr().out)
        assert all(len(line) <= 80 for line in texts[-1].splitlines())
    short, full = texts
    assert f"all settings: mlxgpt {command} --help-all" in short
    for name in config.SECTION_BY_FIELD:
        flag = f"  --{name.replace('_', '-')}"
        assert flag in full
        assert (flag + " " in short) == (name in COMMON_SETTINGS)
    assert "tier 1: 4, tier 2: 6" in short


def test_help_states_the_default_of_every_flag() -> None:
    for name, parser in find_command_parsers().items():
        text = " ".join(parser.format_help().split()).replace("- ", "-")
        assert "example" in text, name
        for action in parser._actions:
            is_help = action.dest in ("help", argparse.SUPPRESS)
            is_setting = getattr(action, "setting", None)
            if is_help or is_setting or isinstance(action, argparse._SubParsersAction):
                continue
            is_required = action.required or not (action.option_strings or action.nargs == "?")
            has_default = "default" in (action.help or "") or action.help == "the same as RUN"
            assert has_default or is_required, (name, action.dest)


def test_units_and_common_settings_name_existing_settings() -> None:
    sampling = {"max_tokens"}
    assert UNITS.keys() - sampling <= config.SECTION_BY_FIELD.keys()
    assert set(COMMON_SETTINGS) <= config.SECTION_BY_FIELD.keys()
