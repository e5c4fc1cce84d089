from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config
from tests.helpers.play_server import PlayServer, serve_run, serve_run_copy
from tests.helpers.training_runs import tune_on_pairs


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[PlayServer]:
    """Server of the finished run. Tests must not change its files."""
    with serve_run_copy(trained, tmp_path_factory.mktemp("played") / "done") as server:
        yield server


@pytest.fixture(scope="package")
def tales_server(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[PlayServer]:
    """Server of a run with a byte-level BPE, which prepends an end-of-text to prompts.

    Tests must not change its files.
    """
    folder = tmp_path_factory.mktemp("tales")
    stories = [f"Once upon a time {n} foxes said: hé 日本! Then they slept." for n in range(40)]
    (folder / "tales.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    api.train(
        config=tiny,
        source=folder / "tales.txt",
        tokenizer="bpe",
        vocab_size=280,
        run="tales",
        runs_dir=folder / "runs",
        data_dir=folder / "data",
    )
    with serve_run(folder / "runs" / "tales") as server:
        yield server


@pytest.fixture(scope="package")
def tuned_server(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[PlayServer]:
    """Server of a run tuned on preference pairs, next to the run it was initialized from."""
    config = override_config(tiny, {"block_size": 64})
    run = tune_on_pairs(tmp_path_factory.mktemp("preferences"), config)
    with serve_run(run.folder) as server:
        yield server


@pytest.fixture
def own_server(tmp_path: Path, trained: Path) -> Iterator[PlayServer]:
    """Server of a copy of the finished run that a test may change."""
    with serve_run_copy(trained, tmp_path / "mine") as server:
        yield server
