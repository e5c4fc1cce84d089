"""`mlxgpt play`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags
from mlxgpt.cli.output import print_json, print_stderr

HELP = "a page to play with a model, and to see inside"
DESCRIPTION = (
    "Open a page on this machine: let the model write and see what else it could have said,\n"
    "look at its attention and its layers, and at what it could say at each age of its\n"
    "training, also while it trains. Other programs find it as OpenAI's API at /v1.\n\n"
    "  mlxgpt play\n"
    "  mlxgpt play mine --port 8123"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="a name or folder (default: newest)")
    parser.add_argument("--port", type=int, metavar="N", help="default: 8484; 0: any that is free")
    parser.add_argument("--no-browser", action="store_true", help="only say where the page is")
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
