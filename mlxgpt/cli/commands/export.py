"""`mlxgpt export`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxgpt.cli.config_flags import add_folder_flags, add_run_flags
from mlxgpt.cli.output import print_json, print_stderr
from mlxgpt.utils.errors import UserError

if TYPE_CHECKING:
    from mlxgpt.convert.exporting import ExportResult

HELP = "export a model to transformers, mlx-lm, llama.cpp, or one HTML file"
DESCRIPTION = (
    "Write a run's model in another runtime's format, with tokenizer and model card.\n\n"
    "examples:\n"
    "  mlxgpt export --to html\n"
    "  mlxgpt export --to hf\n"
    "  mlxgpt export stories --to gguf --quantize 8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        required=True,
        metavar="html|hf|mlx-lm|gguf|peft",
        help="html: one file that runs in a browser; hf: transformers and mlx-lm; mlx-lm: can be "
        "quantized; gguf: llama.cpp; peft: with --adapters (required)",
    )
    parser.add_argument(
        "--quantize",
        type=int,
        metavar="BITS",
        help="8 or 4 bits per weight, for html also 16 or 32 (default: float32; for html 8)",
    )
    parser.add_argument(
        "--snapshots",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="with --to html: also show what the model wrote at N steps of its training (default: "
        "none)",
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        default=argparse.SUPPRESS,
        help="only the LoRA adapters, --to peft or mlx-lm (default: the model fused with them)",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="folder to write, or file for html (default: exports/RUN-TO or exports/RUN.html)",
    )
    add_run_flags(parser)
    add_folder_flags(parser, runs=True, data=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api

    as_json, is_html = args.pop("json", False), args["to"] == "html"
    if is_html:
        result = _export_html(**args)
    elif args.pop("snapshots", 0):
        raise UserError("--snapshots is for --to html", "omit it, or export --to html.")
    else:
        result = api.export(**args)
    if as_json:
        return print_json(asdict(result))
    print(f"{result.folder}: the model after {result.step:,} steps")
    if result.loss and result.quantized_loss:
        print(f"loss           {result.loss:.4f} nats per token")
        print(f"quantized      {result.quantized_loss:.4f} nats per token")
    if is_html:
        print_stderr(f"open it in a browser: {result.folder.absolute().as_uri()}")
    else:
        print_stderr(f"how to run it: {result.folder}/README.md")
    return 0


def _export_html(to: str, adapters: bool = False, **args: Any) -> ExportResult:
    from mlxgpt import api

    if adapters:
        raise UserError("--to html does not support --adapters", "omit one of them.")
    return api.export_html(**{name: value for name, value in args.items() if value is not None})
