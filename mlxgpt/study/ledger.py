"""What was trained for comparisons, and looked at: `runs/compare`.

trainings/KEY/       a run each. The key is the hash of all that its weights hang on: the config,
the seed, the data. So nothing is trained twice, whoever asks for it
NAME/ledger.json     of one comparison: its plan, how often was looked at what
NAME/NAME.json, .md  its result
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlxgpt import files
from mlxgpt.config import Config
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.errors import UserError
from mlxgpt.study.variants import hung_on

FORMAT = 1
TRAININGS = "trainings"


@dataclass
class Ledger:
    """One comparison's ledger.

    Attributes:
        plan: steps of each variant, by its key and the budget, where that is a time.
        looks: how many seeds there were each time when results were shown.
        final_looks: how often the validation text was looked at.
        diverged: keys of the trainings that were given up.
    """

    folder: Path
    plan: dict[str, int] = field(default_factory=dict)
    looks: list[int] = field(default_factory=list)
    final_looks: int = 0
    diverged: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Write it."""
        tree = {**asdict(self), "format": FORMAT}
        del tree["folder"]
        files.write_atomically(self.folder / "ledger.json", files.sealed(tree))


def open_ledger(folder: Path) -> Ledger:
    """The ledger of a comparison, empty where there is none.

    Raises:
        UserError: if it is damaged.
        OSError: if it cannot be read.
    """
    path = folder / "ledger.json"
    try:
        tree = files.read_sealed(path, FORMAT)
        return Ledger(
            folder,
            {str(key): int(steps) for key, steps in tree["plan"].items()},
            [int(seeds) for seeds in tree["looks"]],
            int(tree["final_looks"]),
            [str(key) for key in tree["diverged"]],
        )
    except FileNotFoundError:
        return Ledger(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {error}", "restore it, or begin anew with --name NAME."
        ) from error


def key(config: Config, dataset: Dataset) -> str:
    """What a training is known by: equal keys mean equal weights. Settings at their default are
    left out, so that the keys stay when there are new ones.
    """
    defaults = hung_on(Config())
    own = {name: value for name, value in hung_on(config).items() if value != defaults[name]}
    parts = {**own, "data": dataset.meta.fingerprint}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
