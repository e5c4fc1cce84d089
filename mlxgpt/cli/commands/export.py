"""`mlxgpt export`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags, add_run_flags
from mlxgpt.cli.output import print_json, print_stderr

HELP = "export a model to transformers, mlx-lm or llama.cpp"
DESCRIPTION = (
    "Write a run's model in another runtime's format, with tokenizer and model card.\n\n"
    "examples:\n"
    "  mlxgpt export --to hf\n"
    "  mlxgpt export stories --to gguf --quantize 8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        required=True,
        metavar="hf|mlx-lm|gguf|peft",
        help="hf: transformers and mlx-lm; mlx-lm: can be quantized; gguf: llama.cpp; peft: with "
        "--adapters (required)",
    )
    parser.add_argument(
        "--quantize", type=int, metavar="BITS", help="8 or 4 bits per weight (default: float32)"
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        default=argparse.SUPPRESS,
        help="only the LoRA adapters, --to peft or mlx-lm (default: the model fused with them)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder to write (default: exports/RUN-TO)",
    )
    add_run_flags(parser)
    add_folder_flags(parser, runs=True, data=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api

    as_json = args.pop("json", False)
    result = api.export(**args)
    if as_json:
        return print_json(asdict(result))
    print(f"{result.folder}: the model after {result.step:,} steps")
    if result.perplexity and result.quantized_perplexity:
        print(f"perplexity     {result.perplexity:.4f}")
        print(f"quantized      {result.quantized_perplexity:.4f}")
    print_stderr(f"how to run it: {result.folder}/README.md")
    return 0
