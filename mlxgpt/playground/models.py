"""A run's models, at the ages that are asked for, and what was looked at last."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from mlxgpt.inference.inspect import ForwardTrace
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage.checkpoint import checkpoint_folder, parse_step
from mlxgpt.storage.run import Run, open_run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

RUN_FILES = ("run.json", "config.toml", "tokenizer.json")  # GPT-2's takes a third of a second
MAX_CACHED = 4  # models, and looks, at most
MAX_CACHED_PARAMETERS = 500_000_000  # parameters of all these models, unless one alone has more


class ModelCache:
    """Of one run's folder, from which nothing is needed once a model is read.

    Models are read, and looked into, in the device's thread alone; the run may be opened in any.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._run: tuple[list[int], Run] | None = None
        self._models: OrderedDict[int, tuple[int | None, LoadedModel]] = OrderedDict()
        self._traces: OrderedDict[tuple, ForwardTrace] = OrderedDict()

    def get_run(self) -> Run:
        """The run as it is now.

        Raises:
            UserError: if it is gone, or damaged.
        """
        if not files.is_folder(self.folder):
            raise UserError(f"the run {self.folder.name} is gone", "stop this, and play another.")
        with contextlib.suppress(OSError):  # else open_run says what is missing
            mtimes = [(self.folder / name).stat().st_mtime_ns for name in RUN_FILES]
            cached = self._run  # once, as another thread may put another one there
            if cached is None or cached[0] != mtimes:
                cached = self._run = mtimes, open_run(self.folder)
            return cached[1]
        return open_run(self.folder)

    def get_model(self, step: int | None = None) -> LoadedModel:
        """The model after so many steps; default: the best, or the newest there is. Of a run that
        is gone, one that was read before.
        """
        if step is None:
            step = self._default_step()
        mtime = self._weights_mtime(step)
        cached_mtime, model = self._models.get(step, (None, None))
        if model is None or mtime not in (None, cached_mtime):  # or trained anew meanwhile
            model = load(str(self.get_run().folder), checkpoint=str(step))
            self._models.pop(step, None)
            _evict_lru(
                self._models, MAX_CACHED_PARAMETERS // count_parameters(model.run.config.model)
            )
            self._models[step] = mtime, model
        self._models.move_to_end(step)
        return model

    def _weights_mtime(self, step: int) -> int | None:
        """When the weights of a step were; None where they are gone."""
        for name in ("checkpoints", "snapshots"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return checkpoint_folder(self.folder / name, step).stat().st_mtime_ns
        return None

    def _default_step(self) -> int:
        if self._models and not files.is_folder(self.folder):
            return max(self._models)
        return parse_step(self.get_run().checkpoint_path())

    def get_trace(
        self, model: LoadedModel, ids: Sequence[int], disabled_heads: frozenset[tuple[int, int]]
    ) -> ForwardTrace:
        """See inside a model as it reads ids."""
        key = (model, tuple(ids), disabled_heads)
        if (trace := self._traces.get(key)) is None:
            _evict_lru(self._traces, MAX_CACHED)
            trace = self._traces[key] = model.trace_forward(ids, disabled_heads)
        self._traces.move_to_end(key)
        return trace


def _evict_lru(cache: OrderedDict, capacity: int) -> None:
    """Drop those that were not used for longest, until there is room for one more of so many."""
    while len(cache) >= max(1, min(capacity, MAX_CACHED)):
        cache.popitem(last=False)
