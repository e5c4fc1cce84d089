"""Shared fixtures: a tiny model config, a small text, a finished run, the real datasets."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# M5 GPUs and CUDA round float32 matmuls to TF32, except those of a single row, so that batched and
# single results would differ. Set before the first matmul, as in MLX's own tests.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from mlxgpt import api
from mlxgpt.backend import device, execution
from mlxgpt.config import Config, config_from_tree, override_config
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.training import selfcheck
from mlxgpt.training.callbacks import Callback, TrainingSummary
from tests.helpers.log_lines import capture_log_lines
from tests.helpers.training_runs import Recorder


def pytest_configure() -> None:
    """Make Ctrl-C work in tests and their child processes, even if SIGINT was inherited as ignored
    (under `nohup` or in a background job). Child processes reset the handler.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="N/M: every M-th test, from the N-th on")


@pytest.hookimpl(trylast=True)  # after -m has deselected tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, stride = map(int, config.getoption("--part").split("/"))
    selected = items[first - 1 :: stride]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("exact_bits") and not device.on_cpu():
        pytest.skip("a GPU may add in another order in each run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape logged names that are not UTF-8, which xdist cannot pass between processes."""
    report = yield
    report.sections = [
        (name, content.encode("utf-8", "backslashreplace").decode())
        for name, content in report.sections
    ]
    return report


# Slow examples on a busy machine are not failures.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def same_everywhere() -> Iterator[None]:
    """Unset the caller's variables that would change outputs and folders, and do not log what makes
    this machine slow, such as a missing compiler.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "LINES", "MLXGPT_HOME"):
            patch.delenv(name, raising=False)
        patch.setattr(execution, "slow_reasons", lambda: [])
        yield


@pytest.fixture
def compiler() -> None:
    """Skip a test of compiled functions where MLX cannot compile: on a CPU without g++."""
    if failure := execution.compile_failure():
        pytest.skip(failure)


@pytest.fixture
def notes() -> Iterator[list[str]]:
    """Lines that mlxgpt logs during a test."""
    lines: list[str] = []
    with capture_log_lines(lines.append):
        yield lines


TINY: dict[str, dict[str, Any]] = {
    "model": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 8,
        "dropout": 0.1,
        "bias": True,
    },
    "optim": {"learning_rate": 1e-2, "warmup_steps": 2},
    "train": {
        "batch_size": 4,
        "max_steps": 12,
        "eval_interval": 4,
        "log_interval": 2,
        "save_interval": 4,
        "sample_tokens": 10,
        "seed": 7,
    },
}


@pytest.fixture(scope="session")
def tiny() -> Config:
    """A tiny config that trains in milliseconds, with all features on; no vocabulary size."""
    return config_from_tree(TINY)


@pytest.fixture(scope="session")
def tiny_model(tiny: Config) -> Config:
    """The tiny config with a vocabulary size, for tests that need no data."""
    return override_config(tiny, {"vocab_size": 19, "dtype": "float32"})


@pytest.fixture(scope="session")
def text() -> str:
    """2,000 characters of words in random order; the first half contains all of them."""
    words = ["to be", "or not", "the rain", "in Spain", "falls,", "mainly.\n", "ÄÖÜ", "plain"]
    draw = random.Random(0)
    return (" ".join(words) + " " + " ".join(draw.choices(words, k=400)))[:2000]


@pytest.fixture
def text_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, for data/ and runs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Config, text: str) -> Path:
    """Folder with one finished run, `runs/done`, and its data. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    source = folder / "words.txt"
    source.write_text(text, encoding="utf-8")
    api.train(
        config=tiny, source=source, run="done", runs_dir=folder / "runs", data_dir=folder / "data"
    )
    return folder


@pytest.fixture
def place(home: Path, trained: Path, text_file: Path) -> Path:
    """Current folder with words.txt, its dataset, and a finished run."""
    shutil.copytree(trained / "runs", home / "runs")
    shutil.copytree(trained / "data", home / "data")
    return home


@pytest.fixture
def no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the self-check before training."""
    monkeypatch.setattr(selfcheck, "run_self_check", lambda config: iter([]))


@pytest.fixture(scope="session")
def real_texts() -> Path:
    """The folder of real datasets that MLXGPT_TEXTS names."""
    folder = os.environ.get("MLXGPT_TEXTS")
    if not folder:
        pytest.skip("MLXGPT_TEXTS names no folder of real texts")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2(real_texts: Path) -> BPETokenizer:
    """GPT-2's tokenizer, loaded from the cache among the real datasets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(real_texts / "tiktoken-cache"))
        return bpe.load_gpt2_tokenizer()


@pytest.fixture(scope="session")
def shakespeare(real_texts: Path) -> Path:
    """The real Tiny Shakespeare dataset."""
    return real_texts / "shakespeare" / "input.txt"


@pytest.fixture
def train(home: Path, text_file: Path, tiny: Config) -> Any:
    def train(run: str, observer: Callback | None = None, **settings: Any) -> TrainingSummary:
        settings = {"config": tiny, "source": text_file, **settings}
        with observer.recording_logs() if isinstance(observer, Recorder) else nullcontext():
            return api.train(run=run, callbacks=[observer] if observer else [], **settings)

    return train
