"""The folder `runs/compare`: runs of all variants, and the registry and result of each comparison.

laws/KEY.json        scaling laws, by text and architecture
trainings/KEY/       one run each. The key is a hash of everything that affects its weights: config,
                     seed and data. Comparisons share these runs, so none is trained twice
NAME/ledger.json     registry of a comparison: its plan, and how often results were checked
NAME/NAME.json, .md  result of the comparison
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlxgpt.config import Config, toml
from mlxgpt.data.dataset import Dataset
from mlxgpt.experiments.variants import weight_affecting
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

REGISTRY_FILE, REGISTRY_FORMAT = "ledger.json", 1
RUNS_FOLDER = "trainings"  # in runs/compare, with a folder for each run


@dataclass
class Registry:
    """Registry of one comparison or scaling study.

    Attributes:
        plan: number of steps by variant key and budget, for time budgets only; of a scaling study,
            its first size and its longest runs.
        looks: number of seeds each time results were shown.
        final_looks: how often the validation split was evaluated.
        diverged: keys of the runs that diverged.
    """

    folder: Path
    plan: dict[str, int] = field(default_factory=dict)
    looks: list[int] = field(default_factory=list)
    final_looks: int = 0
    diverged: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Write the registry to its folder."""
        tree = {**asdict(self), "format": REGISTRY_FORMAT}
        del tree["folder"]
        files.write_atomically(self.folder / REGISTRY_FILE, json_files.dump_checksummed(tree))


def open_registry(folder: Path) -> Registry:
    """Open the registry of a comparison; empty if there is none yet.

    Raises:
        UserError: if the file is damaged, or in a newer format.
        OSError: if the file cannot be read.
    """
    path = folder / REGISTRY_FILE
    try:
        tree = json_files.read_checksummed(path, REGISTRY_FORMAT)
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
    """Key of a run: equal keys mean equal weights. Settings at their defaults are omitted, so that
    keys stay valid when new settings are added.
    """
    defaults = weight_affecting(Config())
    settings = weight_affecting(config)
    non_default = {name: value for name, value in settings.items() if value != defaults[name]}
    for _, name, old_value, new_value in toml.RENAMED_VALUES:
        if non_default.get(name) == new_value:
            non_default[name] = old_value  # so that older runs are found
    hashed_fields = {**non_default, "data": dataset.meta.fingerprint}
    return hashlib.sha256(json.dumps(hashed_fields, sort_keys=True).encode()).hexdigest()[:16]
