"""Several ranks end as one does, whatever happens to them on the way."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt.storage import checkpoint
from tests.breaking import main as live
from tests.conftest import TINY
from tests.ranked import Ranked, trained
from tests.trainings import final_state, len_done, metrics

STEPS = 16
CONFIG = {
    **TINY,
    "train": {**TINY["train"], "max_steps": STEPS, "batch_size": 8, "log_interval": 1},
}
PLAN: dict[str, Any] = {"config": CONFIG}


def with_settings(**settings: Any) -> dict[str, Any]:
    return {"config": {**CONFIG, "train": {**CONFIG["train"], **settings}}}


def state(run: str = "a") -> dict[str, np.ndarray]:
    return final_state(run)


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((value == b[name]).all() for name, value in a.items())


@pytest.fixture
def alone(home: Path, text_file: Path) -> dict[str, np.ndarray]:
    """What one rank ends with; its run is gone."""
    trained(PLAN, 1)
    found = state()
    shutil.rmtree("runs")
    return found


def test_two_and_four_ranks_end_within_rounding_of_one(alone: dict[str, np.ndarray]) -> None:
    for size in (2, 4):
        trained(PLAN, size)
        together = state()
        assert not same(alone, together), "rounding differs, or nothing was averaged"
        for name, value in alone.items():
            np.testing.assert_allclose(together[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
        assert [line["step"] for line in metrics("a")] == list(range(1, STEPS + 1))
        (line,) = Path("runs/a/history.jsonl").read_text().splitlines()
        assert json.loads(line)["on"]["ranks"] == str(size)
        shutil.rmtree("runs")
