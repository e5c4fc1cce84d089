"""Run mlxgpt and other libraries on the same tasks, in turn (A B A B), each in a fresh process and
with the same weights.

A process gets a task, a dictionary with the following fields:

    module, task   the framework's module in this package, and the function in it
    framework      its name in the report
    began          start time of its process, in seconds since 1970
    folder         the model's weights in transformers' format; for learning also the batches
    shape, config  ModelConfig's fields, and all of Config's
    batch_size, seconds, steps           training: how long it is timed; learning: number of steps
    texts, prompt_tokens, new_tokens     generation: batch size and lengths
    text, vocab_size                     preparation: a file, and the tokenizer's size
    nanogpt                              the folder of a nanoGPT checkout
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from baselines.records import MLXGPT, TaskResult
from mlxgpt.backend.cpu import jit
from mlxgpt.config import Config, override_config
from mlxgpt.convert import huggingface
from mlxgpt.data import synthetic
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Framework:
    """A library to measure, and the tasks it can do.

    Attributes:
        module: the module in this package that runs its tasks.
        required_package: the package that must be installed.
        uses_mlxgpt_blas: whether it runs on MLX with the BLAS that mlxgpt loads.
        has_kv_cache: in generation; without one, a batch of texts would take an hour.
    """

    name: str
    module: str
    tasks: tuple[str, ...]
    required_package: str | None = None
    uses_mlxgpt_blas: bool = False
    has_kv_cache: bool = True


MLXGPT_FRAMEWORK = Framework(
    MLXGPT, "mlxgpt_baseline", ("training", "generate", "learning", "preparation"), None, True
)
FRAMEWORKS = (
    MLXGPT_FRAMEWORK,
    Framework("PyTorch", "pytorch", ("training", "learning"), "torch"),
    Framework("PyTorch, compiled", "pytorch", ("training", "learning"), "torch"),
    Framework("transformers", "hugging_face", ("generate",), "transformers"),
    Framework("mlx-lm", "mlx_lm", ("training", "generate"), "mlx_lm", True),
    Framework("datasets.map", "datasets_map", ("preparation",), "datasets"),
)
NANOGPT_FRAMEWORK = Framework(
    "nanoGPT", "nanogpt", ("training", "generate"), "torch", has_kv_cache=False
)


@dataclass(frozen=True)
class BenchmarkSettings:
    """How much to measure in each task.

    Attributes:
        rounds: repetitions of every task.
        training_seconds: how long training is timed; at least two steps.
        max_batch_size: in training; tokens/s hardly depends on the batch size.
        learning_steps: length of the loss curve.
        corpus_megabytes: size of the text to prepare.
    """

    rounds: int = 5
    training_seconds: float = 5.0
    max_batch_size: int = 16
    learning_steps: int = 100
    corpus_megabytes: float = 3.0


DEFAULT_SETTINGS = BenchmarkSettings()


@dataclass(frozen=True)
class BenchmarkModel:
    """A model to measure.

    Attributes:
        config: config of the classic recipe, with `vocab_size` and `dtype` resolved.
        has_training: whether training is measured.
        batch_sizes: batch sizes of generation to measure.
    """

    name: str
    config: Config
    has_training: bool = True
    batch_sizes: tuple[int, ...] = (1, 8, 64)


def installed_frameworks(nanogpt: Path | None = None) -> tuple[list[Framework], list[str]]:
    """Frameworks that can run on this machine, and the packages missing for the others.

    Args:
        nanogpt: a nanoGPT checkout to measure as well.

    Raises:
        UserError: if that folder is not a nanoGPT checkout.
    """
    frameworks = [*FRAMEWORKS]
    if nanogpt is not None:
        if not files.is_file(nanogpt / "model.py"):
            raise UserError(
                f"{nanogpt} is not a nanoGPT checkout: it has no model.py",
                "give the folder that has nanoGPT's model.py: --nanogpt DIR",
            )
        frameworks.append(NANOGPT_FRAMEWORK)
    missing = sorted(
        {
            f.required_package
            for f in frameworks
            if f.required_package and not find_spec(f.required_package)
        }
    )
    return [f for f in frameworks if f.required_package not in missing], missing


def run_tasks(
    models: Sequence[BenchmarkModel],
    frameworks: Sequence[Framework],
    *,
    nanogpt: Path | None = None,
    settings: BenchmarkSettings = DEFAULT_SETTINGS,
) -> Iterator[TaskResult]:
    """Run all tasks with each model, then learning and preparation with the first one's config."""
    for model in models:
        with _exported_weights(model.config) as folder:
            block_size = model.config.model.block_size
            task = {
                **_base_task(model.config, folder),
                "nanogpt": str(nanogpt.resolve()) if nanogpt else "",
                "batch_size": min(model.config.train.batch_size, settings.max_batch_size),
                "seconds": settings.training_seconds,
                "prompt_tokens": block_size // 2,
                "new_tokens": block_size - block_size // 2,
            }
            task["config"]["train"]["batch_size"] = task["batch_size"]
            if model.has_training:
                yield _run_rounds(model.name, {**task, "task": "training"}, frameworks, settings)
            # Without a KV cache, a large model takes longer for one text than all other frameworks.
            generators = [f for f in frameworks if model.has_training or f.has_kv_cache]
            for batch_size in model.batch_sizes:
                generation_task = {**task, "task": "generate", "texts": batch_size}
                yield _run_rounds(model.name, generation_task, generators, settings)
    first_model = models[0]
    with _learning_task(first_model.config, settings) as task:
        for name in ("learning", "preparation"):
            yield _run_rounds(first_model.name, {**task, "task": name}, frameworks, settings)


def _base_task(config: Config, folder: Path) -> dict[str, Any]:
    shape, tree = asdict(config.model), asdict(config)
    return {"folder": str(folder), "shape": shape, "config": tree, "texts": 0, "steps": 0}


def _run_rounds(
    config_name: str,
    task: dict[str, Any],
    frameworks: Sequence[Framework],
    settings: BenchmarkSettings,
) -> TaskResult:
    name, batch_size = task["task"], task["texts"]
    result = TaskResult(config_name, name, batch_size)
    for round_index in range(settings.rounds):
        for framework in frameworks:
            if name not in framework.tasks or framework.name in result.failed:
                continue
            if batch_size > 1 and not framework.has_kv_cache:
                continue
            label = f"{config_name}, {name}" + (f" of {batch_size}" if batch_size else "")
            progress = f"round {round_index + 1} of {settings.rounds}"
            logger.info(f"{label}, {progress}: {framework.name} …")
            try:
                values = _run_in_process(framework, task)
            except UserError as error:
                result.failed[framework.name] = error.problem
                continue
            result.made_with[framework.name] = values.pop("made_with")
            result.rounds.setdefault(framework.name, []).append(values)
    return result


PROCESS_COMMAND = (sys.executable, "-m", "baselines")
BENCHMARKS_DIR = Path(__file__).parents[1]  # where a process finds this package


def _run_in_process(framework: Framework, task: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a fresh process, and return the values that the framework measured.

    Raises:
        UserError: if that process fails.
    """
    python_path = os.pathsep.join([str(BENCHMARKS_DIR.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": python_path.rstrip(os.pathsep)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if not framework.uses_mlxgpt_blas:
        environment = {**jit.remove_script_from_environment(environment), "MLXGPT_BLAS": "none"}
    task = {**task, "module": framework.module, "framework": framework.name, "began": time.time()}
    process = subprocess.run(
        [*PROCESS_COMMAND, json.dumps(task)],
        env=environment,
        cwd=BENCHMARKS_DIR,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if process.returncode != 0:
        reason = process.stderr.strip() or f"its process ended with code {process.returncode}"
        raise UserError(reason.splitlines()[-1][:200], f"run {framework.name} alone to see why.")
    values: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return values


@contextmanager
def _exported_weights(config: Config) -> Iterator[Path]:
    """Temporary folder with a new model's weights in the formats of transformers and numpy."""
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        weights = flatten_params(GPT(config.model).parameters())
        huggingface.write_gpt2_config(folder, config.model, None)
        huggingface.write_gpt2_parameters(folder, config.model, weights)
        arrays: Any = {name: np.array(value) for name, value in weights.items()}
        np.savez(folder / "weights.npz", **arrays)
        yield folder


BPE_VOCAB_SIZE = 4096  # for the tokenizer trained in preparation


@contextmanager
def _learning_task(config: Config, settings: BenchmarkSettings) -> Iterator[dict[str, Any]]:
    """Learning task with batches and held-out windows of synthetic stories."""
    size = int(1e6 * settings.corpus_megabytes)
    text = "<|endoftext|>".join(synthetic.generate_stories(0, size=size))
    characters, ids = np.unique(np.array(list(text)), return_inverse=True)
    config = override_config(config, {"vocab_size": len(characters)})
    length, batch_size = config.model.block_size + 1, config.train.batch_size
    held_out_ids = ids[: 64 * length].astype(np.int32)
    rng = np.random.default_rng(0)
    shape = (settings.learning_steps, batch_size, 1)
    starts = rng.integers(len(held_out_ids), len(ids) - length, size=shape)
    with _exported_weights(config) as folder:
        np.save(folder / "windows.npy", held_out_ids.reshape(64, length))
        np.save(folder / "batches.npy", ids[starts + np.arange(length)].astype(np.int32))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        task = {**_base_task(config, folder), "batch_size": batch_size}
        task |= {"steps": settings.learning_steps, "vocab_size": BPE_VOCAB_SIZE}
        yield {**task, "text": str(folder / "text.txt")}
