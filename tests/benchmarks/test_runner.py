"""The baselines' runner: order of tasks, fresh processes, failures. test_oracle_baselines.py tests
the frameworks.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from baselines import runner
from baselines.records import TaskResult
from baselines.runner import (
    MLXGPT_FRAMEWORK,
    NANOGPT_FRAMEWORK,
    BenchmarkModel,
    BenchmarkSettings,
    Framework,
    run_tasks,
)

from mlxgpt.backend.cpu import blas
from mlxgpt.config import Config, ModelConfig, override_config
from mlxgpt.utils.errors import UserError

TINY = override_config(
    Config(ModelConfig(1, 2, 32, 16, 37, 0.0, False)), {"dtype": "float32", "batch_size": 2}
)
QUICK = BenchmarkSettings(
    rounds=1, training_seconds=0.01, max_batch_size=2, learning_steps=6, corpus_megabytes=0.05
)
MODEL = BenchmarkModel("tiny", TINY, batch_sizes=(1, 3))
OTHER = Framework("other", "other", ("training", "generate"), "sys")


def test_mlxgpt_runs_all_tasks() -> None:
    results = list(run_tasks([MODEL], [MLXGPT_FRAMEWORK], settings=QUICK))
    assert [(r.config, r.task, r.texts) for r in results] == [
        ("tiny", "training", 0),
        ("tiny", "generate", 1),
        ("tiny", "generate", 3),
        ("tiny", "learning", 0),
        ("tiny", "preparation", 0),
    ]
    for result in results:
        assert not result.failed
        (values,) = result.rounds["mlxgpt"]
        assert values["peak_memory"] > 10e6
        assert all(value > 0 for name, value in values.items() if name != "curve")
        assert "mlx" in result.made_with["mlxgpt"]["versions"]
    curve = results[3].rounds["mlxgpt"][0]["curve"]
    assert [seconds > 0 for seconds, _ in curve] == [False, False, True, True, True, True]
    assert curve[-1][1] < curve[0][1], "something is learned"


def test_models_may_only_train_or_only_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_run_in_process", lambda framework, task: {"made_with": {}})
    settings = BenchmarkSettings(rounds=1, learning_steps=1, corpus_megabytes=0.05)
    models = [
        BenchmarkModel("tiny", TINY, batch_sizes=(1, 2)),
        BenchmarkModel("narrow", TINY, batch_sizes=()),
        BenchmarkModel("deep", TINY, has_training=False, batch_sizes=(1,)),
    ]
    results = list(run_tasks(models, [MLXGPT_FRAMEWORK, NANOGPT_FRAMEWORK], settings=settings))
    generated = [r.rounds.keys() for r in results if r.task == "generate"]
    assert generated == [{"mlxgpt", "nanoGPT"}, {"mlxgpt"}, {"mlxgpt"}], "slow without a cache"
    assert [(r.config, r.task, r.texts) for r in results] == [
        ("tiny", "training", 0),
        ("tiny", "generate", 1),
        ("tiny", "generate", 2),
        ("narrow", "training", 0),
        ("deep", "generate", 1),
        ("tiny", "learning", 0),
        ("tiny", "preparation", 0),
    ]


def test_frameworks_take_turns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[str, str, int]] = []

    def run(framework: Framework, task: dict[str, Any]) -> dict[str, Any]:
        calls.append((task["task"], framework.name, task["texts"]))
        return {"tokens_per_second": 1.0 + len(calls), "made_with": {"versions": framework.name}}

    monkeypatch.setattr(runner, "_run_in_process", run)
    settings = BenchmarkSettings(rounds=2, learning_steps=1, corpus_megabytes=0.05)
    with caplog.at_level("INFO"):
        results = list(
            run_tasks(
                [BenchmarkModel("tiny", TINY, batch_sizes=(1,))],
                [MLXGPT_FRAMEWORK, OTHER],
                settings=settings,
            )
        )
    assert calls[:4] == [("training", name, 0) for name in ("mlxgpt", "other")] * 2
    assert calls[4:8] == [("generate", name, 1) for name in ("mlxgpt", "other")] * 2
    assert [name for _, name, _ in calls[8:]] == ["mlxgpt"] * 4, "the other cannot do the rest"
    assert caplog.messages[5] == "tiny, generate of 1, round 1 of 2: other …"
    rates = [values["tokens_per_second"] for values in results[0].rounds["other"]]
    assert rates == [3.0, 5.0]
    assert results[0].made_with["other"] == {"versions": "other"}


def test_failing_framework_is_named_and_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(framework: Framework, task: dict[str, Any]) -> dict[str, Any]:
        calls.append(framework.name)
        if framework is OTHER:
            raise UserError("it has no room", "…")
        return {"made_with": {}}

    monkeypatch.setattr(runner, "_run_in_process", run)
    settings = BenchmarkSettings(rounds=3, learning_steps=1, corpus_megabytes=0.05)
    first = next(run_tasks([MODEL], [MLXGPT_FRAMEWORK, OTHER], settings=settings))
    assert first.failed == {"other": "it has no room"}
    assert calls == ["mlxgpt", "other", "mlxgpt", "mlxgpt"]


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("import sys; print('a'); sys.exit('no module of that name')", "no module of that name"),
        ("import os; os._exit(7)", "its process ended with code 7"),
    ],
)
def test_failing_process_reports_the_reason(
    monkeypatch: pytest.MonkeyPatch, child: str, reason: str
) -> None:
    monkeypatch.setattr(runner, "PROCESS_COMMAND", (sys.executable, "-c", child))
    with pytest.raises(UserError, match=reason):
        runner._run_in_process(MLXGPT_FRAMEWORK, {"task": "training"})


PRINT_BLAS = """
import json, mlxgpt
from mlxgpt.backend.cpu import blas
print(json.dumps({"blas": blas.blas_status()}))
"""


def test_baseline_processes_do_not_use_mlxgpts_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS and allocator settings of mlxgpt would affect the whole process."""
    monkeypatch.setattr(runner, "PROCESS_COMMAND", (sys.executable, "-c", PRINT_BLAS))
    mlxgpt_blas, other_blas = (
        runner._run_in_process(framework, {})["blas"] for framework in (MLXGPT_FRAMEWORK, OTHER)
    )
    assert other_blas == "MLX's own BLAS"
    assert mlxgpt_blas == blas.blas_status()


def test_missing_packages_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None if name == "torch" else object())
    frameworks, missing = runner.installed_frameworks()
    assert missing == ["torch"]
    assert [f.name for f in frameworks] == ["mlxgpt", "transformers", "mlx-lm", "datasets.map"]


def test_folder_without_nanogpt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no model\.py"):
        runner.installed_frameworks(tmp_path)
    (tmp_path / "model.py").touch()
    frameworks, missing = runner.installed_frameworks(tmp_path)
    assert ("nanoGPT" in [f.name for f in frameworks]) == ("torch" not in missing)


def test_result_is_plain_data() -> None:
    result = TaskResult("tiny", "training", 0, {"a": [{"x": 1.0}]}, {"a": {"b": "c"}}, {"d": "e"})
    assert TaskResult(**asdict(result)) == result
