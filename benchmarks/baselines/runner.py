"""Run mlxgpt and other libraries at the same tasks: in turn, A B A B, each in a fresh process, on
the same weights.

A process gets a task, a dictionary of plain data:

    module, task   the framework's module here, and its function
    framework      its name in the report
    began          when its process was started, in seconds since 1970
    folder         the model's weights in transformers' layout; in learning, the batches too
    shape, config  ModelConfig's fields, and all of Config's
    batch_size, seconds, steps           of training: how long it is timed; of learning: how many
    texts, prompt_tokens, new_tokens     of generation
    text, vocab_size                     of preparation: a file, and the tokenizer's size
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

CHILD = (sys.executable, "-m", "baselines")
BENCHMARKS = Path(__file__).parents[1]  # where a child finds this package; next to mlxgpt
VOCABULARY = 4096  # of the BPE that preparation trains


@dataclass(frozen=True)
class Framework:
    """A library to measure, the tasks it can do, and the package it needs.

    Attributes:
        has_our_blas: whether MLX under it gets the BLAS that mlxgpt loads.
        has_cache: in generation; without one several texts would take an hour.
    """

    name: str
    module: str
    tasks: tuple[str, ...]
    needs: str | None = None
    has_our_blas: bool = False
    has_cache: bool = True


OURS = Framework(
    MLXGPT, "mlxgpt_baseline", ("training", "generate", "learning", "preparation"), None, True
)
FRAMEWORKS = (
    OURS,
    Framework("PyTorch", "pytorch", ("training", "learning"), "torch"),
    Framework("PyTorch, compiled", "pytorch", ("training", "learning"), "torch"),
    Framework("transformers", "hugging_face", ("generate",), "transformers"),
    Framework("mlx-lm", "mlx_lm", ("training", "generate"), "mlx_lm", True),
    Framework("datasets.map", "datasets_map", ("preparation",), "datasets"),
)
NANOGPT = Framework("nanoGPT", "nanogpt", ("training", "generate"), "torch", has_cache=False)


@dataclass(frozen=True)
class Plan:
    """How much is measured in each task."""

    rounds: int = 5
    seconds: float = 5.0  # of training that is timed, at least two steps
    sequences: int = 16  # of a step at most; tokens/s hardly depends on how many
    steps: int = 100  # of learning
    megabytes: float = 3.0  # of text to prepare


PLAN = Plan()


@dataclass(frozen=True)
class Job:
    """A model to measure.

    Attributes:
        config: of the classic recipe, with its vocabulary and dtype.
        texts: numbers of texts that are generated at once.
    """

    name: str
    config: Config
    trains: bool = True
    texts: tuple[int, ...] = (1, 8, 64)


def installed_frameworks(nanogpt: Path | None = None) -> tuple[list[Framework], list[str]]:
    """Frameworks that can run here, and the packages that are missing for others.

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
        frameworks.append(NANOGPT)
    missing = sorted({f.needs for f in frameworks if f.needs and not find_spec(f.needs)})
    return [f for f in frameworks if f.needs not in missing], missing


def run_tasks(
    jobs: Sequence[Job],
    frameworks: Sequence[Framework],
    *,
    nanogpt: Path | None = None,
    plan: Plan = PLAN,
) -> Iterator[TaskResult]:
    """Run all tasks of all jobs, then learning and preparation with the first job's config."""
    for job in jobs:
        with _weights(job.config) as folder:
            block = job.config.model.block_size
            task = {
                **_task(job.config, folder),
                "nanogpt": str(nanogpt.resolve()) if nanogpt else "",
                "batch_size": min(job.config.train.batch_size, plan.sequences),
                "seconds": plan.seconds,
                "prompt_tokens": block // 2,
                "new_tokens": block - block // 2,
            }
            task["config"]["train"]["batch_size"] = task["batch_size"]
            if job.trains:
                yield _run_rounds(job.name, {**task, "task": "training"}, frameworks, plan)
            # A large model without a cache takes longer for one text than all others together.
            generating = [f for f in frameworks if job.trains or f.has_cache]
            for texts in job.texts:
                generate = {**task, "task": "generate", "texts": texts}
                yield _run_rounds(job.name, generate, generating, plan)
    first = jobs[0]
    with _learning_task(first.config, plan) as task:
        for name in ("learning", "preparation"):
            yield _run_rounds(first.name, {**task, "task": name}, frameworks, plan)


def _task(config: Config, folder: Path) -> dict[str, Any]:
    shape, tree = asdict(config.model), asdict(config)
    return {"folder": str(folder), "shape": shape, "config": tree, "texts": 0, "steps": 0}


def _run_rounds(
    config: str, task: dict[str, Any], frameworks: Sequence[Framework], plan: Plan
) -> TaskResult:
    name, texts = task["task"], task["texts"]
    result = TaskResult(config, name, texts)
    for number in range(plan.rounds):
        for framework in frameworks:
            if name not in framework.tasks or framework.name in result.failed:
                continue
            if texts > 1 and not framework.has_cache:
                continue
            of = f" of {texts}" if texts else ""
            logger.info(
                f"{config}, {name}{of}, round {number + 1} of {plan.rounds}: {framework.name} …"
            )
            try:
                values = _run(framework, task)
            except UserError as error:
                result.failed[framework.name] = error.problem
                continue
            result.made_with[framework.name] = values.pop("made_with")
            result.rounds.setdefault(framework.name, []).append(values)
    return result


def _run(framework: Framework, task: dict[str, Any]) -> dict[str, Any]:
    """The values that a framework measured, in a fresh process.

    Raises:
        UserError: if that process fails.
    """
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if not framework.has_our_blas:
        environment = {**jit.remove_script_from_environment(environment), "MLXGPT_BLAS": "none"}
    task = {**task, "module": framework.module, "framework": framework.name, "began": time.time()}
    child = subprocess.run(
        [*CHILD, json.dumps(task)],
        env=environment,
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if child.returncode != 0:
        reason = child.stderr.strip() or f"its process ended with code {child.returncode}"
        raise UserError(reason.splitlines()[-1][:200], f"run {framework.name} alone to see why.")
    values: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return values


@contextmanager
def _weights(config: Config) -> Iterator[Path]:
    """A folder with a fresh model as transformers, mlx-lm and numpy load it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = flatten_params(GPT(config.model).parameters())
        huggingface.write_gpt2_config(folder, config.model, None)
        huggingface.write_gpt2_parameters(folder, config.model, weights)
        arrays: Any = {name: np.array(value) for name, value in weights.items()}
        np.savez(folder / "weights.npz", **arrays)
        yield folder


@contextmanager
def _learning_task(config: Config, plan: Plan) -> Iterator[dict[str, Any]]:
    """A task with batches of synthetic stories, and windows that are in none of them."""
    text = "<|endoftext|>".join(synthetic.generate_stories(0, size=int(1e6 * plan.megabytes)))
    characters, ids = np.unique(np.array(list(text)), return_inverse=True)
    config = override_config(config, {"vocab_size": len(characters)})
    window = config.model.block_size + 1
    batch, windows = config.train.batch_size, ids[: 64 * window].astype(np.int32)
    draw = np.random.default_rng(0)
    starts = draw.integers(len(windows), len(ids) - window, size=(plan.steps, batch, 1))
    with _weights(config) as folder:
        np.save(folder / "windows.npy", windows.reshape(64, window))
        np.save(folder / "batches.npy", ids[starts + np.arange(window)].astype(np.int32))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        task = {**_task(config, folder), "batch_size": batch, "steps": plan.steps}
        yield {**task, "text": str(folder / "text.txt"), "vocab_size": VOCABULARY}
