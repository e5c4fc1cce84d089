"""`mlxgpt learn`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxgpt.cli.output import print_json
from mlxgpt.utils.errors import UserError

HELP = "list the chapters of the course, or check what you wrote for one"
DESCRIPTION = (
    "List the chapters of the course in docs/learn, which builds a GPT step by step;\n"
    "or check the functions that you wrote for a chapter against mlxgpt's own.\n\n"
    "examples:\n"
    "  mlxgpt learn\n"
    "  mlxgpt learn check 4\n"
    "  mlxgpt learn check 4 --file exercises/block.py"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", nargs="?", choices=("check",), default=None, help="what to do (default: list)"
    )
    parser.add_argument(
        "chapter",
        nargs="?",
        type=int,
        default=None,
        metavar="CHAPTER",
        help="number of the chapter to check (default: none)",
    )
    parser.add_argument(
        "--file", metavar="FILE.py", help="file with your functions (default: my_gpt.py)"
    )


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt.learn.chapters import CHAPTERS

    as_json = args.get("json", False)
    if not args.get("action"):
        if as_json:
            return print_json([chapter._asdict() for chapter in CHAPTERS])
        for number, chapter in enumerate(CHAPTERS, 1):
            print(f"{number:2}  {chapter.english} / {chapter.portuguese}")
            print(f"    docs/learn/en/{chapter.slug}.ipynb, docs/learn/pt/{chapter.slug}.ipynb")
        return 0
    if args.get("chapter") is None:
        raise UserError("which chapter?", "use: mlxgpt learn check N; mlxgpt learn lists them.")
    from mlxgpt.learn.checks import run_checks
    from mlxgpt.learn.reader_file import load_functions

    results = run_checks(args["chapter"], load_functions(Path(args.get("file", "my_gpt.py"))))
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        for result in results:
            print(f"{'FAILED' if result.problem else 'ok':6}  {result.claim}")
            if result.problem:
                print(f"        {result.problem}")
    return 1 if any(result.problem for result in results) else 0
