"""What each command does, as a function. These are mlxgpt's public names.

For the folders see config/resolve.py. Each function raises UserError for what a user can mend.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxgpt import config as configs
from mlxgpt.bench.benchmark import benchmark as benchmark
from mlxgpt.bench.benchmark import benchmark_together as benchmark_together
from mlxgpt.config import Config, DataConfig
from mlxgpt.config.resolve import PathLike, home, resolve
from mlxgpt.convert import exporting, importing
from mlxgpt.data import prepare as preparation
from mlxgpt.data.dataset import Dataset, is_prepared
from mlxgpt.data.prepare import Progress
from mlxgpt.data.sources import STORYBOOK, hub_text
from mlxgpt.data.token_array import Tokens
from mlxgpt.distributed.group import joined
from mlxgpt.evaluation import hellaswag as endings
from mlxgpt.evaluation import loss, sample_quality
from mlxgpt.evaluation.hellaswag import Result as HellaSwag
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.evaluation.sample_quality import Appraisal
from mlxgpt.experiments.compare import compare as compare
from mlxgpt.html_report.report import report as report
from mlxgpt.inference.generate import Generated, TextStream
from mlxgpt.loaded_model import load as load
from mlxgpt.model.parameters import flatten_params, load_parameters
from mlxgpt.playground.play import play as play
from mlxgpt.storage import run as run_folders
from mlxgpt.storage.info import Info as Info
from mlxgpt.storage.info import RunLine as RunLine
from mlxgpt.storage.info import found as found
from mlxgpt.storage.info import info as info
from mlxgpt.storage.info import runs as runs
from mlxgpt.storage.loading import data_of, opened
from mlxgpt.training import loop as train_loop
from mlxgpt.training import selfcheck
from mlxgpt.training.auto_size import SIZED
from mlxgpt.training.callbacks import Callback, CallbackList, Summary
from mlxgpt.training.estimate import must_fit
from mlxgpt.training.init_weights import SHAPE, init_from
from mlxgpt.training.job import TrainRequest
from mlxgpt.training.loggers import make_logger
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.training.selfcheck import Check
from mlxgpt.training.setup import setup
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

SHORT_VOCABULARY = 2048  # of a model of a size that fits into minutes, where none is given


def prepare(
    *source: PathLike,
    val_source: Sequence[PathLike] = (),
    name: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    megabytes: float | None = None,
    verify: bool = False,
    data_dir: PathLike | None = None,
    progress: Progress = lambda doing, done, total: None,
) -> Dataset:
    """Turn text into token arrays in DATA_DIR/NAME, or open them if they are there.

    Args:
        source: `shakespeare` (default), `tinystories`, `tinystories-gpt4`, `openwebtext`,
            `storybook`; a dataset of the hub, `hf:owner/name` or `hf:owner/name:column`; or files
            and folders: text, JSON, Parquet, Arrow; `FILE:COLUMN` for another column than `text`.
        val_source: validation text; default: a part of the source.
        name: the data folder's name; default: the corpus or the first file's stem, and the
            tokenizer.
        tokenizer: `char`, `bpe` or `gpt2`; default: `bpe` for stories and datasets of the hub, and
            where `vocab_size` is given; `gpt2` for openwebtext, else `char`.
        vocab_size: of a BPE; default: 4096.
        megabytes: length of the storybook; default: what is there, or 10.
        verify: read what is there whole, and compare it with its hashes, also where it was read
            before and did not change since.
        progress: is called with (doing, done, total), in bytes of text.
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
    request = preparation.PrepareRequest(
        data,
        vocab_size or 0,
        strict=vocab_size is not None,
        name=name,
        megabytes=megabytes,
        verify=verify,
    )
    dataset = preparation.find_or_prepare(request, home("data", data_dir), progress)
    if verify:
        logger.info("read whole: every byte is as it was written")
    return dataset


def train(
    tier: int | None = None,
    *,
    config: PathLike | Config | None = None,
    recipe: str | None = None,
    run: str | None = None,
    from_run: str | None = None,
    max_minutes: float | None = None,
    memory_limit: float | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    report_to: str | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Summary:
    """Train, or resume a run that was stopped.

    Args:
        tier: 1 or 2.
        config: a TOML file or a Config, instead of a tier.
        recipe: of the tier, `classic` (default) or `modern`. `modern` with `max_minutes` and no
            tier chooses a size for that time, this text and this machine.
        run: name or folder; default CONFIG-DATA.
        from_run: a run, trained or imported, to initialize from; its shape and tokenizer are taken,
            and without a tier or a config the settings of `finetune`.
        max_minutes: plan as many steps as fit into this time.
        memory_limit: gigabytes; training that takes more is refused, or stopped and saved.
        report_to: `tensorboard` or `wandb`, which get the metrics, too.
        callbacks: observe training; see training/callbacks.py.
        settings: any field of the config, such as `n_layer=6, source="my.txt"`.

    If Tier 1's text could not be downloaded, it trains on the built-in stories, and logs that.
    """
    fit_size = recipe == "modern" and bool(max_minutes) and not (tier or config or from_run)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(joined())
        observers = list(callbacks) if group.is_main else []
        if report_to and group.is_main:
            # First, so that it has every record also if another callback raises.
            observers.insert(0, stack.enter_context(make_logger(report_to)))
        events = CallbackList(observers)
        init_weights = None
        if fit_size:
            if group.size > 1:
                raise UserError(
                    "a model size can be chosen for one machine only",
                    "choose it by --tier 2, or --n-layer and --n-embd with --config.",
                )
            name, chosen = _to_be_sized(recipe, max_minutes, settings)
        elif from_run:
            parent = run_folders.find(from_run, home("runs", runs_dir))
            config = config or ("finetune" if tier is None else None)
            others = {k: v for k, v in settings.items() if k not in (*SHAPE, "block_size")}
            _, chosen = resolve(tier, config, recipe, **others)
            chosen, init_weights = init_from(parent, chosen, settings)
            name = parent.name
        else:
            name, chosen = resolve(tier, config, recipe, **settings)
        own_text = "source" in settings or "val_source" in settings
        request = TrainRequest(
            chosen,
            config_name=name,
            run_name=run,
            runs_dir=home("runs", runs_dir),
            data_dir=home("data", data_dir),
            max_minutes=max_minutes,
            fit_size=fit_size,
            memory_limit=memory_limit,
            fallback=STORYBOOK if tier == 1 and not own_text else None,
            strict_vocab=bool(settings.get("vocab_size")),
            init_weights=init_weights,
        )
        with setup(request, group, events) as job:
            run_to_end = partial(train_loop.train, group=group, callbacks=events)
            summary = retry_on_gpu_failure(run_to_end, job, group)
        events.on_train_end(summary)
        return summary


def _to_be_sized(
    recipe: str | None, minutes: float | None, settings: Mapping[str, Any]
) -> tuple[str, Config]:
    """The name and the config of a run whose model size is chosen for a training time."""
    if given := [name for name in SIZED if name in settings and name != "vocab_size"]:
        raise UserError(
            f"{given[0]} is given, and would be chosen for the {minutes:g} minutes",
            "leave it out; or add --tier 2, which has a size.",
        )
    _, chosen = resolve(2, None, recipe, **{"vocab_size": SHORT_VOCABULARY, **settings})
    return f"{recipe}-{minutes:g}min", chosen


def import_model(
    source: PathLike,
    *,
    run: str | None = None,
    meta: PathLike | None = None,
    runs_dir: PathLike | None = None,
) -> run_folders.Run:
    """Make a run of a model that was made elsewhere: to generate with, evaluate, train from.

    Args:
        source: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, `distilgpt2`, any GPT-2 of the
            Hugging Face hub as OWNER/NAME, a folder of one, or nanoGPT's ckpt.pt.
        run: the new run's name or folder; default: the source's.
        meta: the meta.pkl that nanoGPT's data of characters has.
    """
    foreign = importing.read(str(source), Path(meta) if meta else None)
    name = run or importing.name_of(str(source))
    folder = Path(name) if os.sep in name else home("runs", runs_dir) / name
    return importing.make_run(foreign, folder)


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        folder: where it lies.
        step: updates that the model was trained for.
        perplexity, quantized_perplexity: over the run's validation text, of the weights as they are
            and as they were quantized; None where nothing was quantized, or there is no such text.
    """

    folder: Path
    step: int
    perplexity: float | None = None
    quantized_perplexity: float | None = None


def export(
    *,
    to: str,
    run: str | None = None,
    checkpoint: str = "best",
    quantize: int | None = None,
    out: PathLike | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> Exported:
    """Write a run's model as another runtime loads it.

    Args:
        to: `hf` (transformers, and mlx-lm too), `mlx-lm`, or `gguf` (llama.cpp, Ollama).
        quantize: 8 or 4 bits a weight, for `mlx-lm` and `gguf`; default: float32.
        out: the folder; default: exports/RUN-TO.
    """
    for value, known, what in (
        (to, exporting.RUNTIMES, "--to"),
        (quantize, exporting.BITS, "bits"),
    ):
        if value is not None and value not in known:
            raise UserError(
                f"{what} {value} is none of {', '.join(map(str, known))}", "give one of these."
            )
    found, model, step = opened(run, checkpoint, runs_dir, fall_back=False)
    bits = f"-{quantize}bit" if quantize else ""
    folder = Path(out) if out else Path("exports") / f"{found.name}-{to}{bits}"
    parameters = flatten_params(model.parameters())
    exporting.export(found, parameters, step, folder, to, quantize)
    folder_of_data = home("data", data_dir) / (found.data_name or "")
    if not quantize or not found.data_name or not is_prepared(folder_of_data):
        return Exported(folder, step)
    dataset = data_of(found, home("data", data_dir))
    before = loss.evaluate(found, model, dataset.val).perplexity
    load_parameters(model, exporting.rounded(found.config.model, parameters, to, quantize))
    after = loss.evaluate(found, model, dataset.val).perplexity
    return Exported(folder, step, before, after)


def generate(
    prompt: str | Sequence[str] = "",
    *,
    run: str | None = None,
    checkpoint: str = "best",
    quantize: int | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    **sampling: Any,
) -> Generated:
    """Continue a prompt, or several, with a trained run; to do so again and again, `load` it.

    Args:
        prompt, sampling: see LoadedModel.generate.
        run, checkpoint, quantize: see `load`.
    """
    configs.sampling(sampling)  # what cannot be is refused before a model is read
    model = load(
        run, checkpoint=checkpoint, quantize=quantize, runs_dir=runs_dir, data_dir=data_dir
    )
    return model.generate(prompt, **sampling)


def stream(
    prompt: str = "",
    *,
    run: str | None = None,
    checkpoint: str = "best",
    quantize: int | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    **sampling: Any,
) -> TextStream:
    """As `generate`, one text piece by piece; see LoadedModel.stream."""
    configs.sampling(sampling)
    model = load(
        run, checkpoint=checkpoint, quantize=quantize, runs_dir=runs_dir, data_dir=data_dir
    )
    return model.stream(prompt, **sampling)


def evaluate(
    *,
    run: str | None = None,
    source: PathLike | Sequence[PathLike] = (),
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> Evaluation:
    """Loss of a run over its whole validation text, or over other text.

    Args:
        source: text files and folders; default: the validation text the run was trained with.
    """
    found, model, _ = opened(run, checkpoint, runs_dir)
    if source:
        given = [source] if isinstance(source, str | Path) else source
        paths = [str(path) for path in given]
        ids = preparation.encode_files(paths, found.tokenizer)
        tokens = Tokens(ids, found.config.model.vocab_size)
    else:
        tokens = data_of(found, home("data", data_dir)).val
    return loss.evaluate(found, model, tokens)


def hellaswag(
    *,
    file: PathLike | None = None,
    limit: int | None = None,
    run: str | None = None,
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HellaSwag:
    """How often a run finds the right one of HellaSwag's four endings the likeliest, by
    build-nanogpt's rule. Where the run's texts begin with a token, so do these.

    Args:
        file: examples of the same form; default: its validation split, fetched and kept.
        limit: only the first so many.
        progress: is called with the numbers of examples done and in all.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no example", "give 1 or more.")
    found, model, _ = opened(run, checkpoint, runs_dir)
    examples = endings.load(Path(file) if file else None)[:limit]

    def count(done: int, total: int, accuracy: float) -> None:
        progress(done, total)

    return endings.evaluate(model, found.tokenizer, examples, bos=found.bos, progress=count)


def appraise(
    *,
    run: str | None = None,
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> Appraisal:
    """What a run's generated texts are worth, beside held-out real ones and two controls; also
    written to the run's quality.json.
    """
    found, model, step = opened(run, checkpoint, runs_dir)
    dataset = data_of(found, home("data", data_dir))
    result = sample_quality.appraise(model, found.tokenizer, dataset)
    tree = {"step": step, **asdict(result)}
    files.write_atomically(
        found.folder / "quality.json",
        json.dumps(files.finite(tree), indent=1, ensure_ascii=False) + "\n",
    )
    return result


def check(
    tier: int | None = None, *, config: PathLike | Config | None = None, **settings: Any
) -> list[Check]:
    """Check what must hold before a long run; see training/selfcheck.py."""
    chosen = resolve(tier, config, **settings)[1]
    must_fit(chosen)
    return list(selfcheck.check(chosen))
