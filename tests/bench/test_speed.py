from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt import __version__, config
from mlxgpt.backend import device, macos
from mlxgpt.bench import speed
from mlxgpt.bench.report import Measurement
from mlxgpt.bench.speed import BenchPlan
from mlxgpt.config import Config, SamplingParams, toml
from mlxgpt.inference.decode import BatchDecoder
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.model.gpt import GPT
from mlxgpt.model.kv_cache import KVCache
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.stats import count_parameters, flops_per_token
from mlxgpt.utils.errors import UserError

QUICK = BenchPlan(repeats=5, seconds=0.02, prompt_tokens=3, new_tokens=12)


@dataclass
class BenchResult:
    measurement: Measurement
    parent_bytes: int


@pytest.fixture(scope="module")
def bench_result(tiny_model: Config) -> BenchResult:
    """A real measurement in child processes, while this process uses much memory."""
    array = np.ones(60_000_000)  # 480 MB
    parent_bytes = device.resident_bytes()
    measurement = speed.benchmark_configs({"a": tiny_model, "b": tiny_model}, QUICK)
    assert array[0] == 1
    return BenchResult(measurement, parent_bytes)


def test_each_config_is_measured(bench_result: BenchResult, tiny_model: Config) -> None:
    assert [tier.name for tier in bench_result.measurement.tiers] == ["a", "b"]
    for tier in bench_result.measurement.tiers:
        assert tier.parameters == count_parameters(tiny_model.model)
        assert tier.dtype == "float32"
        assert config.config_from_tree(tier.config) == tiny_model


def test_results_are_consistent(bench_result: BenchResult, tiny_model: Config) -> None:
    for tier in bench_result.measurement.tiers:
        t, g = tier.training, tier.generation
        assert t.tokens_per_step == 4 * 8
        assert t.plan_tokens == 12 * 4 * 8
        assert t.flops_per_token == flops_per_token(tiny_model.model)
        assert t.tokens_per_second == 1000 * t.tokens_per_step / t.ms_per_step.median
        assert t.peak_share == t.tokens_per_second * t.flops_per_token / t.matmul_peak
        assert t.warmup_steps >= 2
        assert t.steps_per_repeat >= 1
        assert (g.prompt_tokens, g.new_tokens) == (3, 12)
        for stats in (t.ms_per_step, g.ms_to_first_token, g.tokens_per_second):
            assert len(stats.repeats) == 5
            assert 0 < stats.least <= stats.median <= stats.most


on_cpu = pytest.mark.skipif(
    device.device_type() != "cpu", reason="on a GPU, MLX's own memory counts"
)


@on_cpu
def test_peak_memory_excludes_the_parent_process(bench_result: BenchResult) -> None:
    assert bench_result.parent_bytes > 500e6
    for tier in bench_result.measurement.tiers:
        assert 20e6 < tier.training.peak_memory < 400e6
        assert tier.training.peak_memory_of == "the whole process"


@on_cpu
def test_peak_memory_includes_freed_memory() -> None:
    array = np.ones(40_000_000)  # 320 MB, returned to the system immediately
    del array
    assert device.peak_memory_bytes() >= 300e6


def test_json_round_trip(bench_result: BenchResult) -> None:
    text = bench_result.measurement.to_json()
    assert Measurement.from_json(text) == bench_result.measurement
    assert json.loads(text)["machine"]["chip"] == device.device_name()


def test_the_machine_is_described(bench_result: BenchResult) -> None:
    machine = bench_result.measurement.machine
    assert machine.backend == device.device_type()
    assert machine.cores == os.cpu_count()
    assert machine.memory == device.total_memory_bytes()
    assert machine.load >= 0
    assert machine.versions["mlxgpt"] == __version__
    assert machine.versions["Python"] == sys.version.split()[0]
    assert machine.versions["numpy"] == np.__version__
    assert machine.versions["mlx"][0].isdigit()
    assert bench_result.measurement.date.endswith("+00:00")


def test_performance_cores_are_counted_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    sysctl_values = {"hw.perflevel0.physicalcpu": "4"}
    monkeypatch.setattr(macos, "sysctl", lambda name: sysctl_values.get(name, ""))
    monkeypatch.setattr(sys, "platform", "linux")
    assert speed._count_performance_cores() is None, "this is not a Mac"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert speed._count_performance_cores() == 4
    sysctl_values.clear()
    assert speed._count_performance_cores() is None


def test_default_plan_vocabulary_and_dtype() -> None:
    assert speed.DEFAULT_PLAN.repeats >= 5
    assert speed.DEFAULT_PLAN.seconds >= 1
    first, second = (speed.resolve_vocab_and_dtype(toml.load_tier_config(n)) for n in (1, 2))
    assert first.model.vocab_size == 65
    assert second.model.vocab_size == toml.load_tier_config(2).model.vocab_size > 65
    assert first.train.dtype == device.resolve_dtype(toml.load_tier_config(1)).train.dtype != "auto"


def test_training_is_timed_after_warmup(
    tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_ranges: list[tuple[int, int]] = []
    # The first step compiles; later ones take 0.3 s, and twice as long in one of the repeats.
    seconds = iter([100.0, 0.3, 1.2, 1.2, 2.4, 1.2, 1.2])

    now = 0.0

    def take_steps(step: Any, tokens: Any, config: Config, steps: int, start: int) -> None:
        nonlocal now
        step_ranges.append((start, start + steps))
        inputs, *_ = tokens.get_batch(start, seed=0, batch_size=4, block_size=8)
        assert 5 < inputs.max() < 19, "any id of the vocabulary"
        now += next(seconds)

    monkeypatch.setattr(speed, "take_steps", take_steps)
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: now))
    result = speed.measure_training(tiny_model, BenchPlan(repeats=5, seconds=1.0))
    assert step_ranges == [(0, 2), (2, 3), (3, 7), (7, 11), (11, 15), (15, 19), (19, 23)]
    assert (result.warmup_steps, result.steps_per_repeat) == (3, 4)
    assert result.ms_per_step.repeats == pytest.approx([300, 300, 600, 300, 300])
    assert result.tokens_per_second == pytest.approx(32 / 0.3)


@pytest.mark.parametrize("peaks", [[1e9, 3e9], [3e9, 1e9]])
def test_matmul_peak_is_the_larger_of_before_and_after(
    peaks: list[float], tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining_peaks = iter(peaks)
    monkeypatch.setattr(device, "matmul_peak", lru_cache(lambda dtype: next(remaining_peaks)))
    assert speed.measure_training(tiny_model, QUICK).matmul_peak == 3e9


def test_step_longer_than_a_repeat_is_one_repeat(tiny_model: Config) -> None:
    assert speed.measure_training(tiny_model, BenchPlan(5, 1e-9)).steps_per_repeat == 1


def test_generation_times_the_first_token_and_the_rest_separately(
    tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, first_token_seconds = (
        [0.0],
        iter([9.0, 0.05, 0.07, 0.05, 0.05, 0.06]),
    )  # the first call compiles

    def checked_decoder(
        compiled: CompiledModel, texts: list, sampling: SamplingParams
    ) -> BatchDecoder:
        ((prompt, _),) = texts
        assert (len(prompt), sampling.max_tokens, compiled.vocab_size) == (3, 12, 19)
        assert prompt.max() < 19
        return BatchDecoder(compiled, texts, sampling)

    def timed_steps(batch: BatchDecoder) -> Iterator[list[int]]:
        for n in range(12):
            now[0] += 0.01 if n else next(first_token_seconds)
            yield [0]

    def compiled(model: GPT, vocab_size: int) -> CompiledModel:
        graph = StringIO()
        mx.export_to_dot(graph, model.wte.weight)
        assert "->" not in graph.getvalue(), "weights that are still to be drawn cost at each token"
        return CompiledModel(model, vocab_size)

    monkeypatch.setattr(speed, "CompiledModel", compiled)
    monkeypatch.setattr(speed, "BatchDecoder", checked_decoder)
    monkeypatch.setattr(speed, "generate_step", timed_steps)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    result = speed.measure_generation(tiny_model.model, QUICK)
    assert result.ms_to_first_token.repeats == pytest.approx([50, 70, 50, 50, 60])
    assert result.tokens_per_second.repeats == pytest.approx([100] * 5)


def test_bytes_per_new_token_are_weights_and_cache(tiny_model: Config) -> None:
    model = GPT(tiny_model.model)
    weights = sum(array.nbytes for array in flatten_params(model.parameters()).values())
    unused_position_bytes = model.wpe.weight[1:].nbytes
    cache = KVCache()
    model(mx.zeros((1, tiny_model.model.block_size), mx.int32), cache)
    cache_bytes = sum(k.nbytes + v.nbytes for k, v in cache.layers)
    assert (
        speed.bytes_per_new_token(tiny_model.model) == weights - unused_position_bytes + cache_bytes
    )


def test_each_config_is_logged(
    tiny_model: Config, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    monkeypatch.setattr(speed, "_measure_in_subprocess", lambda name, config, plan: None)
    speed.benchmark_configs({"a": tiny_model, "b": tiny_model}, QUICK)
    assert notes == [
        "a: benchmarking training and generation …",
        "b: benchmarking training and generation …",
    ]


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("import sys; print(1, file=sys.stderr); sys.exit('no room\\n\\n')", "no room"),
        ("import os; os.kill(os.getpid(), 9)", "the process exited with code -9"),
    ],
)
def test_failing_child_process_is_a_user_error(
    child: str, reason: str, tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "CHILD_COMMAND", (sys.executable, "-c", child))
    with pytest.raises(UserError) as error:
        speed.benchmark_configs({"tiny": tiny_model}, plan=QUICK)
    assert error.value.problem == f"benchmarking tiny failed: {reason}"
    assert "mlxgpt check" in error.value.remedy


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one commit."""
    git_path = shutil.which("git")
    if git_path is None or macos.is_xcode_stub(git_path):
        pytest.skip("git is not installed")
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # in a git hook, these point to another checkout
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    root = tmp_path / "checkout"
    (root / "mlxgpt").mkdir(parents=True)
    (root / "mlxgpt" / "model.py").write_text("1\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    git(root, *identity, "commit", "--quiet", "--message", "one")
    return root


def git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_is_reported_with_uncommitted_changes(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")[:12]
    assert speed.read_git_commit(checkout) == commit
    (checkout / "benchmarks").mkdir()
    (checkout / "benchmarks" / "report.md").write_text("a report\n")
    assert speed.read_git_commit(checkout) == commit, "a report changes no speed"
    (checkout / "mlxgpt" / "new.py").write_text("2\n")
    assert speed.read_git_commit(checkout) == f"{commit} + changes"


def test_outside_a_checkout_there_is_no_commit(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert speed.read_git_commit(tmp_path) is None
    assert speed.read_git_commit(checkout / "mlxgpt") is None, (
        "site-packages in somebody's own checkout"
    )
    monkeypatch.setenv("PATH", "")
    assert speed.read_git_commit(checkout) is None, "without git"


def test_git_is_not_called_if_it_is_an_xcode_stub(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(macos, "is_xcode_stub", lambda program: program == shutil.which("git"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was called"))
    assert speed.read_git_commit(checkout) is None
