"""`python benchmarks/compare_baselines.py` with a runner that measures nothing."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare_baselines
import pytest
from baselines import runner
from baselines.records import Comparison, TaskResult
from baselines.runner import BenchmarkModel

from mlxgpt.bench import speed
from tests.helpers import bench_measurement
from tests.helpers.commands import ROOT, Capture

RESULT = TaskResult("tier1", "training", 0, {"mlxgpt": [{"tokens_per_second": 1.0}]})


@pytest.fixture(autouse=True)
def only_datasets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only `datasets` is installed; restore the logger's level afterwards."""
    monkeypatch.setattr(runner, "find_spec", lambda name: name == "datasets")
    monkeypatch.setattr(
        speed, "describe_machine", lambda: bench_measurement.make_measurement().machine
    )
    level = compare_baselines.logger.level
    yield
    compare_baselines.logger.setLevel(level)


def test_it_writes_a_report(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[Any] = []

    def run_tasks(
        models: list[BenchmarkModel], frameworks: Any, **options: Any
    ) -> Iterator[TaskResult]:
        calls.append(([model.name for model in models], [f.name for f in frameworks]))
        assert options["nanogpt"] is None
        yield TaskResult(**{**vars(RESULT), "rounds": {}})

    monkeypatch.setattr(compare_baselines, "run_tasks", run_tasks)
    for tier in ([], ["--tier", "2"]):
        assert compare_baselines.main([*tier, "--output", str(tmp_path / "out")]) == 0
    other_models = ["nanoGPT's for a CPU", "gpt2-124m"]
    frameworks = ["mlxgpt", "datasets.map"]
    assert calls == [
        (["tier1", "tier2", *other_models], frameworks),
        (["tier2", *other_models], frameworks),
    ]
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 4
    assert Comparison.from_json(files[0].read_text(encoding="utf-8")).results[0].config == "tier1"
    assert capsys.readouterr().out.startswith("# mlxgpt and other libraries on Intel(R) Xeon(R)")
    assert caplog.messages[0] == (
        "not installed, left out: mlx_lm, torch, transformers. "
        "To get all: pip install -e '.[baselines]'"
    )


def test_baselines_extra_lists_the_other_frameworks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {name.split(">")[0] for name in project["optional-dependencies"]["baselines"]}
    assert extra == {"torch", "transformers", "mlx-lm"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nanogpt", "."], "compare_baselines: . is not a nanoGPT checkout: it has no model.py"),
        (["--output", "file"], "compare_baselines: cannot write file: File exists"),
    ],
)
def test_invalid_arguments_are_refused_before_measuring(
    home: Path, arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (home / "file").touch()
    monkeypatch.setattr(compare_baselines, "run_tasks", lambda *_, **__: pytest.fail("it ran"))
    assert compare_baselines.main(arguments) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == problem
    assert second.startswith("  → ")


def test_runner_logs_to_the_logger_of_the_script(caplog: pytest.LogCaptureFixture) -> None:
    assert runner.logger.name.startswith(f"{compare_baselines.logger.name}.")
    assert logging.getLogger("baselines") is compare_baselines.logger
