from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.playground.serving import Served, serving


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[Served]:
    """The finished run, played. Not to be changed."""
    folder = tmp_path_factory.mktemp("played") / "done"
    shutil.copytree(trained / "runs" / "done", folder)
    with serving(folder) as there:
        yield there


@pytest.fixture
def own(tmp_path: Path, trained: Path) -> Iterator[Served]:
    """The same, to be changed."""
    folder = tmp_path / "mine"
    shutil.copytree(trained / "runs" / "done", folder)
    with serving(folder) as there:
        yield there
