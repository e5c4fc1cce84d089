"""`mlxgpt generate`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt import config
from mlxgpt.cli.config_flags import add_dataclass_flags, add_folder_flags, add_run_flags
from mlxgpt.cli.output import print_json, print_stderr, write_stdout
from mlxgpt.utils.errors import UserError

HELP = "let a trained model write"
DESCRIPTION = (
    "Continue a prompt with a trained model; without one, write from the beginning.\n\n"
    '  mlxgpt generate "ROMEO:"\n'
    '  mlxgpt generate "ROMEO:" --samples 3 --temperature 0.7 --seed 1\n'
    "  mlxgpt generate --interactive"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "prompt", nargs="?", help="how the text begins; one that begins with a dash after `--`"
    )
    prompt.add_argument(
        "--prompts",
        metavar="FILE",
        help="many prompts at once: one a line, or JSON, strings or objects with a field prompt",
    )
    prompt.add_argument(
        "--interactive", action="store_true", help="prompt after prompt, with history and settings"
    )
    parser.add_argument(
        "--quantize",
        type=int,
        metavar="BITS",
        help="16, 8 or 4 bits a weight, less to read for each token; what it costs is said "
        "(default: 32)",
    )
    add_run_flags(parser)
    add_folder_flags(parser, runs=True, data=True)
    group = parser.add_argument_group("sampling")
    add_dataclass_flags(group, config.SamplingParams)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.prompts import read_prompts

    as_json, prompts_file = args.pop("json", False), args.pop("prompts", None)
    if args.pop("interactive", False):
        if as_json or "samples" in args:
            raise UserError(
                "--interactive asks for one prompt after the other",
                "leave out --samples and --json.",
            )
        from mlxgpt.cli.repl import run_repl

        run_repl(args, write_stdout, print_stderr)
        return 0
    if prompts_file is not None:
        args["prompt"] = read_prompts(prompts_file)
    is_single = args.get("samples", 1) == 1 and prompts_file is None
    if is_single and not as_json:
        stream = api.stream(**args)
        write_stdout(stream.prompt)
        for piece in stream:
            write_stdout(piece)
        print(flush=True)
        stream.log_long_texts()
        result = stream.result
    else:
        result = api.generate(**args)
    if as_json:
        return print_json(asdict(result))
    if not is_single:
        from mlxgpt.cli.tables import show_texts

        show_texts(result.texts)
    print_stderr(
        f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} a second, seed {result.seed}"
    )
    return 0
