"""`mlxgpt play`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags, add_run_flags
from mlxgpt.cli.output import print_json, print_stderr

HELP = "open a web page to try and inspect a model"
DESCRIPTION = (
    "Open a web page on this machine: generate text and see the alternatives at each\n"
    "token, inspect attention and layers, and compare snapshots from the training\n"
    "history, also while the model trains. Other programs can use the\n"
    "OpenAI-compatible API at /v1.\n\n"
    "examples:\n"
    "  mlxgpt play\n"
    "  mlxgpt play my-run --port 8123"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser, checkpoint=False)
    parser.add_argument(
        "--port", type=int, metavar="N", help="TCP port; 0: any free one (default: 8484)"
    )
    parser.add_argument(
        "--no-browser",
        action="store_true",
        help="print the address, without opening a browser (default: open it)",
    )
    parser.add_argument(
        "--lang", choices=("en", "pt"), help="language of the page (default: the browser's)"
    )
    add_folder_flags(parser, runs=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api

    as_json = args.pop("json", False)

    def print_address(address: str, key: str) -> None:
        if as_json:
            print_json({"page": f"{address}/#{key}", "api": f"{address}/v1", "key": key})
            sys.stdout.flush()
        else:
            print_stderr(f"the page, until Ctrl-C: {address}/#{key}")
            print_stderr(f"for other programs: {address}/v1, as OpenAI's API, with the key {key}")

    api.play(ready=print_address, browser=not args.pop("no_browser", False), **args)
    return 0
