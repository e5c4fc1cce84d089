"""What each command does, as a function. These are mlxgpt's public names.

For where folders lie see requests.py. Each function raises UserError for what a user can mend.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxgpt import config as configs
from mlxgpt import files
from mlxgpt.benchmarking import benchmark as benchmark
from mlxgpt.benchmarking import benchmark_together as benchmark_together
from mlxgpt.comparison import compare as compare
from mlxgpt.config import Config, DataConfig
from mlxgpt.corpus import prepare as preparation
from mlxgpt.corpus.dataset import Dataset, is_prepared
from mlxgpt.corpus.prepare import Progress
from mlxgpt.corpus.sources import STORYBOOK, hub_text
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.distributed.group import joined
from mlxgpt.errors import UserError
from mlxgpt.evaluation import appraisal, loss
from mlxgpt.evaluation import hellaswag as endings
from mlxgpt.evaluation.appraisal import Appraisal
from mlxgpt.evaluation.hellaswag import Result as HellaSwag
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.inference.generation import Generated
from mlxgpt.interchange import exporting, importing
from mlxgpt.loaded import load as load
from mlxgpt.model.gpt import flat, load_parameters
from mlxgpt.overview import Info as Info
from mlxgpt.overview import RunLine as RunLine
from mlxgpt.overview import found as found
from mlxgpt.overview import info as info
from mlxgpt.overview import runs as runs
from mlxgpt.playing import play as play
from mlxgpt.reporting import report as report
from mlxgpt.requests import PathLike, data_of, home, opened, resolve
from mlxgpt.storage import run as run_folders
from mlxgpt.tracking import Tracker
from mlxgpt.training import selfcheck
from mlxgpt.training.beginning import SHAPE, begin_from
from mlxgpt.training.callback import Callback, Summary
from mlxgpt.training.forecast import must_fit
from mlxgpt.training.launch import launch
from mlxgpt.training.selfcheck import Check
from mlxgpt.training.sizing import SIZED

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
    note: Callable[[str], None] = lambda line: None,
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
    dataset = preparation.find_or_prepare(
        data,
        home("data", data_dir),
        vocab_size=vocab_size or 0,
        strict=vocab_size is not None,
        name=name,
        megabytes=megabytes,
        verify=verify,
        note=note,
        progress=progress,
    )
    if verify:
        note("read whole: every byte is as it was written")
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
    callback: Callback | None = None,
    **settings: Any,
) -> Summary:
    """Train, or resume a run that was stopped.

    Args:
        tier: 1 or 2, or
        config: a TOML file or a Config.
        recipe: of the tier, `classic` (default) or `modern`. `modern` with `max_minutes` and no
            tier chooses a size for that time, this text and this machine.
        run: name or folder; default CONFIG-DATA.
        from_run: a run, trained or imported, whose weights to begin with; its shape and tokenizer
            are taken, and without a tier or a config the settings of `finetune`.
        max_minutes: plan as many steps as fit into this time.
        memory_limit: gigabytes; a training that takes more is refused, or stopped and saved.
        report_to: `tensorboard` or `wandb`, which get the records, too.
        callback: is told how it goes; see training/callback.py.
        settings: any field of the config, such as `n_layer=6, source="my.txt"`.

    Where its text cannot be had, Tier 1 goes on with the storybook, and says so.
    """
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(joined())
        callback = callback if callback and group.is_main else Callback()
        if report_to and group.is_main:
            callback = stack.enter_context(contextlib.closing(Tracker(report_to, callback)))
        beginning = None
        alone = tier is None and config is None and from_run is None
        fit_size = recipe == "modern" and bool(max_minutes) and alone
        if fit_size:
            if group.size > 1:
                raise UserError(
                    "a size for the time there is can be chosen for one machine only",
                    "choose it by --tier 2, or --n-layer and --n-embd with --config.",
                )
            if mine := [name for name in SIZED if name in settings and name != "vocab_size"]:
                raise UserError(
                    f"{mine[0]} is given, and would be chosen for the {max_minutes:g} minutes",
                    "leave it out; or add --tier 2, which has a size.",
                )
            name, chosen = resolve(2, None, recipe, **{"vocab_size": SHORT_VOCABULARY, **settings})
            name = f"{recipe}-{max_minutes:g}min"
        elif from_run:
            parent = run_folders.find(from_run, home("runs", runs_dir))
            config = config or ("finetune" if tier is None else None)
            others = {k: v for k, v in settings.items() if k not in (*SHAPE, "block_size")}
            name, chosen = resolve(tier, config, recipe, **others)
            chosen, beginning = begin_from(parent, chosen, settings, callback.on_note)
            name = parent.name
        else:
            name, chosen = resolve(tier, config, recipe, **settings)
        own_text = "source" in settings or "val_source" in settings
        return launch(
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
            beginning=beginning,
            callback=callback,
            group=group,
        )


def import_model(
    source: PathLike,
    *,
    run: str | None = None,
    meta: PathLike | None = None,
    runs_dir: PathLike | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> run_folders.Run:
    """Make a run of a model that was made elsewhere: to generate with, evaluate, train from.

    Args:
        source: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, `distilgpt2`, any GPT-2 of the
            Hugging Face hub as OWNER/NAME, a folder of one, or nanoGPT's ckpt.pt.
        run: the new run's name or folder; default: the source's.
        meta: the meta.pkl that nanoGPT's data of characters has.
        note: takes a line on what is being done.
    """
    foreign = importing.read(str(source), note, Path(meta) if meta else None)
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
    note: Callable[[str], None] = lambda line: None,
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
    found, model, step = opened(run, checkpoint, runs_dir, note, fall_back=False)
    bits = f"-{quantize}bit" if quantize else ""
    folder = Path(out) if out else Path("exports") / f"{found.name}-{to}{bits}"
    parameters = flat(model.parameters())
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
    show: Callable[[str], None] = lambda piece: None,
    note: Callable[[str], None] = lambda line: None,
    **sampling: Any,
) -> Generated:
    """Continue a prompt, or several, with a trained run; to do so again and again, `load` it.

    Args:
        prompt, show, sampling: see loaded.Model.generate.
        run, checkpoint, quantize: see `load`.
        note: takes a line on what the user should know.
    """
    configs.sampling(sampling)  # what cannot be is refused before a model is read
    model = load(
        run,
        checkpoint=checkpoint,
        quantize=quantize,
        runs_dir=runs_dir,
        data_dir=data_dir,
        note=note,
    )
    return model.generate(prompt, show=show, note=note, **sampling)


def evaluate(
    *,
    run: str | None = None,
    source: PathLike | Sequence[PathLike] = (),
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Loss of a run over its whole validation text, or over other text.

    Args:
        source: text files and folders; default: the validation text the run was trained with.
    """
    found, model, _ = opened(run, checkpoint, runs_dir, note)
    if source:
        given = [source] if isinstance(source, str | Path) else source
        paths = [str(path) for path in given]
        ids = preparation.encode_files(paths, found.tokenizer, note)
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
    note: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HellaSwag:
    """How often a run finds the right one of HellaSwag's four endings the likeliest, by
    build-nanogpt's rule. Where the run's texts begin with a token, so do these.

    Args:
        file: examples of the same form; default: its validation split, fetched and kept.
        limit: only the first so many.
        progress: is told how many of all examples are done.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no example", "give 1 or more.")
    found, model, _ = opened(run, checkpoint, runs_dir, note)
    examples = endings.load(Path(file) if file else None, note)[:limit]

    def told(done: int, total: int, accuracy: float) -> None:
        progress(done, total)

    return endings.evaluate(model, found.tokenizer, examples, bos=found.bos, progress=told)


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
    found, model, step = opened(run, checkpoint, runs_dir, note)
    dataset = data_of(found, home("data", data_dir))
    result = appraisal.appraise(model, found.tokenizer, dataset, note=note)
    tree = {"step": step, **asdict(result)}
    files.write_atomically(
        found.folder / "quality.json",
        json.dumps(files.finite(tree), indent=1, ensure_ascii=False) + "\n",
    )
    return result


def check(
    tier: int | None = None, *, config: PathLike | Config | None = None, **settings: Any
) -> list[Check]:
    """Check what must hold before a long run; see selfcheck.py."""
    chosen = resolve(tier, config, **settings)[1]
    must_fit(chosen)
    return list(selfcheck.check(chosen))
