"""A run's models, at the ages that are asked for, and what was looked at last."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from mlxgpt.inference.inspect import ForwardTrace
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage.checkpoint import path_of, step_of
from mlxgpt.storage.run import Run, open_run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

READ = ("run.json", "config.toml", "tokenizer.json")  # GPT-2's takes a third of a second
KEPT = 4  # models, and looks, at most
MOST_KEPT = 500_000_000  # parameters of all these models, unless one alone has more


class Models:
    """Of one run's folder, from which nothing is needed once a model is read.

    Models are read, and looked into, in the device's thread alone; the run may be opened in any.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._run: tuple[list[int], Run] | None = None
        self._models: OrderedDict[int, tuple[int | None, LoadedModel]] = OrderedDict()
        self._looks: OrderedDict[tuple, ForwardTrace] = OrderedDict()

    def opened(self) -> Run:
        """The run as it is now.

        Raises:
            UserError: if it is gone, or damaged.
        """
        if not files.is_folder(self.folder):
            raise UserError(f"the run {self.folder.name} is gone", "stop this, and play another.")
        with contextlib.suppress(OSError):  # else open_run says what is missing
            written = [(self.folder / name).stat().st_mtime_ns for name in READ]
            held = self._run  # once, as another thread may put another one there
            if held is None or held[0] != written:
                held = self._run = written, open_run(self.folder)
            return held[1]
        return open_run(self.folder)

    def at(self, step: int | None = None) -> LoadedModel:
        """The model after so many steps; default: the best, or the newest there is. Of a run that
        is gone, one that was read before.
        """
        if step is None:
            step = self._default()
        written = self._written(step)
        held, model = self._models.get(step, (None, None))
        if model is None or written not in (None, held):  # or trained anew meanwhile
            model = load(str(self.opened().folder), checkpoint=str(step))
            self._models.pop(step, None)
            _keep(self._models, MOST_KEPT // count_parameters(model.run.config.model))
            self._models[step] = written, model
        self._models.move_to_end(step)
        return model

    def _written(self, step: int) -> int | None:
        """When the weights of a step were; None where they are gone."""
        for name in ("checkpoints", "snapshots"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return path_of(self.folder / name, step).stat().st_mtime_ns
        return None

    def _default(self) -> int:
        if self._models and not files.is_folder(self.folder):
            return max(self._models)
        return step_of(self.opened().checkpoint_path())

    def look(
        self, model: LoadedModel, ids: Sequence[int], off: frozenset[tuple[int, int]]
    ) -> ForwardTrace:
        """See inside a model as it reads ids."""
        key = (model, tuple(ids), off)
        if (look := self._looks.get(key)) is None:
            _keep(self._looks, KEPT)
            look = self._looks[key] = model.look(ids, off)
        self._looks.move_to_end(key)
        return look


def _keep(there: OrderedDict, most: int) -> None:
    """Drop those that were not used for longest, until there is room for one more of so many."""
    while len(there) >= max(1, min(most, KEPT)):
        there.popitem(last=False)
