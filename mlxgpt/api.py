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
from mlxgpt.bench.benchmark import benchmark_distributed as benchmark_distributed
from mlxgpt.config import Config, DataConfig
from mlxgpt.config.resolve import PathLike, resolve_config, resolve_folder
from mlxgpt.convert import exporting, importing
from mlxgpt.data import prepare as preparation
from mlxgpt.data.dataset import Dataset, is_prepared
from mlxgpt.data.prepare import ProgressCallback
from mlxgpt.data.sources import SYNTHETIC, resolve_hub_dataset
from mlxgpt.data.token_array import TokenArray
from mlxgpt.distributed.group import init_process_group
from mlxgpt.evaluation import hellaswag as endings
from mlxgpt.evaluation import loss, sample_quality
from mlxgpt.evaluation.hellaswag import HellaSwagResult as HellaSwag
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.evaluation.sample_quality import SampleQuality
from mlxgpt.experiments.compare import compare as compare
from mlxgpt.html_report.report import report as report
from mlxgpt.inference.generate import GenerationOutput, TextStream
from mlxgpt.loaded_model import load as load
from mlxgpt.model.parameters import flatten_params, load_parameters
from mlxgpt.playground.play import play as play
from mlxgpt.storage import run as run_folders
from mlxgpt.storage.info import ConfigInfo as ConfigInfo
from mlxgpt.storage.info import RunSummary as RunSummary
from mlxgpt.storage.info import info as info
from mlxgpt.storage.info import runs as runs
from mlxgpt.storage.loading import load_run_model, open_run_dataset
from mlxgpt.training import loop as train_loop
from mlxgpt.training import selfcheck
from mlxgpt.training.auto_size import AUTO_SIZED_FIELDS
from mlxgpt.training.callbacks import Callback, CallbackList, TrainingSummary
from mlxgpt.training.estimate import check_model_memory
from mlxgpt.training.init_weights import ARCHITECTURE_FIELDS, load_init_weights
from mlxgpt.training.job import TrainRequest
from mlxgpt.training.loggers import make_logger
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.training.selfcheck import CheckResult
from mlxgpt.training.setup import setup_job
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

AUTO_SIZE_VOCAB_SIZE = 2048  # of a model of a size that fits into minutes, where none is given


def prepare(
    *source: PathLike,
    val_source: Sequence[PathLike] = (),
    name: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    megabytes: float | None = None,
    verify: bool = False,
    data_dir: PathLike | None = None,
    progress: ProgressCallback = lambda doing, done, total: None,
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
        hub_dataset = resolve_hub_dataset([str(name) for name in source])
        tokenizer = "bpe" if vocab_size else hub_dataset.tokenizer if hub_dataset else "char"
    elif vocab_size and tokenizer != "bpe":
        raise UserError(
            f"--tokenizer {tokenizer} has a vocabulary of its own",
            "leave out --vocab-size, or use --tokenizer bpe.",
        )
    values = {"source": source or DataConfig().source, "val_source": val_source}
    data_config = configs.config_from_tree({"data": {**values, "tokenizer": tokenizer}}).data
    request = preparation.PrepareRequest(
        data_config,
        vocab_size or 0,
        strict=vocab_size is not None,
        name=name,
        megabytes=megabytes,
        verify=verify,
    )
    dataset = preparation.find_or_prepare(request, resolve_folder("data", data_dir), progress)
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
) -> TrainingSummary:
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
        group = stack.enter_context(init_process_group())
        all_callbacks = list(callbacks) if group.is_main else []
        if report_to and group.is_main:
            # First, so that it has every record also if another callback raises.
            all_callbacks.insert(0, stack.enter_context(make_logger(report_to)))
        callback_list = CallbackList(all_callbacks)
        init_weights = None
        if fit_size:
            if group.size > 1:
                raise UserError(
                    "a model size can be chosen for one machine only",
                    "choose it by --tier 2, or --n-layer and --n-embd with --config.",
                )
            name, resolved_config = _resolve_auto_size(recipe, max_minutes, settings)
        elif from_run:
            parent = run_folders.find_run(from_run, resolve_folder("runs", runs_dir))
            config = config or ("finetune" if tier is None else None)
            other_settings = {
                k: v for k, v in settings.items() if k not in (*ARCHITECTURE_FIELDS, "block_size")
            }
            _, resolved_config = resolve_config(tier, config, recipe, **other_settings)
            resolved_config, init_weights = load_init_weights(parent, resolved_config, settings)
            name = parent.name
        else:
            name, resolved_config = resolve_config(tier, config, recipe, **settings)
        has_custom_source = "source" in settings or "val_source" in settings
        request = TrainRequest(
            resolved_config,
            config_name=name,
            run_name=run,
            runs_dir=resolve_folder("runs", runs_dir),
            data_dir=resolve_folder("data", data_dir),
            max_minutes=max_minutes,
            auto_size=fit_size,
            memory_limit=memory_limit,
            fallback_source=SYNTHETIC if tier == 1 and not has_custom_source else None,
            strict_vocab=bool(settings.get("vocab_size")),
            init_weights=init_weights,
        )
        with setup_job(request, group, callback_list) as job:
            run_to_end = partial(train_loop.run_training_loop, group=group, callbacks=callback_list)
            summary = retry_on_gpu_failure(run_to_end, job, group)
        callback_list.on_train_end(summary)
        return summary


def _resolve_auto_size(
    recipe: str | None, minutes: float | None, settings: Mapping[str, Any]
) -> tuple[str, Config]:
    """The name and the config of a run whose model size is chosen for a training time."""
    if size_settings := [
        name for name in AUTO_SIZED_FIELDS if name in settings and name != "vocab_size"
    ]:
        raise UserError(
            f"{size_settings[0]} is given, and would be chosen for the {minutes:g} minutes",
            "leave it out; or add --tier 2, which has a size.",
        )
    _, resolved_config = resolve_config(
        2, None, recipe, **{"vocab_size": AUTO_SIZE_VOCAB_SIZE, **settings}
    )
    return f"{recipe}-{minutes:g}min", resolved_config


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
    imported_model = importing.read_model(str(source), Path(meta) if meta else None)
    name = run or importing.default_run_name(str(source))
    folder = Path(name) if os.sep in name else resolve_folder("runs", runs_dir) / name
    return importing.create_imported_run(imported_model, folder)


@dataclass(frozen=True)
class ExportResult:
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
) -> ExportResult:
    """Write a run's model as another runtime loads it.

    Args:
        to: `hf` (transformers, and mlx-lm too), `mlx-lm`, or `gguf` (llama.cpp, Ollama).
        quantize: 8 or 4 bits a weight, for `mlx-lm` and `gguf`; default: float32.
        out: the folder; default: exports/RUN-TO.
    """
    for value, allowed, flag in (
        (to, exporting.RUNTIMES, "--to"),
        (quantize, exporting.QUANTIZE_BITS, "bits"),
    ):
        if value is not None and value not in allowed:
            raise UserError(
                f"{flag} {value} is none of {', '.join(map(str, allowed))}", "give one of these."
            )
    opened_run, model, step = load_run_model(run, checkpoint, runs_dir, fall_back=False)
    suffix = f"-{quantize}bit" if quantize else ""
    folder = Path(out) if out else Path("exports") / f"{opened_run.name}-{to}{suffix}"
    parameters = flatten_params(model.parameters())
    exporting.export_run(opened_run, parameters, step, folder, to, quantize)
    data_folder = resolve_folder("data", data_dir) / (opened_run.data_name or "")
    if not quantize or not opened_run.data_name or not is_prepared(data_folder):
        return ExportResult(folder, step)
    dataset = open_run_dataset(opened_run, resolve_folder("data", data_dir))
    perplexity_before = loss.evaluate_run(opened_run, model, dataset.val).perplexity
    load_parameters(
        model, exporting.fake_quantize(opened_run.config.model, parameters, to, quantize)
    )
    perplexity_after = loss.evaluate_run(opened_run, model, dataset.val).perplexity
    return ExportResult(folder, step, perplexity_before, perplexity_after)


def generate(
    prompt: str | Sequence[str] = "",
    *,
    run: str | None = None,
    checkpoint: str = "best",
    quantize: int | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    **sampling: Any,
) -> GenerationOutput:
    """Continue a prompt, or several, with a trained run; to do so again and again, `load` it.

    Args:
        prompt, sampling: see LoadedModel.generate.
        run, checkpoint, quantize: see `load`.
    """
    configs.parse_sampling_params(sampling)  # what cannot be is refused before a model is read
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
    configs.parse_sampling_params(sampling)
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
    opened_run, model, _ = load_run_model(run, checkpoint, runs_dir)
    if source:
        sources = [source] if isinstance(source, str | Path) else source
        paths = [str(path) for path in sources]
        ids = preparation.encode_files(paths, opened_run.tokenizer)
        tokens = TokenArray(ids, opened_run.config.model.vocab_size)
    else:
        tokens = open_run_dataset(opened_run, resolve_folder("data", data_dir)).val
    return loss.evaluate_run(opened_run, model, tokens)


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
    opened_run, model, _ = load_run_model(run, checkpoint, runs_dir)
    examples = endings.load_examples(Path(file) if file else None)[:limit]

    def report_progress(done: int, total: int, accuracy: float) -> None:
        progress(done, total)

    return endings.evaluate_hellaswag(
        model, opened_run.tokenizer, examples, bos=opened_run.bos, progress=report_progress
    )


def appraise(
    *,
    run: str | None = None,
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> SampleQuality:
    """What a run's generated texts are worth, beside held-out real ones and two controls; also
    written to the run's quality.json.
    """
    opened_run, model, step = load_run_model(run, checkpoint, runs_dir)
    dataset = open_run_dataset(opened_run, resolve_folder("data", data_dir))
    result = sample_quality.measure_sample_quality(model, opened_run.tokenizer, dataset)
    tree = {"step": step, **asdict(result)}
    files.write_atomically(
        opened_run.folder / "quality.json",
        json.dumps(files.replace_nonfinite(tree), indent=1, ensure_ascii=False) + "\n",
    )
    return result


def check(
    tier: int | None = None, *, config: PathLike | Config | None = None, **settings: Any
) -> list[CheckResult]:
    """Check what must hold before a long run; see training/selfcheck.py."""
    resolved_config = resolve_config(tier, config, **settings)[1]
    check_model_memory(resolved_config)
    return list(selfcheck.run_self_check(resolved_config))
