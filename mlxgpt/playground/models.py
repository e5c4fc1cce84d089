"""Cache of a run's models, by checkpoint step, and of their latest forward traces."""

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

# The run is opened again only if one of these changed: GPT-2's tokenizer takes 0.3 s to read.
RUN_FILES = ("run.json", "config.toml", "tokenizer.json")
MAX_CACHED = 4  # models; and forward traces
MAX_CACHED_PARAMETERS = 500_000_000  # of all cached models; a larger one is cached alone


class ModelCache:
    """Models and forward traces of one run; a cached model no longer needs the run's folder.

    Models and traces belong to the device worker's thread; the run may be opened in any thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._run: tuple[list[int], Run] | None = None
        self._models: OrderedDict[int, tuple[int | None, LoadedModel]] = OrderedDict()
        self._traces: OrderedDict[tuple, ForwardTrace] = OrderedDict()

    def get_run(self) -> Run:
        """The run, opened again if its files changed.

        Raises:
            UserError: if it is gone, or damaged.
        """
        if not files.is_folder(self.folder):
            raise UserError(
                f"the run {self.folder.name} no longer exists",
                "restart mlxgpt play with another run.",
            )
        with contextlib.suppress(OSError):  # open_run reports what is missing
            mtimes = [(self.folder / name).stat().st_mtime_ns for name in RUN_FILES]
            cached = self._run  # read once: another thread may replace it
            if cached is None or cached[0] != mtimes:
                cached = self._run = mtimes, open_run(self.folder)
            return cached[1]
        return open_run(self.folder)

    def get_model(self, step: int | None = None) -> LoadedModel:
        """The model after `step` steps; default: the best checkpoint, else the newest.

        If the run is gone: a cached model, by default the newest one.
        """
        if step is None:
            step = self._default_step()
        mtime = self._weights_mtime(step)
        cached_mtime, model = self._models.get(step, (None, None))
        if model is None or mtime not in (None, cached_mtime):  # not cached, or changed since
            model = load(str(self.get_run().folder), checkpoint=str(step))
            self._models.pop(step, None)
            capacity = MAX_CACHED_PARAMETERS // count_parameters(model.run.config.model)
            _evict_lru(self._models, capacity)
            self._models[step] = mtime, model
        self._models.move_to_end(step)
        return model

    def _weights_mtime(self, step: int) -> int | None:
        """Modification time of a step's weights, in ns; None if they are gone."""
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
        """The trace of a model's forward pass over ids, with some attention heads off."""
        key = (model, tuple(ids), disabled_heads)
        if (trace := self._traces.get(key)) is None:
            _evict_lru(self._traces, MAX_CACHED)
            trace = self._traces[key] = model.trace_forward(ids, disabled_heads)
        self._traces.move_to_end(key)
        return trace


def _evict_lru(cache: OrderedDict, capacity: int) -> None:
    """Drop the least recently used entries, until there is room for one more."""
    while len(cache) >= max(1, min(capacity, MAX_CACHED)):
        cache.popitem(last=False)
