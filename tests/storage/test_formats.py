"""Files of every format ever written, committed in tests/formats, are read; newer ones are refused
and not changed. See formats/make.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.bench.records import MEASUREMENT_FORMAT
from mlxgpt.config import Config, override_config
from mlxgpt.data.hash_cache import CACHE_FORMAT_VERSION
from mlxgpt.data.meta import EXAMPLES_FORMAT_VERSION, META_FORMAT_VERSION
from mlxgpt.evaluation.sample_quality import QUALITY_FORMAT
from mlxgpt.experiments.registry import REGISTRY_FORMAT, open_registry
from mlxgpt.experiments.results import RECORD_FORMAT
from mlxgpt.storage.checkpoint import CHECKPOINT_FORMAT
from mlxgpt.storage.run import RUN_FORMAT, open_run
from mlxgpt.training.callbacks import TrainingSummary
from mlxgpt.training.scaling_law import LAW_FORMAT, find_scaling_law
from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError
from tests.formats.make import TUNING
from tests.helpers.training_runs import final_state, metrics

pytestmark = pytest.mark.usefixtures("no_check")
FORMATS = Path(__file__).parents[1] / "formats"
CURRENT = FORMATS / "0.1.0"  # every kind of file
HOMES = sorted(runs.parent for runs in FORMATS.glob("*/runs"))
RUNS = ("chars", "tales")
TUNED_RUNS = ("chat", "pairs")
STUDIES, LAW = Path("runs/compare"), Path("runs/compare/laws/0123456789abcdef.json")

# Files that contain a format version: their newest one.
VERSIONED = {
    "run.json": RUN_FORMAT,
    "best.json": RUN_FORMAT,
    "quality.json": QUALITY_FORMAT,
    "manifest.json": CHECKPOINT_FORMAT,
    "meta.json": EXAMPLES_FORMAT_VERSION,
    "verified.json": CACHE_FORMAT_VERSION,
    "ledger.json": REGISTRY_FORMAT,
    "laws/*.json": LAW_FORMAT,
    "mine/mine.json": RECORD_FORMAT,
    "scaling.json": RECORD_FORMAT,
    "bench*.json": MEASUREMENT_FORMAT,
}


def train(name: str, steps: int, run: str | None = None) -> TrainingSummary:
    """Resume a run of CURRENT, or train it from the start as `run`."""
    if name in TUNED_RUNS:
        return api.train(source=f"{name}.jsonl", run=run or name, max_steps=steps, **TUNING)
    config = override_config(open_run(Path("runs") / name).config, {"max_steps": steps})
    return api.train(config=config, run=run or name)


def report(path: Path) -> None:
    api.report(path, output="report.html")


# A file of CURRENT, and what reads it.
READERS: dict[str, Callable[[], object]] = {
    "runs/tales/run.json": lambda: train("tales", 12),
    "runs/chat/best.json": lambda: train("chat", 12),
    "runs/chars/checkpoints/step-0000008/manifest.json": lambda: train("chars", 12),
    "runs/chars/snapshots/step-0000000/manifest.json": lambda: api.generate(
        run="chars", checkpoint="0"
    ),
    "data/words/meta.json": lambda: train("chars", 12),
    "data/pairs-*/meta.json": lambda: train("pairs", 12),
    "runs/compare/mine/ledger.json": lambda: open_registry(STUDIES / "mine"),
    "runs/compare/mine/mine.json": lambda: report(STUDIES / "mine/mine.json"),
    "runs/compare/scaling.json": lambda: report(STUDIES / "scaling.json"),
    str(LAW): lambda: find_scaling_law(LAW),
    "bench.json": lambda: report(Path("bench.json")),
    "runs/tales/quality.json": lambda: api.report("tales", output="report.html"),
}


@pytest.fixture(params=HOMES, ids=lambda folder: folder.name)
def old_home(request: pytest.FixtureRequest, home: Path) -> Path:
    """A working directory with files written by an older version."""
    shutil.copytree(request.param, home, dirs_exist_ok=True)
    return home


@pytest.fixture
def current_home(home: Path) -> Path:
    shutil.copytree(CURRENT, home, dirs_exist_ok=True)
    return home


@pytest.mark.parametrize("pattern", VERSIONED)
def test_every_format_version_has_a_file(pattern: str) -> None:
    paths = FORMATS.rglob(pattern)
    formats = {json.loads(path.read_text(encoding="utf-8")).get("format", 1) for path in paths}
    expected = set(range(1, VERSIONED[pattern] + 1))
    assert formats == expected, "a new format needs a file: run formats/make.py"


def test_every_json_file_has_a_format() -> None:
    """Except for tokenizer.json, whose format is that of `tokenizers`."""
    paths = {path for path in CURRENT.rglob("*.json") if path.name != "tokenizer.json"}
    assert paths == {path for pattern in VERSIONED for path in CURRENT.rglob(pattern)}
    for path in paths:
        assert type(json.loads(path.read_text(encoding="utf-8"))["format"]) is int


def read_files(folder: Path) -> dict[Path, bytes]:
    """Contents of all files but the hash cache, which a copied folder updates."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths if path.name != "verified.json"}


@pytest.mark.parametrize("name", READERS)
def test_a_newer_file_is_refused_and_kept(current_home: Path, name: str) -> None:
    (path,) = current_home.glob(name)
    tree = {**json.loads(path.read_text(encoding="utf-8")), "format": 99}
    is_checksummed = tree.pop(json_files.CHECKSUM_KEY, None) is not None
    text = json_files.dump_checksummed(tree) if is_checksummed else json.dumps(tree)
    path.write_text(text, encoding="utf-8")
    before = read_files(current_home)
    with pytest.raises(UserError, match=r"written by a newer mlxgpt \(format 99\)") as excinfo:
        READERS[name]()
    assert "update mlxgpt" in excinfo.value.remedy
    assert before.items() <= read_files(current_home).items()


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_can_be_evaluated_and_generate(old_home: Path, name: str) -> None:
    best = open_run(old_home / "runs" / name).best()
    assert best is not None
    assert api.evaluate(run=name).loss == pytest.approx(best["val_loss"], rel=1e-4)
    assert api.generate(run=name, max_tokens=5).tokens > 0


def check_resuming(name: str) -> None:
    """It ends like an uninterrupted run, except for the rounding of another machine."""
    before = metrics(name)
    summary = train(name, 12)
    assert (summary.resumed, summary.step) == (True, 12)
    assert metrics(name)[: len(before)] == before
    train(name, 12, run="whole")
    expected = final_state("whole")
    for key, value in final_state(name).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-3, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_can_be_resumed_with_old_data(old_home: Path, name: str) -> None:
    check_resuming(name)
    assert len(list(Path("data").iterdir())) == len(list(old_home.glob("data/*/meta.json")))


@pytest.mark.parametrize("name", TUNED_RUNS)
def test_an_old_run_on_examples_can_be_resumed(current_home: Path, name: str) -> None:
    check_resuming(name)
    assert len(list(Path("data").iterdir())) == 4, "the old examples are used"


@pytest.mark.parametrize("folder", ["0.1.0/runs/compare", "records"])
def test_old_studies_and_benchmarks_are_read(home: Path, folder: str) -> None:
    for path in (FORMATS / folder).rglob("*.json"):
        if path.name != "ledger.json" and path.parent.name != "laws":
            report(path)


def test_the_registry_and_the_law_of_an_old_study_are_read(current_home: Path) -> None:
    assert open_registry(STUDIES / "mine").looks == [2]
    law = find_scaling_law(LAW)
    assert law is not None
    assert law.limit == 0.5


def test_an_old_snapshot_and_sample_quality_are_read(current_home: Path) -> None:
    assert api.generate(run="chars", checkpoint="0", max_tokens=5).tokens > 0
    page = api.report("tales", output="report.html").read_text(encoding="utf-8")
    assert "Sample quality metrics" in page


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
    config = open_run(run_folder).config
    assert config.data.source == ("synthetic",)
    summary = api.train(config=override_config(config, {"max_steps": 6}), run="old")
    assert (summary.resumed, summary.data) == (True, dataset.folder)
    assert [path.name for path in Path("data").iterdir()] == ["storybook"]
