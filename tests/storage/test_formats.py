"""Reading files of all format versions: tests/formats/N was written by an older mlxgpt, where N is
the largest format version in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.data.meta import META_FORMAT_VERSION
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.utils import json_files
from tests.helpers.training_runs import final_state, metrics

pytestmark = pytest.mark.usefixtures("no_check")
FORMATS = Path(__file__).parents[1] / "formats"
VERSIONS = sorted(p for p in FORMATS.iterdir() if p.name.isdecimal())
RUNS = {"chars": "words.txt", "tales": "tales.txt"}


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def old_home(request: pytest.FixtureRequest, home: Path) -> Path:
    """A working directory with files written by an older version."""
    shutil.copytree(request.param, home, dirs_exist_ok=True)
    return home


def test_every_format_version_has_files() -> None:
    assert [folder.name for folder in VERSIONS] == [str(n + 1) for n in range(len(VERSIONS))]
    newest = max(checkpoint.CHECKPOINT_FORMAT, runs.RUN_FORMAT)
    assert len(VERSIONS) == newest, "a new format needs files of its own: formats/make.py"


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_can_be_evaluated_and_generate(old_home: Path, name: str) -> None:
    best = runs.open_run(old_home / "runs" / name).best()
    assert best is not None
    assert api.evaluate(run=name).loss == pytest.approx(best["val_loss"], rel=1e-4)
    assert api.generate(run=name, max_tokens=5).tokens > 0


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_can_be_resumed_with_old_data(old_home: Path, name: str) -> None:
    """It ends like an uninterrupted run, except for the rounding of another machine."""
    config = runs.open_run(old_home / "runs" / name).config
    before = metrics(name)
    summary = api.train(config=override_config(config, {"max_steps": 12}), run=name)
    assert (summary.resumed, summary.step) == (True, 12)
    assert metrics(name)[: len(before)] == before
    api.train(config=override_config(config, {"max_steps": 12}), run="whole")
    expected = final_state("whole")
    for key, value in final_state(name).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-3, atol=1e-4, err_msg=key)


def test_a_run_on_synthetic_stories_named_storybook_is_resumed(home: Path, tiny: Config) -> None:
    """The corpus `synthetic` was called `storybook` in older runs and data folders."""
    dataset = api.prepare("synthetic", megabytes=0.02, name="storybook")
    short = override_config(tiny, {"max_steps": 4, "decay_steps": 8})
    run_folder = api.train(config=short, source="synthetic", run="old").run
    meta_path, config_path = dataset.folder / "meta.json", run_folder / "config.toml"
    meta = json_files.read_checksummed(meta_path, META_FORMAT_VERSION)
    meta["origin"] = {"storybook": meta["origin"].pop("synthetic"), **meta["origin"]}
    meta_path.write_text(json_files.dump_checksummed(meta), encoding="utf-8")
    toml = config_path.read_text(encoding="utf-8")
    toml = toml.replace('source = ["synthetic"]', 'source = ["storybook"]')
    config_path.write_text(toml, encoding="utf-8")
    config = runs.open_run(run_folder).config
    assert config.data.source == ("synthetic",)
    summary = api.train(config=override_config(config, {"max_steps": 6}), run="old")
    assert (summary.resumed, summary.data) == (True, dataset.folder)
    assert [path.name for path in Path("data").iterdir()] == ["storybook"]
