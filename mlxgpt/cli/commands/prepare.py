"""`mlxgpt prepare`."""

from __future__ import annotations

import argparse
import shlex
from contextlib import closing
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags
from mlxgpt.cli.output import print_json, print_stderr

HELP = "turn text into token arrays"
DESCRIPTION = (
    "Turn text into token arrays in data/NAME. `train` does so on the way where it is needed.\n"
    "Interrupted, the same command goes on where it was."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="*",
        help="shakespeare (default), tinystories, tinystories-gpt4, openwebtext, storybook; any "
        "dataset of the hub, hf:OWNER/NAME or hf:OWNER/NAME:COLUMN; or files, folders and globs of "
        "text (<|endoftext|> between documents), JSON, Parquet, Arrow; FILE:COLUMN for another "
        "column than text",
    )
    parser.add_argument(
        "--val-source", nargs="+", metavar="PATH", help="validation text; default: a part of it"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="char|bpe|gpt2",
        help="one token a character; byte-level BPE trained on the text (default for stories and "
        "datasets of the hub); GPT-2's own",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="different tokens of a BPE (default: 4096)"
    )
    parser.add_argument(
        "--megabytes", type=float, metavar="N", help="length of the storybook (default: 10)"
    )
    parser.add_argument("--name", help="the data folder's name (default: from the source)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="of what is prepared, read every byte again and compare it with its hash",
    )
    add_folder_flags(parser, data=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.progress import PreparationDisplay

    as_json, source = args.pop("json", False), args.pop("source", ())
    with closing(PreparationDisplay()) as display:
        dataset = api.prepare(*source, progress=display.show_progress, **args)
    meta = dataset.meta
    if as_json:
        return print_json({"folder": str(dataset.folder), **asdict(meta)})
    print(
        f"{dataset.folder}: {meta.train.tokens:,} training tokens, {meta.val.tokens:,} validation "
        f"tokens, vocabulary {meta.vocab_size:,}"
    )
    tier = 1 if "tokenizer" not in meta.origin else 2  # characters are not named
    train_command = shlex.join(
        ["mlxgpt", "train", "--tier", str(tier), "--source", str(dataset.folder)]
    )
    print_stderr(f"train on it: {train_command}")
    return 0
