"""The folder `runs/compare`: trained variants, and for each comparison how often it was looked at.

trainings/KEY/       one run each. The key is the hash of everything that affects its weights: the
                     config, the seed, the data. So no training is repeated in another comparison
NAME/ledger.json     one comparison's registry: its plan, how often results were looked at
NAME/NAME.json, .md  its result
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlxgpt.config import Config, toml
from mlxgpt.data.dataset import Dataset
from mlxgpt.experiments.variants import weight_affecting
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

REGISTRY_FILE, REGISTRY_FORMAT = "ledger.json", 1
RUNS_FOLDER = "trainings"  # in runs/compare, with a folder for each training


@dataclass
class Registry:
    """The registry of one comparison.

    Attributes:
        plan: steps of each variant, by its key and the budget, if that is a time.
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
        """Write it to its folder."""
        tree = {**asdict(self), "format": REGISTRY_FORMAT}
        del tree["folder"]
        files.write_atomically(self.folder / REGISTRY_FILE, files.dump_checksummed(tree))


def open_registry(folder: Path) -> Registry:
    """The registry of a comparison; empty if there is none yet.

    Raises:
        UserError: if it is damaged.
        OSError: if it cannot be read.
    """
    path = folder / REGISTRY_FILE
    try:
        tree = files.read_checksummed(path, REGISTRY_FORMAT)
        return Registry(
            folder,
            {str(key): int(steps) for key, steps in tree["plan"].items()},
            [int(seeds) for seeds in tree["looks"]],
            int(tree["final_looks"]),
            [str(key) for key in tree["diverged"]],
        )
    except FileNotFoundError:
        return Registry(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {error}", "restore it, or start over with --name NAME."
        ) from error


def training_key(config: Config, dataset: Dataset) -> str:
    """The key of a training: equal keys mean equal weights. Settings at their default are left out,
    so that keys stay the same when settings are added.
    """
    defaults = weight_affecting(Config())
    settings = weight_affecting(config)
    non_default = {name: value for name, value in settings.items() if value != defaults[name]}
    _, name, old_value, new_value = toml.RENAMED_VALUE
    if non_default.get(name) == new_value:
        non_default[name] = old_value  # so that older trainings are found
    hashed_fields = {**non_default, "data": dataset.meta.fingerprint}
    return hashlib.sha256(json.dumps(hashed_fields, sort_keys=True).encode()).hexdigest()[:16]
