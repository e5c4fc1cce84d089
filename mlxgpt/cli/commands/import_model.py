"""`mlxgpt import`."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags
from mlxgpt.cli.output import print_json, print_stderr

HELP = "import a model from Hugging Face or nanoGPT as a run"
DESCRIPTION = (
    "Import GPT-2's weights, or another model of the same architecture, as a run for\n"
    "generate, eval, info, export and train --init-from.\n\n"
    "examples:\n"
    "  mlxgpt import gpt2\n"
    "  mlxgpt import out/ckpt.pt --meta data/shakespeare_char/meta.pkl\n"
    "  mlxgpt import my-adapters --base gpt2"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2; OWNER/NAME on the Hugging Face "
        "hub; a folder with config.json and safetensors; or nanoGPT's ckpt.pt (required)",
    )
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: from the source)")
    parser.add_argument(
        "--meta",
        metavar="FILE",
        help="meta.pkl of nanoGPT's data, for a character-level model (default: none)",
    )
    parser.add_argument(
        "--base",
        metavar="RUN",
        help="for a folder with LoRA adapters of PEFT or mlx-lm: the run they belong to "
        "(default: none)",
    )
    add_folder_flags(parser, runs=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.model.stats import count_parameters

    as_json = args.pop("json", False)
    run = api.import_model(args.pop("source"), **args)
    count = count_parameters(run.config.model)
    if as_json:
        return print_json({"run": run.folder, "parameters": count, "origin": run.origin})
    print(f"{run.folder}: {count:,} parameters, vocabulary {run.tokenizer.vocab_size:,}")
    example = "Alan Turing theorized that computers would one day become"
    prompt_args = [example] if run.config.data.tokenizer == "gpt2" else []
    print_stderr(
        "try it: " + shlex.join(["mlxgpt", "generate", "--run", str(run.folder), *prompt_args])
    )
    return 0
