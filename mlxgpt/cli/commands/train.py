"""`mlxgpt train`."""

from __future__ import annotations

import argparse
import shlex
from contextlib import closing
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_config_flags, add_folder_flags, add_tier_flags
from mlxgpt.cli.output import EXIT_INTERRUPTED, print_json, print_stderr
from mlxgpt.distributed.launcher import get_rank, prepend_launcher

HELP = "train a model, or resume a run"
DESCRIPTION = (
    "Train a GPT. The same command resumes a stopped run. Settings that are not given\n"
    "come from the tier's file, or from --config.\n\n"
    "examples:\n"
    "  mlxgpt train --tier 2\n"
    "  mlxgpt train --tier 1 --source my.txt --max-minutes 10\n"
    "  mlxgpt train --init-from gpt2 --source my.txt        fine-tune a run\n"
    "  mlxgpt train --init-from gpt2 --source talk.jsonl    on conversations\n"
    "  mlxgpt train --init-from gpt2 --source my.txt --lora-rank 8    with LoRA"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_tier_flags(parser)
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: CONFIG-DATA)")
    parser.add_argument(
        "--init-from",
        metavar="RUN",
        help="fine-tune: initialize from this run's weights, with its shape and tokenizer "
        "(default: random weights)",
    )
    parser.add_argument(
        "--max-minutes",
        type=float,
        metavar="MINUTES",
        help="set --max-steps to what fits into this time; without a tier, also choose the model "
        "size, with --recipe racing (default there) or modern (default: no limit)",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="refuse to start, or save and stop, above this (default: no limit)",
    )
    parser.add_argument(
        "--report-to",
        metavar="tensorboard|wandb",
        help="log the metrics there as well (default: none)",
    )
    add_folder_flags(parser, runs=True, data=True)
    add_config_flags(parser)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.training_display import TrainingDisplay

    as_json = args.pop("json", False)
    with closing(TrainingDisplay()) as display:
        summary = api.train(callbacks=[display], **args)
    if as_json and get_rank() == 0:
        print_json(asdict(summary))
    if summary.interrupted and get_rank() == 0:
        resume_command = shlex.join(["mlxgpt", *command_line])
        print_stderr(f"resume with: {prepend_launcher(resume_command)}")
        return EXIT_INTERRUPTED
    return 0  # on all ranks: a launcher would kill the main one in the middle of a line
