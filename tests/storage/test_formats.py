"""Files of every format version there was: tests/formats/N was written by the mlxgpt of its time,
and this one reads it. N is the largest format version in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.config import override_config
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from tests.helpers.training_runs import final_state, metrics

pytestmark = pytest.mark.usefixtures("no_check")
FORMATS = Path(__file__).parents[1] / "formats"
VERSIONS = sorted(p for p in FORMATS.iterdir() if p.name.isdecimal())
RUNS = {"chars": "words.txt", "tales": "tales.txt"}


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def old_home(request: pytest.FixtureRequest, home: Path) -> Path:
    """A place as an older version left it."""
    shutil.copytree(request.param, home, dirs_exist_ok=True)
    return home


def test_the_newest_formats_are_there() -> None:
    assert [folder.name for folder in VERSIONS] == [str(n + 1) for n in range(len(VERSIONS))]
    newest = max(checkpoint.CHECKPOINT_FORMAT, runs.RUN_FORMAT)
    assert len(VERSIONS) == newest, "a new format needs files of its own: formats/make.py"


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_evaluated_and_generates(old_home: Path, name: str) -> None:
    best = runs.open_run(old_home / "runs" / name).best()
    assert best is not None
    assert api.evaluate(run=name).loss == pytest.approx(best["val_loss"], rel=1e-4)
    assert api.generate(run=name, max_tokens=5).tokens > 0


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_resumed_from_old_data(old_home: Path, name: str) -> None:
    """It ends as one that was never interrupted, but for another machine's rounding."""
    config = runs.open_run(old_home / "runs" / name).config
    before = metrics(name)
    summary = api.train(config=override_config(config, {"max_steps": 12}), run=name)
    assert (summary.resumed, summary.step) == (True, 12)
    assert metrics(name)[: len(before)] == before
    api.train(config=override_config(config, {"max_steps": 12}), run="whole")
    expected = final_state("whole")
    for key, value in final_state(name).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-3, atol=1e-4, err_msg=key)
