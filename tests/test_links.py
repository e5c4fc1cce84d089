"""Symbolic links and paths that lead outside a run or data folder are not followed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.config import toml
from mlxgpt.data.dataset import open_dataset
from mlxgpt.storage import run as runs
from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("no_check")
SMALL_RUN = Path("runs/done")
STEP = SMALL_RUN / "checkpoints/step-0000012"


@pytest.mark.parametrize(
    "what", ["model.safetensors", "manifest.json", "checkpoint", "checkpoints", "config.toml"]
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_are_refused(place: Path, what: str, kind: str) -> None:
    """Links may lead outside the run's folder, and reading a pipe may block forever."""
    names = {"checkpoint": STEP, "checkpoints": STEP.parent, "config.toml": SMALL_RUN / what}
    path = names.get(what, STEP / what)
    path.rename("outside")
    if kind == "link":
        path.symlink_to(Path("outside").absolute())
    else:
        os.mkfifo(path)
    for use in (api.generate, api.evaluate):
        with pytest.raises(UserError, match="is a symbolic link or not a regular file"):
            use(run="done")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", "history.jsonl"])
def test_nothing_is_written_through_a_link(place: Path, text_file: Path, name: str) -> None:
    (SMALL_RUN / name).unlink(missing_ok=True)
    Path("precious").write_text("mine")
    (SMALL_RUN / name).symlink_to(Path("precious").absolute())
    run = toml.load_config(SMALL_RUN / "config.toml")
    with pytest.raises(UserError, match="is a symbolic link"):
        api.train(config=run, source=text_file, run="done", max_steps=20)
    assert Path("precious").read_text() == "mine"


def test_links_in_a_data_folder_are_refused(place: Path) -> None:
    shutil.move("data/words/train.bin", "train.bin")
    Path("data/words/train.bin").symlink_to(Path("train.bin").absolute())
    with pytest.raises(UserError, match="is a symbolic link"):
        open_dataset(Path("data/words"))


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "..", ".", "", "a/b", "a\nb", "x" * 256]
)
def test_run_cannot_name_data_outside_the_data_folder(place: Path, name: str) -> None:
    path = SMALL_RUN / "run.json"
    tree = json.loads(path.read_text())
    del tree["seal"]
    path.write_text(json_files.dump_checksummed({**tree, "data_name": name}))
    with pytest.raises(UserError, match="is not a valid data folder name"):
        runs.open_run(SMALL_RUN)
