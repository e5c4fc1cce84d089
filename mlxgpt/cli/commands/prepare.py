"""`mlxgpt prepare`."""

from __future__ import annotations

import argparse
import shlex
from contextlib import closing
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags
from mlxgpt.cli.output import print_json, print_stderr

HELP = "tokenize a dataset"
DESCRIPTION = (
    "Tokenize text into data/NAME. `train` does this when needed. The same command\n"
    "resumes an interrupted preparation.\n\n"
    "examples:\n"
    "  mlxgpt prepare my.txt --name mine\n"
    "  mlxgpt prepare hf:OWNER/NAME --tokenizer bpe --vocab-size 8192"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="*",
        help="shakespeare, tinystories, tinystories-gpt4, openwebtext, synthetic; a dataset of the "
        "hub, hf:OWNER/NAME or hf:OWNER/NAME:COLUMN; or files, folders and globs of text "
        "(<|endoftext|> between documents), JSON, Parquet or Arrow; FILE:COLUMN for another column "
        "than text (default: shakespeare)",
    )
    parser.add_argument(
        "--val-source",
        nargs="+",
        metavar="PATH",
        help="validation text (default: a part of the source)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="char|bpe|gpt2",
        help="char: one token per character; bpe: byte-level BPE trained on the text; gpt2: "
        "GPT-2's (default: gpt2 for openwebtext; bpe for tinystories, hf: datasets and with "
        "--vocab-size; else char)",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="TOKENS", help="vocabulary size of a BPE (default: 4096)"
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        metavar="N",
        help="size of the synthetic stories in MB (default: 10)",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="name of the data folder (default: from the source)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="if it is prepared already, read every byte and compare the hashes (default: off)",
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
    tier = 1 if "tokenizer" not in meta.origin else 2  # the name omits the character tokenizer
    train_command = shlex.join(
        ["mlxgpt", "train", "--tier", str(tier), "--source", str(dataset.folder)]
    )
    print_stderr(f"train on it: {train_command}")
    return 0
