"""Flags and commands of nanoGPT, mlx-lm and Hugging Face, and their names in mlxgpt.

A flag with exactly our meaning is accepted as an alias (`ALIASES`), also with underscores. Others
are refused with the flag to use and the conversion (`SUGGESTIONS`, `COMMAND_SUGGESTIONS`).
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlxgpt.utils.errors import UserError

# Foreign flag -> ours, without leading dashes; same unit, same meaning.
ALIASES = {
    # nanoGPT: an iteration is an optimizer update (its loop does one more than max_iters)
    "max-iters": "max-steps",
    "warmup-iters": "warmup-steps",
    "lr-decay-iters": "decay-steps",
    "num-samples": "samples",
    # mlx-lm
    "temp": "temperature",
    "grad-accumulation-steps": "gradient-accumulation-steps",
    "grad-checkpoint": "gradient-checkpointing",
    # Hugging Face: TrainingArguments, GenerationConfig, GPT2Config
    "lr": "learning-rate",
    "adam-beta1": "beta1",
    "adam-beta2": "beta2",
    "adam-epsilon": "eps",
    "max-grad-norm": "grad-clip",
    "logging-steps": "log-interval",
    "eval-steps": "eval-interval",
    "save-steps": "save-interval",
    "max-new-tokens": "max-tokens",
    "num-return-sequences": "samples",
    "hidden-size": "n-embd",
    "num-hidden-layers": "n-layer",
    "num-attention-heads": "n-head",
    "n-positions": "block-size",
    "max-position-embeddings": "block-size",
}


class Suggestion(NamedTuple):
    """Why a foreign flag is refused, and what to use instead."""

    reason: str
    remedy: str


MICRO_BATCHES = "mlx-lm counts micro-batches, mlxgpt optimizer updates"
NO_FLAG = "there is nothing to set"
ADAPTER_PATH = Suggestion(
    "an adapter is a run of its own",
    "use --run RUN; for one of mlx-lm: mlxgpt import DIR --base RUN.",
)
CHOOSE_DEVICE = Suggestion(
    "MLX uses the GPU where there is one",
    "leave it out; to use the CPU, set MLXGPT_DEVICE=cpu in the environment.",
)
COMPILE = Suggestion(NO_FLAG, "leave it out; the training step is compiled automatically.")
FP16 = Suggestion(
    "float16 is not supported: gradients underflow without loss scaling",
    "use --dtype bfloat16 or --dtype float32.",
)
RUN_FOLDER = Suggestion(
    "a run is stored in RUNS_DIR/NAME", "use --run NAME, and --runs-dir DIR for the parent folder."
)
DATASET = Suggestion("datasets are named with --source", "use --source NAME or --source FILE.")
INIT_FROM = Suggestion(
    "initial weights come from a run",
    "use --init-from RUN; mlxgpt import gpt2 makes a run of GPT-2's weights.",
)
TRAINED_MODEL = Suggestion(
    "a model is a run", "use --run RUN; mlxgpt import OWNER/NAME makes a run of a model."
)
PER_DEVICE = Suggestion(
    "--batch-size counts the sequences of all devices",
    "use --batch-size N, with N = per-device batch size × number of devices.",
)
EVAL_TOKENS = Suggestion(
    "it counts batches; evaluation length is set in tokens",
    "use --eval-tokens N, with N = batches × batch size × block size.",
)
PROMPT = Suggestion("the prompt has no flag", 'use: mlxgpt generate "PROMPT"')
RESUME = Suggestion(
    "a stopped run resumes without a flag", "run the same mlxgpt train command again."
)
NAME_RUN = Suggestion("the run's name is used", "use --run NAME.")

_TRAINING = {
    # nanoGPT
    "out-dir": RUN_FOLDER,
    "dataset": DATASET,
    "eval-iters": EVAL_TOKENS,
    "eval-only": Suggestion("evaluation is a command", "use: mlxgpt eval RUN"),
    "always-save-checkpoint": Suggestion(
        NO_FLAG, "leave it out; every evaluation saves a checkpoint, --keep-checkpoints N are kept."
    ),
    "min-lr": Suggestion(
        "the final learning rate is a ratio here",
        "use --min-lr-ratio R, with R = min_lr / learning_rate.",
    ),
    "decay-lr": Suggestion(
        "the schedule always decays to a ratio of the peak",
        "use --min-lr-ratio 1 for a constant learning rate, or leave it out.",
    ),
    "wandb-log": Suggestion("loggers are named", "use --report-to wandb."),
    "wandb-project": Suggestion("the project is always mlxgpt", "use --report-to wandb."),
    "wandb-run-name": NAME_RUN,
    "backend": Suggestion(
        "the launcher chooses the backend",
        "use: mlx.launch --hostfile hosts.json -- mlxgpt train …; see docs/distributed.md.",
    ),
    # nanochat, build-nanogpt
    "depth": Suggestion("width and depth are set separately", "use --n-layer, --n-embd, --n-head."),
    "num-iterations": Suggestion(
        "training length is set in optimizer updates", "use --max-steps N."
    ),
    "device-batch-size": PER_DEVICE,
    "total-batch-size": Suggestion(
        "it counts tokens",
        "use --gradient-accumulation-steps N, with N = tokens / (batch size × block size).",
    ),
    # mlx-lm
    "iters": Suggestion(
        MICRO_BATCHES, "use --max-steps N, with N = iters / gradient accumulation steps."
    ),
    "steps-per-report": Suggestion(
        MICRO_BATCHES, "use --log-interval N, with N = steps / gradient accumulation steps."
    ),
    "steps-per-eval": Suggestion(
        MICRO_BATCHES, "use --eval-interval N, with N = steps / gradient accumulation steps."
    ),
    "save-every": Suggestion(
        MICRO_BATCHES, "use --save-interval N, with N = steps / gradient accumulation steps."
    ),
    "val-batches": EVAL_TOKENS,
    "max-seq-length": Suggestion(
        "both cut examples to this length; mlxgpt packs plain text into blocks",
        "use --block-size TOKENS.",
    ),
    "mask-prompt": Suggestion("mlxgpt trains only the answers anyway", "leave it out."),
    "model": INIT_FROM,
    "data": DATASET,
    "test": Suggestion("evaluation is a command", "use: mlxgpt eval RUN"),
    "resume-adapter-file": RESUME,
    "fine-tune-type": Suggestion(
        "a rank selects LoRA",
        "use --lora-rank 8, with --dora for DoRA; without it, train all weights.",
    ),
    "num-layers": Suggestion(
        "mlx-lm adapts this many layers",
        "use --lora-layers N; --n-layer N is the number of blocks.",
    ),
    # Hugging Face
    "model-name-or-path": INIT_FROM,
    "dataset-name": DATASET,
    "train-file": DATASET,
    "validation-file": Suggestion(
        "validation text is named with --val-source", "use --val-source FILE."
    ),
    "output-dir": RUN_FOLDER,
    "run-name": NAME_RUN,
    "per-device-train-batch-size": PER_DEVICE,
    "per-device-eval-batch-size": Suggestion(NO_FLAG, "leave it out."),
    "num-train-epochs": Suggestion(
        "training length is set in optimizer updates",
        "use --max-steps N, with N = epochs × training tokens / tokens per update.",
    ),
    "epochs": Suggestion(
        "training length is set in optimizer updates",
        "use --max-steps N, with N = epochs × training tokens / tokens per update.",
    ),
    "warmup-ratio": Suggestion(
        "warmup is set in optimizer updates", "use --warmup-steps N, with N = ratio × max steps."
    ),
    "lr-scheduler-type": Suggestion(
        "the schedule is cosine or wsd (warmup, stable, linear decay)",
        "use --schedule cosine or --schedule wsd.",
    ),
    "optim": Suggestion("the optimizer is adamw or muon", "use --optimizer adamw."),
    "save-total-limit": Suggestion(
        "Hugging Face counts the best checkpoint, mlxgpt keeps it in addition",
        "use --keep-checkpoints N, with N = limit − 1.",
    ),
    "resume-from-checkpoint": RESUME,
    "resume": RESUME,
    "bf16": Suggestion("the dtype has one flag", "use --dtype bfloat16."),
    "fp16": FP16,
    "torch-compile": COMPILE,
    # earlier versions of mlxgpt
    "from": Suggestion("it is --init-from now", "use --init-from RUN."),
    "smallest": Suggestion("it is --min-effect now", "use --min-effect X."),
    "final": Suggestion("it is --on-validation now", "use --on-validation."),
}

_MODEL = {
    "model": TRAINED_MODEL,
    "model-path": TRAINED_MODEL,
    "model-name-or-path": TRAINED_MODEL,
    "hf-path": TRAINED_MODEL,
    "init-from": TRAINED_MODEL,
    "adapter-path": ADAPTER_PATH,
    "out-dir": Suggestion(
        "a run is chosen by its name", "use --run RUN, and --runs-dir DIR for the parent folder."
    ),
}

# Command ("": every command) -> foreign flag without leading dashes -> suggestion.
SUGGESTIONS: dict[str, dict[str, Suggestion]] = {
    "": {
        "compile": COMPILE,
        "device": CHOOSE_DEVICE,
        "no-cuda": CHOOSE_DEVICE,
        "use-cpu": CHOOSE_DEVICE,
        "adapter-path": ADAPTER_PATH,
        "out": Suggestion("the output has one name everywhere", "use --output."),
    },
    "train": _TRAINING,
    "compare": _TRAINING,
    "scale": _TRAINING,
    "check": _TRAINING,
    "info": {**_TRAINING, **_MODEL},
    "generate": {
        **_MODEL,
        "start": PROMPT,
        "prompt": PROMPT,
        "max-length": Suggestion(
            "Hugging Face counts the prompt, --max-tokens does not",
            "use --max-tokens N, with N = max length − prompt tokens.",
        ),
        "min-new-tokens": Suggestion("there is no minimum length", "leave it out."),
        "do-sample": Suggestion(
            "sampling is on above temperature 0", "use --temperature 0 for greedy decoding."
        ),
        "num-beams": Suggestion("there is no beam search", "use --samples N, or leave it out."),
        "stop-strings": Suggestion(
            "Hugging Face keeps the stop string, mlxgpt ends before it", "use --stop TEXT."
        ),
        "repetition-context-size": Suggestion(
            "the penalty counts the whole context", "leave it out."
        ),
        "load-in-8bit": Suggestion("quantization is in bits", "use --quantize 8."),
        "load-in-4bit": Suggestion("quantization is in bits", "use --quantize 4."),
        "dtype": Suggestion("weights are float32", "use --quantize 16 for bfloat16 weights."),
    },
    "eval": {
        **_MODEL,
        "dataset": DATASET,
        "data": DATASET,
        "tasks": Suggestion("the only task is HellaSwag", "use --hellaswag."),
        "num-samples": Suggestion("--limit counts HellaSwag examples", "use --limit N."),
    },
    "export": {
        **_MODEL,
        "mlx-path": Suggestion("the folder is --output", "use --output DIR."),
        "outfile": Suggestion("the folder is --output", "use --output DIR."),
        "outtype": Suggestion("quantization is in bits", "use --quantize 8."),
        "output-dir": Suggestion("the folder is --output", "use --output DIR."),
        "q-bits": Suggestion("quantization is one flag", "use --quantize BITS."),
    },
    "play": {
        **_MODEL,
        "host": Suggestion(
            "the server listens on 127.0.0.1 only",
            "leave it out; from another machine: ssh -L 8484:127.0.0.1:8484 HOST.",
        ),
        "api-key": Suggestion("a new key is made at each start", "leave it out; it is printed."),
    },
    "import": {
        "hf-path": Suggestion("the model has no flag", "use: mlxgpt import OWNER/NAME"),
        "model": Suggestion("the model has no flag", "use: mlxgpt import OWNER/NAME"),
        "out-dir": Suggestion("the model has no flag", "use: mlxgpt import OUT_DIR/ckpt.pt"),
    },
    "prepare": {
        "dataset": Suggestion("the source has no flag", "use: mlxgpt prepare NAME"),
        "source": Suggestion("the source has no flag", "use: mlxgpt prepare FILE"),
    },
}

# (flag as typed, value) -> suggestion. `--init_from` is nanoGPT's; a run may be named "resume".
VALUE_SUGGESTIONS: dict[tuple[str, str], Suggestion] = {
    ("--dtype", "float16"): FP16,
    ("--dtype", "fp16"): FP16,
    ("--schedule", "linear"): Suggestion(
        "it is called wsd: warmup, stable, linear decay", "use --schedule wsd."
    ),
    ("--init_from", "scratch"): Suggestion(
        "training starts from random weights anyway", "leave it out."
    ),
    ("--init_from", "resume"): RESUME,
}

# Command of another tool -> the equivalent here.
COMMAND_SUGGESTIONS = {
    "serve": "mlxgpt play",
    "server": "mlxgpt play",
    "sample": "mlxgpt generate",
    "talk": "mlxgpt chat",
    "repl": "mlxgpt generate --interactive",
    "finetune": "mlxgpt train --init-from RUN",
    "fine-tune": "mlxgpt train --init-from RUN",
    "lora": "mlxgpt train --init-from RUN --lora-rank 8",
    "tune": "mlxgpt train --init-from RUN, or to compare settings mlxgpt compare",
    "sweep": "mlxgpt compare",
    "resume": "mlxgpt train, with the same flags as before",
    "pretrain": "mlxgpt train",
    "evaluate": "mlxgpt eval",
    "test": "mlxgpt eval",
    "benchmark": "mlxgpt bench",
    "convert": "mlxgpt import, or mlxgpt export",
    "quantize": "mlxgpt export --to mlx-lm --quantize 8",
    "list": "mlxgpt runs",
    "ls": "mlxgpt runs",
    "show": "mlxgpt info RUN",
    "plot": "mlxgpt runs --plot RUN",
    "tokenize": "mlxgpt prepare",
    "download": "mlxgpt prepare for datasets, or mlxgpt import for models",
    "help": "mlxgpt --help",
    "version": "mlxgpt --version",
}


def unknown_command_error(name: str, commands: Sequence[str]) -> UserError:
    """The error for an unknown command, with a suggestion."""
    if suggestion := COMMAND_SUGGESTIONS.get(name.replace("_", "-")):
        remedy = f"use: {suggestion}"
    elif matches := difflib.get_close_matches(name, commands, 1, 0.6):
        remedy = f"did you mean mlxgpt {matches[0]}?"
    else:
        remedy = "see: mlxgpt --help"
    return UserError(f"unknown command {name!r}", remedy)


def translate_args(
    command: str, args: Sequence[str], actions: Mapping[str, argparse.Action]
) -> list[str]:
    """Replace aliases and underscores in a command's arguments by our flags, up to `--`.

    Args:
        actions: the command's flags.

    Raises:
        UserError: if another tool's flag has a different meaning here; has the conversion.
    """
    translated: list[str] = []
    for i, arg in enumerate(args):
        if arg == "--":
            return [*translated, *args[i:]]
        typed_flag, separator, value = arg.partition("=")
        if not typed_flag.startswith("--") or " " in typed_flag:
            translated.append(arg)
            continue
        flag = _find_flag(command, typed_flag, actions)
        values = (value,) if separator else tuple(args[i + 1 : i + 2])
        for name in (typed_flag, flag):
            if values and (suggestion := VALUE_SUGGESTIONS.get((name, values[0]))):
                raise UserError(f"{typed_flag} {values[0]}: {suggestion.reason}", suggestion.remedy)
        # nanoGPT's --bias=False
        is_boolean = isinstance(actions.get(flag), argparse.BooleanOptionalAction)
        if is_boolean and separator and value in ("True", "False"):
            translated.append(flag if value == "True" else f"--no-{flag[2:]}")
        else:
            translated.append(f"{flag}{separator}{value}")
    return translated


def _find_flag(command: str, typed_flag: str, actions: Mapping[str, argparse.Action]) -> str:
    """Our flag for a typed one; the typed flag if it is unknown."""
    name = typed_flag[2:].replace("_", "-")
    for flag in (typed_flag, f"--{name}", f"--{ALIASES.get(name)}"):
        if flag in actions:
            return flag
    suggestion = SUGGESTIONS.get(command, {}).get(name) or SUGGESTIONS[""].get(name)
    if suggestion:
        raise UserError(f"unknown argument {typed_flag!r}: {suggestion.reason}", suggestion.remedy)
    return typed_flag
