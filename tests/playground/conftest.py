from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.config import Config
from tests.helpers.play_server import PlayServer, serve_run, serve_run_copy


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[PlayServer]:
    """The finished run, played. Not to be changed."""
    with serve_run_copy(trained, tmp_path_factory.mktemp("played") / "done") as server:
        yield server


@pytest.fixture(scope="package")
def tales_server(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[PlayServer]:
    """A run of stories, with a byte-level BPE; its texts begin with an end-of-text. Not to be
    changed.
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


@pytest.fixture
def own_server(tmp_path: Path, trained: Path) -> Iterator[PlayServer]:
    """The same, to be changed."""
    with serve_run_copy(trained, tmp_path / "mine") as server:
        yield server
