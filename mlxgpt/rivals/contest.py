"""Us and our rivals at the same tasks: A B A B, each in a fresh process, on the same weights. Gives
the figures of every round; `reports/peers.py` makes a report of them.

What a process is asked is a task, of plain data:

    module, what   the contender, and its function
    who            its name in the report
    began          when its process was started, in seconds since 1970
    folder         the model's weights, laid out as transformers'; in learning, the batches too
    shape, config  ModelConfig's fields, and all of Config's
    batch_size, seconds, steps           of training: how long it is timed; of learning: how many
    texts, prompt_tokens, new_tokens     of generation
    text, vocab_size                     of preparation: a file, and how many tokens
    checkout                             of the user's nanoGPT
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt import files
from mlxgpt.backend.cpu import jit as compiler
from mlxgpt.config import Config, override
from mlxgpt.corpus import storybook
from mlxgpt.errors import UserError
from mlxgpt.interchange import huggingface
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.rivals.record import US, Contest

CHILD = (sys.executable, "-m", "mlxgpt.rivals")
VOCABULARY = 4096  # of the BPE that preparation trains
ROOT = Path(__file__).parents[2]  # where the package lies: a checkout, or site-packages


@dataclass(frozen=True)
class Contender:
    """Who takes part, in which tasks, and the package that it needs.

    Attributes:
        has_cache: in generation; several texts without one would take an hour.
    """

    name: str
    module: str
    tasks: tuple[str, ...]
    needs: str | None = None
    has_our_blas: bool = False
    has_cache: bool = True


OURS = Contender(US, "ours", ("training", "generate", "learning", "preparation"), None, True)
CONTENDERS = (
    OURS,
    Contender("PyTorch", "pytorch", ("training", "learning"), "torch"),
    Contender("PyTorch, compiled", "pytorch", ("training", "learning"), "torch"),
    Contender("transformers", "hugging_face", ("generate",), "transformers"),
    Contender("mlx-lm", "mlx_lm", ("training", "generate"), "mlx_lm", True),
    Contender("datasets.map", "datasets_map", ("preparation",), "datasets"),
)
NANOGPT = Contender("nanoGPT", "nanogpt", ("training", "generate"), "torch", has_cache=False)


@dataclass(frozen=True)
class Length:
    """How much is done in each task."""

    rounds: int = 5
    seconds: float = 5.0  # of training that is timed, at least two steps
    sequences: int = 16  # of a step at most: how fast a token is hardly hangs on how many
    texts: tuple[int, ...] = (1, 8, 64)
    steps: int = 100  # of learning
    megabytes: float = 3.0  # of text to prepare


LENGTH = Length()


def contenders(checkout: Path | None = None) -> tuple[list[Contender], list[str]]:
    """Those that can take part here, and the packages that others lack.

    Raises:
        UserError: if `checkout` is no nanoGPT's.
    """
    everyone = [*CONTENDERS]
    if checkout is not None:
        if not files.is_file(checkout / "model.py"):
            raise UserError(
                f"{checkout} is no checkout of nanoGPT: it has no model.py",
                "give --peer-path the folder that holds nanoGPT's model.py.",
            )
        everyone.append(NANOGPT)
    missing = sorted({one.needs for one in everyone if one.needs and not find_spec(one.needs)})
    return [one for one in everyone if one.needs not in missing], missing


def contests(
    configs: Mapping[str, Config],
    taking_part: list[Contender],
    *,
    to_train: Mapping[str, Config] | None = None,
    to_write: Mapping[str, Config] | None = None,
    checkout: Path | None = None,
    note: Callable[[str], None] = lambda line: None,
    length: Length = LENGTH,
) -> Iterator[Contest]:
    """Hold all contests, one after the other.

    Args:
        configs: of GPT-2's parts, with their vocabulary and dtype, by name; what is learned and
            prepared is the first one's.
        taking_part: see `contenders`.
        to_train, to_write: others, that are trained alone, or write one text alone.
        note: takes a line on what is going on.
    """
    everyone = [
        *((name, config, True, length.texts) for name, config in configs.items()),
        *((name, config, True, ()) for name, config in (to_train or {}).items()),
        *((name, config, False, (1,)) for name, config in (to_write or {}).items()),
    ]
    for name, config, trains, numbers in everyone:
        with _weights(config) as folder:
            c = config.model
            task = {
                **_task(config, folder),
                "checkout": str(checkout.resolve()) if checkout else "",
                "batch_size": min(config.train.batch_size, length.sequences),
                "seconds": length.seconds,
                "prompt_tokens": c.block_size // 2,
                "new_tokens": c.block_size - c.block_size // 2,
            }
            task["config"]["train"]["batch_size"] = task["batch_size"]
            if trains:
                yield _contest(name, "training", task, taking_part, length, note)
            # A whole text of a large model takes who has no cache as long as all the others.
            writing = [one for one in taking_part if trains or one.has_cache]
            for texts in numbers:
                yield _contest(name, "generate", {**task, "texts": texts}, writing, length, note)
    name, config = next(iter(configs.items()))
    with _something_to_learn(config, length) as task:
        yield _contest(name, "learning", task, taking_part, length, note)
        yield _contest(name, "preparation", task, taking_part, length, note)


def _task(config: Config, folder: Path) -> dict[str, Any]:
    shape, tree = asdict(config.model), asdict(config)
    return {"folder": str(folder), "shape": shape, "config": tree, "texts": 0, "steps": 0}


def _contest(
    name: str,
    what: str,
    task: dict[str, Any],
    taking_part: list[Contender],
    length: Length,
    note: Callable[[str], None],
) -> Contest:
    contest = Contest(name, what, task["texts"])
    for number in range(length.rounds):
        for one in taking_part:
            if what not in one.tasks or one.name in contest.failed:
                continue
            if task["texts"] > 1 and not one.has_cache:
                continue
            of = f" of {task['texts']}" if task["texts"] else ""
            note(f"{name}, {what}{of}, round {number + 1} of {length.rounds}: {one.name} …")
            try:
                figures = _ask(one, {**task, "what": what})
            except UserError as error:
                contest.failed[one.name] = error.problem
                continue
            contest.made_with[one.name] = figures.pop("made_with")
            contest.rounds.setdefault(one.name, []).append(figures)
    return contest


def _ask(one: Contender, task: dict[str, Any]) -> dict[str, Any]:
    """A contender's figures, from a fresh process.

    Raises:
        UserError: if that process fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if not one.has_our_blas:
        environment = {**compiler.for_others(environment), "MLXGPT_BLAS": "none"}
    task = {**task, "module": one.module, "who": one.name, "began": time.time()}
    child = subprocess.run(
        [*CHILD, json.dumps(task)],
        env=environment,
        cwd=ROOT,  # where Python finds this very package
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if child.returncode != 0:
        said = child.stderr.strip() or f"its process ended with code {child.returncode}"
        raise UserError(said.splitlines()[-1][:200], "see that it runs by itself.")
    figures: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return figures


@contextmanager
def _weights(config: Config) -> Iterator[Path]:
    """A folder with a fresh model of GPT-2's parts, as transformers and mlx-lm load it, and as
    numpy does.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = flatten_params(GPT(config.model).parameters())
        huggingface.write_config(folder, config.model, None)
        huggingface.write_parameters(folder, config.model, weights)
        arrays: Any = {name: np.array(value) for name, value in weights.items()}
        np.savez(folder / "weights.npz", **arrays)
        yield folder


@contextmanager
def _something_to_learn(config: Config, length: Length) -> Iterator[dict[str, Any]]:
    """A task with batches of the storybook, and windows of it that are in none."""
    text = "<|endoftext|>".join(storybook.stories(0, size=int(1e6 * length.megabytes)))
    characters, ids = np.unique(np.array(list(text)), return_inverse=True)
    config = override(config, {"vocab_size": len(characters)})
    window = config.model.block_size + 1
    batch, windows = config.train.batch_size, ids[: 64 * window].astype(np.int32)
    draw = np.random.default_rng(0)
    starts = draw.integers(len(windows), len(ids) - window, size=(length.steps, batch, 1))
    with _weights(config) as folder:
        np.save(folder / "windows.npy", windows.reshape(64, window))
        np.save(folder / "batches.npy", ids[starts + np.arange(window)].astype(np.int32))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        task = {**_task(config, folder), "batch_size": batch, "steps": length.steps}
        yield {**task, "text": str(folder / "text.txt"), "vocab_size": VOCABULARY}
