"""`mlxgpt generate`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt import config
from mlxgpt.cli.config_flags import (
    add_dataclass_flags,
    add_folder_flags,
    add_quantize_flag,
    add_run_flags,
)
from mlxgpt.cli.output import print_json, print_stderr, write_stdout
from mlxgpt.utils.errors import UserError

HELP = "generate text with a trained model"
DESCRIPTION = (
    "Continue a prompt with a trained model; without a prompt, start a new document.\n\n"
    "examples:\n"
    '  mlxgpt generate "ROMEO:"\n'
    '  mlxgpt generate "ROMEO:" --samples 3 --temperature 0.7 --seed 1\n'
    "  mlxgpt generate --interactive"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "prompt",
        nargs="?",
        help="text to continue; if it begins with a dash, put `--` before it (default: empty)",
    )
    prompt.add_argument(
        "--prompts",
        metavar="FILE",
        help="several prompts in one batch: one per line, or JSON strings or objects with a field "
        "prompt (default: none)",
    )
    prompt.add_argument(
        "--interactive",
        action="store_true",
        help="read prompts in a loop, with history and settings (default: off)",
    )
    add_quantize_flag(parser)
    parser.add_argument(
        "--no-adapter",
        dest="adapter",
        action="store_false",
        default=argparse.SUPPRESS,
        help="of a run with a LoRA adapter: use its base model (default: with the adapter)",
    )
    add_run_flags(parser, positional=False)
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
        from mlxgpt.cli.repl import GenerateRepl, run_repl

        run_repl(GenerateRepl, args, write_stdout, print_stderr)
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
        f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} tok/s, seed {result.seed}"
    )
    return 0
