from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.config import Config
from tests.helpers.play_server import Served, playing, serving


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[Served]:
    """The finished run, played. Not to be changed."""
    with playing(trained, tmp_path_factory.mktemp("played") / "done") as there:
        yield there


@pytest.fixture(scope="package")
def tales(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[Served]:
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
    with serving(folder / "runs" / "tales") as there:
        yield there


@pytest.fixture
def own(tmp_path: Path, trained: Path) -> Iterator[Served]:
    """The same, to be changed."""
    with playing(trained, tmp_path / "mine") as there:
        yield there
