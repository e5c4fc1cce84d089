from __future__ import annotations

import pytest

from mlxgpt.config import Config, override_config
from mlxgpt.storage import run as runs
from tests.helpers.training_runs import train_fox_model


@pytest.fixture(scope="session")
def bpe_run(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> runs.Run:
    """A small trained GPT-2 with a byte-level BPE."""
    config = override_config(tiny, {"block_size": 128, "tied": True})
    return train_fox_model(tmp_path_factory.mktemp("bpe"), config, stories=80)
