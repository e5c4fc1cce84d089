"""A scaling law: loss = E + A / parameters^α + B / tokens^β (Hoffmann et al., 2022). `mlxgpt scale`
fits it and stores it in runs/compare/laws, by text and architecture.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mlxgpt.config import Config
from mlxgpt.data.dataset import Dataset
from mlxgpt.utils import files, json_files

logger = logging.getLogger(__name__)

LAWS_FOLDER, LAW_FORMAT = "laws", 1
SIZE_FIELDS = ("n_layer", "n_head", "n_embd")


@dataclass(frozen=True)
class ScalingLaw:
    """Loss in bits per byte of a model with that many million parameters after that many million
    tokens, each seen a few times at most.

    Attributes:
        limit: E, the loss of an infinite model after infinite training.
        a, alpha: A and α, of the parameters.
        b, beta: B and β, of the tokens.
    """

    limit: float
    a: float
    alpha: float
    b: float
    beta: float

    def predict(self, parameters: float, tokens: float) -> float:
        """Loss of a model with `parameters` after `tokens`."""
        return (
            self.limit
            + self.a * (parameters / 1e6) ** -self.alpha
            + self.b * (tokens / 1e6) ** -self.beta
        )


def law_path(runs_dir: Path, config: Config, dataset: Dataset) -> Path:
    """Path of the law for a text and an architecture; sizes and optimizer do not matter."""
    architecture = {k: v for k, v in asdict(config.model).items() if k not in SIZE_FIELDS}
    architecture["vocab_size"] = dataset.meta.vocab_size
    key = json.dumps([architecture, dataset.meta.fingerprint], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return runs_dir / "compare" / LAWS_FOLDER / f"{name}.json"


def write_scaling_law(path: Path, law: ScalingLaw) -> None:
    """Write a law to `law_path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {**asdict(law), "format": LAW_FORMAT}
    files.write_atomically(path, json_files.dump_checksummed(tree))


def find_scaling_law(path: Path) -> ScalingLaw | None:
    """Read a law; None if there is none, or if it is damaged, which is logged.

    Raises:
        UserError: if it is in a newer format.
    """
    try:
        tree = json_files.read_checksummed(path, LAW_FORMAT)
        return ScalingLaw(*(float(tree[field.name]) for field in fields(ScalingLaw)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(f"ignoring {path}: {error}; mlxgpt scale writes it again")
        return None
