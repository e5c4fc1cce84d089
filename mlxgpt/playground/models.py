"""LRU cache of a run's models, by checkpoint step, and of their forward traces."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from mlxgpt.inference.inspect import ForwardTrace
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage.checkpoint import checkpoint_folder, parse_step
from mlxgpt.storage.loading import find_origin_run, has_origin_weights
from mlxgpt.storage.run import Run, open_run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

# The run is reopened only if one of these changes: loading GPT-2's tokenizer takes 0.3 s.
RUN_FILES = ("run.json", "config.toml", "tokenizer.json")
MAX_CACHED = 4  # limit of models, and of forward traces
MAX_CACHED_PARAMETERS = 500_000_000  # of all cached models together; a larger model is cached alone


class ModelCache:
    """Cache of one run's models and forward traces; cached models outlive the run's folder.

    Use models and traces only in the device worker's thread; `get_run` is safe in any thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._run: tuple[list[int], Run] | None = None
        self._models: OrderedDict[int, tuple[int | None, LoadedModel]] = OrderedDict()
        self._traces: OrderedDict[tuple, ForwardTrace] = OrderedDict()
        self._reference: ModelCache | None = None

    def get_run(self) -> Run:
        """Return the run, reopened if its files have changed.

        Raises:
            UserError: if the run no longer exists or is damaged.
        """
        if not files.is_folder(self.folder):
            raise UserError(
                f"the run {self.folder.name} no longer exists",
                "restart mlxgpt play with another run.",
            )
        with contextlib.suppress(OSError):  # open_run reports missing files
            mtimes = [(self.folder / name).stat().st_mtime_ns for name in RUN_FILES]
            cached = self._run  # read only once, since another thread may replace it
            if cached is None or cached[0] != mtimes:
                cached = self._run = mtimes, open_run(self.folder)
            return cached[1]
        return open_run(self.folder)

    def get_model(self, step: int | None = None) -> LoadedModel:
        """Return the model at `step`; default: the best checkpoint, else the latest.

        If the run no longer exists, only cached models are available; default: the latest.
        """
        if step is None:
            step = self._default_step()
        mtime = self._weights_mtime(step)
        cached_mtime, model = self._models.get(step, (None, None))
        if model is None or mtime not in (None, cached_mtime):  # not cached or outdated
            model = load(str(self.get_run().folder), checkpoint=str(step))
            self._models.pop(step, None)
            capacity = MAX_CACHED_PARAMETERS // count_parameters(model.run.config.model)
            _evict_lru(self._models, capacity)
            self._models[step] = mtime, model
        self._models.move_to_end(step)
        return model

    def find_reference(self) -> Run | None:
        """The run that this one was initialized from; None if it is not in the same folder, or no
        longer has that checkpoint. Its model is not loaded.
        """
        run = self.get_run()
        try:
            origin_run = find_origin_run(run)
        except UserError as error:  # a damaged run
            logger.warning(error.problem)
            return None
        if origin_run is None or run.origin["step"] not in origin_run.steps():
            return None
        return origin_run

    def get_reference(self) -> LoadedModel:
        """The model that this run was initialized from.

        Raises:
            UserError: if it is not there, or is another one now.
        """
        run, reference = self.get_run(), self.find_reference()
        if reference is None:
            raise UserError(
                "the run that this one was initialized from is not in the same folder",
                "copy it there.",
            )
        if self._reference is None or self._reference.folder != reference.folder:
            if not has_origin_weights(run, reference):
                raise UserError(
                    f"{reference.name} is no longer the model that {run.name} was initialized from",
                    "restore its original checkpoint.",
                )
            self._reference = ModelCache(reference.folder)
        return self._reference.get_model(run.origin["step"])

    def _weights_mtime(self, step: int) -> int | None:
        """Modification time of a step's checkpoint folder in ns; None if it does not exist."""
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
        """Trace the model's forward pass over ids, with some (layer, head) disabled."""
        key = (model, tuple(ids), disabled_heads)
        if (trace := self._traces.get(key)) is None:
            _evict_lru(self._traces, MAX_CACHED)
            trace = self._traces[key] = model.trace_forward(ids, disabled_heads)
        self._traces.move_to_end(key)
        return trace


def _evict_lru(cache: OrderedDict, capacity: int) -> None:
    """Evict the least recently used entries until there is room for one more."""
    while len(cache) >= max(1, min(capacity, MAX_CACHED)):
        cache.popitem(last=False)
