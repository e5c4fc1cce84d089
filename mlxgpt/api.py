"""What each command does, as a function. These are mlxgpt's public names.

Folders default to `runs` and `data` under the environment's MLXGPT_HOME, or else under the
current folder. Each function raises UserError for what a user can mend.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgpt import config as configs
from mlxgpt import files
from mlxgpt.config import Config, DataConfig
from mlxgpt.corpus import prepare as preparation
from mlxgpt.corpus.dataset import Dataset, is_prepared, open_dataset
from mlxgpt.corpus.prepare import Progress
from mlxgpt.corpus.sources import STORYBOOK, hub_text
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.errors import UserError
from mlxgpt.evaluation import appraisal
from mlxgpt.evaluation.appraisal import Appraisal
from mlxgpt.evaluation.loss import Evaluation, Evaluator
from mlxgpt.inference import generation
from mlxgpt.inference.generation import Generated
from mlxgpt.model.gpt import GPT, count_parameters, flops_per_token, parameters_by_part
from mlxgpt.reports import report
from mlxgpt.storage import run as run_folders
from mlxgpt.training import selfcheck
from mlxgpt.training.callback import Callback, Summary
from mlxgpt.training.forecast import must_fit, training_bytes
from mlxgpt.training.launch import launch
from mlxgpt.training.selfcheck import Check

PathLike = str | Path


def home(kind: str, given: PathLike | None = None) -> Path:
    """The folder for `runs` or `data`."""
    return Path(given) if given else Path(os.environ.get("MLXGPT_HOME") or ".") / kind


def resolve(
    tier: int | None = None, config: PathLike | Config | None = None, **settings: Any
) -> tuple[str, Config]:
    """A config's name and content: a tier's, a TOML file's or one at hand, with settings changed
    by their plain names (`n_layer=6`).
    """
    if tier is not None and config is not None:
        raise UserError("a tier and a config are given", "give --tier or --config, not both.")
    if isinstance(config, Config):
        name, base = "custom", config
    elif config is not None:
        path = configs.built_in().get(str(config), Path(config))
        name, base = path.stem, configs.load(path)
    elif tier is not None:
        name, base = f"tier{tier}", configs.tier(tier)
    else:
        raise UserError("it is not said what to train", "give --tier 1, or --config FILE.")
    return name, configs.override(base, settings)


def prepare(
    *source: PathLike,
    val_source: Sequence[PathLike] = (),
    name: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    megabytes: float | None = None,
    data_dir: PathLike | None = None,
    note: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda doing, done, total: None,
) -> Dataset:
    """Turn text into token arrays in DATA_DIR/NAME, or open them if they are there.

    Args:
        source: `shakespeare` (default), `tinystories`, `tinystories-gpt4`, `openwebtext`,
            `storybook`; a dataset of the hub, `hf:owner/name` or `hf:owner/name:column`; or files
            and folders: text, JSON lines, Parquet.
        val_source: validation text; default: a part of the source.
        name: the data folder's name; default: the corpus or the first file's stem, and the
            tokenizer.
        tokenizer: `char`, `bpe` or `gpt2`; default: `bpe` for stories and datasets of the hub, and
            where `vocab_size` is given; `gpt2` for openwebtext, else `char`.
        vocab_size: of a BPE; default: 4096.
        megabytes: length of the storybook; default: what is there, or 10.
        note: takes a line on what is being done.
        progress: is told of (doing, done, total), in bytes of text.
    """
    if tokenizer is None:
        text = hub_text([str(name) for name in source])
        tokenizer = "bpe" if vocab_size else text.tokenizer if text else "char"
    elif vocab_size and tokenizer != "bpe":
        raise UserError(
            f"--tokenizer {tokenizer} has a vocabulary of its own",
            "leave out --vocab-size, or use --tokenizer bpe.",
        )
    values = {"source": source or DataConfig().source, "val_source": val_source}
    data = configs.from_tree({"data": {**values, "tokenizer": tokenizer}}).data
    return preparation.find_or_prepare(
        data,
        home("data", data_dir),
        vocab_size=vocab_size or 0,
        strict=vocab_size is not None,
        name=name,
        megabytes=megabytes,
        note=note,
        progress=progress,
    )


def train(
    tier: int | None = None,
    *,
    config: PathLike | Config | None = None,
    run: str | None = None,
    max_minutes: float | None = None,
    memory_limit: float | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Summary:
    """Train, or resume a run that was stopped.

    Args:
        tier: 1 or 2, or
        config: a TOML file or a Config.
        run: name or folder; default CONFIG-DATA.
        max_minutes: plan as many steps as fit into this time.
        memory_limit: gigabytes; a training that takes more is refused, or stopped and saved.
        callback: is told how it goes; see training/callback.py.
        settings: any field of the config, such as `n_layer=6, source="my.txt"`.

    Where its text cannot be had, Tier 1 goes on with the storybook, and says so.
    """
    name, chosen = resolve(tier, config, **settings)
    own_text = "source" in settings or "val_source" in settings
    return launch(
        chosen,
        config_name=name,
        run_name=run,
        runs_dir=home("runs", runs_dir),
        data_dir=home("data", data_dir),
        max_minutes=max_minutes,
        memory_limit=memory_limit,
        fallback=STORYBOOK if tier == 1 and not own_text else None,
        strict_vocab=bool(settings.get("vocab_size")),
        callback=callback,
    )


def generate(
    prompt: str = "",
    *,
    run: str | None = None,
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    stream: Callable[[str], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
    **sampling: Any,
) -> Generated:
    """Continue a prompt with a trained run.

    Args:
        prompt: the beginning; empty: a text from its own beginning.
        run: name or folder; default: the newest that has a checkpoint.
        checkpoint: `best`, `newest` or a step.
        stream: takes pieces of the first text as they are made.
        note: takes a line on what the user should know.
        sampling: any field of config.Sampling, such as `temperature=0.7, seed=1`.
    """
    chosen = configs.sampling(sampling)
    found, model, _ = _opened(run, checkpoint, runs_dir, note)
    return generation.generate(model, found.tokenizer, prompt, chosen, stream=stream, note=note)


def evaluate(
    *,
    run: str | None = None,
    source: Sequence[PathLike] = (),
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Loss of a run over its whole validation text, or over other text.

    Args:
        source: text files and folders; default: the validation text the run was trained with.
    """
    found, model, _ = _opened(run, checkpoint, runs_dir, note)
    if source:
        paths = [str(path) for path in source]
        ids, text_bytes = preparation.encode_files(paths, found.tokenizer)
        tokens = Tokens(ids, found.config.model.vocab_size)
    else:
        dataset = _data_of(found, home("data", data_dir))
        tokens, text_bytes = dataset.val, dataset.meta.val.bytes
    config = found.config
    evaluator = Evaluator(
        model,
        found.tokenizer,
        tokens,
        text_bytes,
        batch_size=config.train.batch_size,
        dtype=getattr(mx, config.train.dtype),
    )
    return evaluator()


def appraise(
    *,
    run: str | None = None,
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Appraisal:
    """What a run's generated texts are worth, beside held-out real ones and two controls; also
    written to the run's quality.json.
    """
    found, model, step = _opened(run, checkpoint, runs_dir, note)
    dataset = _data_of(found, home("data", data_dir))
    result = appraisal.appraise(model, found.tokenizer, dataset, note=note)
    tree = {"step": step, **asdict(result)}
    files.write_atomically(
        found.folder / "quality.json", json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
    )
    return result


def _opened(
    run: str | None,
    checkpoint: str,
    runs_dir: PathLike | None,
    note: Callable[[str], None],
) -> tuple[run_folders.Run, GPT, int]:
    """A run, the model of one of its checkpoints, and its step."""
    found = run_folders.find(run, home("runs", runs_dir))
    model, saved = run_folders.load_model(found, checkpoint, note)
    note(f"{found.folder}, step {saved.step:,}")
    return found, model, saved.step


def _data_of(run: run_folders.Run, data_dir: Path) -> Dataset:
    """The data that a run was trained with."""
    folder = data_dir / run.data_name
    if not is_prepared(folder):
        raise UserError(
            f"the data of {run.name} is not in {folder}",
            "give a text to evaluate on: --source FILE; or name its folder: --data-dir.",
        )
    dataset = open_dataset(folder)
    if dataset.meta.fingerprint != run.data_fingerprint:
        raise UserError(
            f"{folder} holds other data than {run.name} was trained with",
            "give a text to evaluate on: --source FILE.",
        )
    return dataset


def check(
    tier: int | None = None, *, config: PathLike | Config | None = None, **settings: Any
) -> list[Check]:
    """Check what must hold before a long run; see selfcheck.py."""
    chosen = resolve(tier, config, **settings)[1]
    must_fit(chosen)
    return list(selfcheck.check(chosen))


def benchmark(
    *, out: PathLike = "benchmarks/reports", note: Callable[[str], None] = lambda line: None
) -> tuple[report.Measurement, tuple[Path, Path]]:
    """Measure both tiers on this machine, and write a report: its JSON file and its Markdown file.

    Args:
        out: the folder of reports.
    """
    from mlxgpt.reports import bench

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write in {folder}: {error.strerror}", "choose another folder: --out DIR"
        ) from error
    measured = bench.measure({f"tier{n}": configs.tier(n) for n in (1, 2)}, note=note)
    return measured, report.write(measured, folder)


@dataclass(frozen=True)
class Info:
    """What a config or a run amounts to.

    Attributes:
        parameters: by part, and all.
        flops_per_token: of training, forward and backward.
        training_tokens: of the whole plan.
        memory_bytes: least memory for weights, gradients and AdamW's two moments.
    """

    name: str
    config: Config
    parameters: dict[str, int]
    flops_per_token: int
    training_tokens: int
    memory_bytes: int
    step: int | None = None
    val_loss: float | None = None


def info(
    tier: int | None = None,
    *,
    run: str | None = None,
    config: PathLike | Config | None = None,
    runs_dir: PathLike | None = None,
    **settings: Any,
) -> Info:
    """What a tier, a config or a run amounts to: shape, parameters, cost."""
    step = val_loss = None
    if tier is None and config is None:
        found = run_folders.find(run, home("runs", runs_dir))
        name, chosen = found.name, found.config
        step = found.steps()[-1] if found.steps() else None
        best = found.best()
        val_loss = best["val_loss"] if best else None
    else:
        name, chosen = resolve(tier, config, **settings)
    chosen = configs.with_vocabulary(chosen)
    m, t = chosen.model, chosen.train
    tokens = t.max_steps * t.batch_size * t.gradient_accumulation_steps * m.block_size
    return Info(
        name=name,
        config=chosen,
        parameters={**parameters_by_part(m), "all": count_parameters(m)},
        flops_per_token=flops_per_token(m),
        training_tokens=tokens,
        memory_bytes=training_bytes(m),
        step=step,
        val_loss=val_loss,
    )


@dataclass(frozen=True)
class RunLine:
    """One line of the list of runs."""

    name: str
    step: int
    steps: int
    val_loss: float | None
    parameters: int
    data: str


def runs(
    *, runs_dir: PathLike | None = None, note: Callable[[str], None] = lambda line: None
) -> list[RunLine]:
    """All runs, the newest first; `note` is told of damaged ones, which are left out."""
    lines = []
    for folder in run_folders.folders_in(home("runs", runs_dir)):
        try:
            run = run_folders.open_run(folder)
        except UserError as error:
            note(error.problem)
            continue
        best = run.best()
        lines.append(
            RunLine(
                name=run.name,
                step=max(run.steps(), default=0),
                steps=run.config.train.max_steps,
                val_loss=best["val_loss"] if best else None,
                parameters=count_parameters(run.config.model),
                data=run.data_name,
            )
        )
    return lines
