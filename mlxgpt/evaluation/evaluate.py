"""`mlxgpt.evaluate`, `mlxgpt.hellaswag` and `mlxgpt.appraise`: evaluation of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.data import prepare as preparation
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_array import SplitArray
from mlxgpt.data.token_array import TokenArray
from mlxgpt.evaluation import loss, sample_quality
from mlxgpt.evaluation.hellaswag import HellaSwagResult, evaluate_hellaswag, load_examples
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.evaluation.sample_quality import SampleQuality
from mlxgpt.storage.loading import find_origin_run, load_run_model, open_run_dataset
from mlxgpt.storage.run import Run
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError


def evaluate(
    *,
    run: str | None = None,
    source: PathLike | Sequence[PathLike] = (),
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> Evaluation:
    """Compute a run's loss over its whole validation split, or over other text.

    Args:
        source: text files and folders; default: the run's validation split.
        run, checkpoint: see `load`.
    """
    opened_run, model, _ = load_run_model(run, checkpoint, runs_dir)
    if source:
        sources = [source] if isinstance(source, str | Path) else source
        paths = [str(path) for path in sources]
        ids = preparation.encode_files(paths, opened_run.tokenizer)
        tokens: SplitArray = TokenArray(ids, opened_run.config.model.vocab_size)
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
) -> HellaSwagResult:
    """Evaluate a run on HellaSwag, scored as in build-nanogpt. Contexts start with the run's start
    token, if it has one.

    Args:
        file: examples in HellaSwag's format; default: its validation split, downloaded and cached.
        limit: evaluate only the first `limit` examples.
        run, checkpoint: see `load`.
        progress: called with (examples done, total).
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no examples", "use 1 or more.")
    opened_run, model, _ = load_run_model(run, checkpoint, runs_dir)
    examples = load_examples(Path(file) if file else None)[:limit]

    def report_progress(done: int, total: int, accuracy: float) -> None:
        progress(done, total)

    return evaluate_hellaswag(
        model, opened_run.tokenizer, examples, bos=opened_run.bos, progress=report_progress
    )


def _open_text_dataset(run: Run, data_dir: Path) -> Dataset:
    """A run's dataset; if it consists of examples, that of the run it was initialized from, unless
    special tokens were added since.
    """
    dataset = open_run_dataset(run, data_dir)
    if not dataset.meta.has_examples:
        return dataset
    origin_run = find_origin_run(run)
    if not origin_run or origin_run.tokenizer.fingerprint != run.tokenizer.fingerprint:
        return dataset
    return _open_text_dataset(origin_run, data_dir)


def appraise(
    *,
    run: str | None = None,
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> SampleQuality:
    """Measure the quality of a run's samples, compared with held-out texts and two controls. Also
    writes the results to the run's quality.json. A run that was fine-tuned on prompts and answers
    is compared with the texts of the run that it was initialized from.
    """
    opened_run, model, step = load_run_model(run, checkpoint, runs_dir)
    dataset = _open_text_dataset(opened_run, resolve_folder("data", data_dir))
    result = sample_quality.measure_sample_quality(model, opened_run.tokenizer, dataset)
    tree = {"format": sample_quality.QUALITY_FORMAT, "step": step, **asdict(result)}
    files.write_atomically(
        opened_run.folder / "quality.json",
        json.dumps(json_files.replace_nonfinite(tree), indent=1, ensure_ascii=False) + "\n",
    )
    return result
