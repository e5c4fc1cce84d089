from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.playground.serving import Served, playing


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[Served]:
    """The finished run, played. Not to be changed."""
    with playing(trained, tmp_path_factory.mktemp("played") / "done") as there:
        yield there


@pytest.fixture
def own(tmp_path: Path, trained: Path) -> Iterator[Served]:
    """The same, to be changed."""
    with playing(trained, tmp_path / "mine") as there:
        yield there
