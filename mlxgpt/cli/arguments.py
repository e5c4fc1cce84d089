"""The commands and their arguments, with their help. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

from mlxgpt import __version__, config
from mlxgpt.cli.config_flags import (
    add_config_flags,
    add_dataclass_flags,
    add_folder_flags,
    add_run_flags,
    add_tier_flags,
)
from mlxgpt.cli.parser import CommandParser

AddCommand = Callable[[str, str, str], CommandParser]  # a command by name, help and text


def make_parser() -> CommandParser:
    """The parser of `mlxgpt`; its result has `command`, and what was given for it."""
    parser = CommandParser(
        prog="mlxgpt",
        description="Train a GPT from nothing on your own Mac, understand it, and keep it.",
        epilog=(
            "begin here:\n"
            "  mlxgpt train --tier 1          train on Tiny Shakespeare, fetched on the way\n"
            "  mlxgpt train --tier 2          train on short stories: a few hours\n"
            '  mlxgpt generate "ROMEO:"       let the newest run write\n\n'
            "mlxgpt COMMAND --help explains one command."
        ),
    )
    parser.add_argument("--version", action="version", version=f"mlxgpt {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )

    def add_command(name: str, help: str, text: str) -> CommandParser:
        subparser: CommandParser = commands.add_parser(name, help=help, description=text)
        subparser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        return subparser

    for add_command_parser in (
        _add_prepare_parser,
        _add_train_parser,
        _add_compare_parser,
        _add_import_parser,
        _add_export_parser,
        _add_generate_parser,
        _add_eval_parser,
        _add_check_parser,
        _add_info_parser,
        _add_runs_parser,
        _add_report_parser,
        _add_play_parser,
        _add_bench_parser,
    ):
        add_command_parser(add_command)
    return parser


def _add_prepare_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "prepare",
        "turn text into token arrays",
        "Turn text into token arrays in data/NAME. `train` does so on the way where it is needed.\n"
        "Interrupted, the same command goes on where it was.",
    )
    subparser.add_argument(
        "source",
        nargs="*",
        help="shakespeare (default), tinystories, tinystories-gpt4, openwebtext, storybook; any "
        "dataset of the hub, hf:OWNER/NAME or hf:OWNER/NAME:COLUMN; or files, folders and globs of "
        "text (<|endoftext|> between documents), JSON, Parquet, Arrow; FILE:COLUMN for another "
        "column than text",
    )
    subparser.add_argument(
        "--val-source", nargs="+", metavar="PATH", help="validation text; default: a part of it"
    )
    subparser.add_argument(
        "--tokenizer",
        metavar="char|bpe|gpt2",
        help="one token a character; byte-level BPE trained on the text (default for stories and "
        "datasets of the hub); GPT-2's own",
    )
    subparser.add_argument(
        "--vocab-size", type=int, metavar="N", help="different tokens of a BPE (default: 4096)"
    )
    subparser.add_argument(
        "--megabytes", type=float, metavar="N", help="length of the storybook (default: 10)"
    )
    subparser.add_argument("--name", help="the data folder's name (default: from the source)")
    subparser.add_argument(
        "--verify",
        action="store_true",
        help="of what is prepared, read every byte again and compare it with its hash",
    )
    add_folder_flags(subparser, data=True)


def _add_train_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "train",
        "train a model, or resume a run",
        "Train a GPT. The same command again resumes a run that was stopped.\n\n"
        "  mlxgpt train --tier 2\n"
        "  mlxgpt train --tier 1 --source my.txt --max-minutes 10\n\n"
        "Every setting of the config has a flag; what isn't given comes from the tier's file.",
    )
    add_tier_flags(subparser)
    subparser.add_argument("--run", metavar="NAME", help="the run's name (default: CONFIG-DATA)")
    subparser.add_argument(
        "--from",
        dest="from_run",
        metavar="RUN",
        help="begin with this run's weights, shape and tokenizer: fine-tuning",
    )
    subparser.add_argument(
        "--max-minutes",
        type=float,
        metavar="M",
        help="plan as many steps as fit into M minutes; with --recipe modern and no tier, choose "
        "the model's size for them too",
    )
    subparser.add_argument(
        "--memory-limit", type=float, metavar="GB", help="refuse, or stop and save, above this"
    )
    subparser.add_argument(
        "--report-to",
        metavar="tensorboard|wandb",
        help="give the records to one of these, too, where it is installed",
    )
    add_folder_flags(subparser, runs=True, data=True)
    add_config_flags(subparser)


def _add_compare_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "compare",
        "which of several settings is better, with its error",
        "Train variants side by side, the same seeds and the same order of the text for each, and\n"
        "say which is better. They are judged on the end of the training text, which is held\n"
        "back. Interrupted, the same command goes on; nothing is trained twice.\n\n"
        "  mlxgpt compare --vary dropout=0,0.1,0.2 --tier 1 --budget 5m\n"
        "  mlxgpt compare tier1 mine.toml --source my.txt --budget 2Mtokens --until-decided",
    )
    subparser.add_argument(
        "variants",
        nargs="*",
        metavar="FILE",
        help="configs, two or more; the first is what the others are compared with",
    )
    subparser.add_argument(
        "--vary",
        metavar="FIELD=X,Y,…",
        help="one setting's values instead, the others from --tier or --config",
    )
    add_tier_flags(subparser)
    subparser.add_argument(
        "--budget",
        required=True,
        metavar="B",
        help="how long each one trains: 5m, 10Mtokens or 2000steps; its schedule is as long",
    )
    subparser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="seeds of each (default: 3; until decided: at most 20)",
    )
    subparser.add_argument(
        "--until-decided",
        action="store_true",
        help="add seeds, up to --seeds, until it is decided; who is clearly worse gets no more",
    )
    subparser.add_argument(
        "--smallest",
        type=float,
        metavar="X",
        help="a difference in bits per byte too small to go on for",
    )
    subparser.add_argument(
        "--final",
        action="store_true",
        help="judge on the validation text; how often that was done stands in the ledger",
    )
    subparser.add_argument(
        "--name", help="the folder's name in runs/compare (default: from the variants)"
    )
    add_folder_flags(subparser, runs=True, data=True)
    add_config_flags(subparser)


def _add_import_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "import",
        "make a run of a model made elsewhere",
        "GPT-2's own weights, or others of its kind, as a run: generate, eval, info, export and\n"
        "train --from work on it.\n\n"
        "  mlxgpt import gpt2\n"
        "  mlxgpt import out-shakespeare-char/ckpt.pt --meta data/shakespeare_char/meta.pkl",
    )
    subparser.add_argument(
        "source",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2; OWNER/NAME on the Hugging Face "
        "hub; a folder with config.json and safetensors; or nanoGPT's ckpt.pt",
    )
    subparser.add_argument("--run", metavar="NAME", help="the run's name (default: the source's)")
    subparser.add_argument(
        "--meta", metavar="FILE", help="meta.pkl of nanoGPT's data, for a model of characters"
    )
    add_folder_flags(subparser, runs=True)


def _add_export_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "export",
        "write a model for transformers, mlx-lm or llama.cpp",
        "Write a run's model as another runtime loads it, with its tokenizer and a model card.\n\n"
        "  mlxgpt export --to hf\n"
        "  mlxgpt export --run stories --to gguf --quantize 8",
    )
    subparser.add_argument(
        "--to",
        required=True,
        metavar="hf|mlx-lm|gguf",
        help="transformers (and mlx-lm); mlx-lm, also quantized; llama.cpp and Ollama",
    )
    subparser.add_argument(
        "--quantize", type=int, metavar="BITS", help="8 or 4 bits a weight (default: float32)"
    )
    subparser.add_argument("--out", metavar="DIR", help="the folder (default: exports/RUN-TO)")
    add_run_flags(subparser)
    add_folder_flags(subparser, runs=True, data=True)


def _add_generate_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "generate",
        "let a trained model write",
        "Continue a prompt with a trained model; without one, write from the beginning.\n\n"
        '  mlxgpt generate "ROMEO:"\n'
        '  mlxgpt generate "ROMEO:" --samples 3 --temperature 0.7 --seed 1\n'
        "  mlxgpt generate --interactive",
    )
    subparser.add_argument(
        "prompt", nargs="?", help="how the text begins; one that begins with a dash after `--`"
    )
    subparser.add_argument(
        "--prompts",
        metavar="FILE",
        help="many prompts at once: one a line, or JSON, strings or objects with a field prompt",
    )
    subparser.add_argument(
        "--interactive", action="store_true", help="prompt after prompt, with history and settings"
    )
    subparser.add_argument(
        "--quantize",
        type=int,
        metavar="BITS",
        help="16, 8 or 4 bits a weight, less to read for each token; what it costs is said "
        "(default: 32)",
    )
    add_run_flags(subparser)
    add_folder_flags(subparser, runs=True, data=True)
    group = subparser.add_argument_group("sampling")
    add_dataclass_flags(group, config.SamplingParams)


def _add_eval_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "eval",
        "loss and bits per byte of a trained model",
        "Loss and bits per byte over the whole validation text, or over another text.",
    )
    add_run_flags(subparser)
    subparser.add_argument("--source", nargs="+", metavar="PATH", help="other text to evaluate on")
    subparser.add_argument(
        "--hellaswag",
        nargs="?",
        const="",
        metavar="FILE",
        help="how often it finds the right one of four endings the likeliest: HellaSwag's 10,042 "
        "examples, or a file's of that form",
    )
    subparser.add_argument("--limit", type=int, metavar="N", help="only the first N of these")
    subparser.add_argument(
        "--quality",
        action="store_true",
        help="let it write, and measure what that is worth beside real text and two controls",
    )
    add_folder_flags(subparser, runs=True, data=True)


def _add_check_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "check",
        "check what training rests on",
        "Check what training rests on, here and now, in seconds. `train` does so first.",
    )
    add_tier_flags(subparser)
    add_config_flags(subparser)


def _add_info_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "info",
        "what a tier or a run amounts to",
        "Parameters, cost and settings of a tier, a config or (default) the newest run.",
    )
    add_tier_flags(subparser)
    subparser.add_argument("--run", metavar="NAME", help="a run's name or folder")
    add_folder_flags(subparser, runs=True)
    add_config_flags(subparser)


def _add_runs_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "runs", "list the runs", "All runs, the newest first; or the curve of one."
    )
    subparser.add_argument(
        "--plot", metavar="RUN", help="draw the loss of a run, by name or folder"
    )
    add_folder_flags(subparser, runs=True)


def _add_report_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "report",
        "a page to look at, and to show",
        "Write one HTML file, which fetches nothing: how a run went, with its curves, samples and\n"
        "settings; several runs side by side; or a benchmark, or a comparison.\n\n"
        "  mlxgpt report mine other --output both.html\n"
        "  mlxgpt report benchmarks/reports/mine.json\n"
        "  mlxgpt report --watch                  while it trains, the newest run",
    )
    subparser.add_argument(
        "what",
        nargs="*",
        metavar="RUN|FILE.json",
        help="runs' names or folders (default: newest), or what bench or compare wrote",
    )
    subparser.add_argument(
        "--output",
        metavar="FILE.html",
        help="default: report.html, in the run's folder or here; or beside the JSON file",
    )
    subparser.add_argument(
        "--watch", action="store_true", help="write it anew every few seconds until it is finished"
    )
    add_folder_flags(subparser, runs=True)


def _add_play_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "play",
        "a page to play with a model, and to see inside",
        "Open a page on this machine: let the model write and see what else it could have said,\n"
        "look at its attention and its layers, and at what it could say at each age of its\n"
        "training, also while it trains. Other programs find it as OpenAI's API at /v1.\n\n"
        "  mlxgpt play\n"
        "  mlxgpt play mine --port 8123",
    )
    subparser.add_argument(
        "run", nargs="?", metavar="RUN", help="a name or folder (default: newest)"
    )
    subparser.add_argument(
        "--port", type=int, metavar="N", help="default: 8484; 0: any that is free"
    )
    subparser.add_argument("--no-browser", action="store_true", help="only say where the page is")
    add_folder_flags(subparser, runs=True)


def _add_bench_parser(add_command: AddCommand) -> None:
    subparser = add_command(
        "bench",
        "how fast both tiers are here",
        "Measure training and generation of Tier 1 and Tier 2 on this machine, each in a fresh\n"
        "process, in a few minutes; best with nothing else running. Writes a report that others\n"
        "can reproduce.\n\n"
        "  mlxgpt bench report A.json B.json     machines side by side\n"
        "  mlx.launch --hostfile hosts.json -- mlxgpt bench --distributed",
    )
    subparser.add_argument(
        "report",
        nargs="*",
        metavar="report FILE",
        help="show measurements from files, side by side",
    )
    subparser.add_argument("--tier", type=int, choices=(1, 2), help="measure only this tier")
    subparser.add_argument(
        "--distributed",
        action="store_true",
        help="measure a training step of Tier 2 on several machines instead, or on two processes "
        "of this one",
    )
    subparser.add_argument(
        "--out", metavar="DIR", help="where to write (default: benchmarks/reports)"
    )
