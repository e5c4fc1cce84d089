"""Measure the speed of training and generation on this machine. The result classes are in
records.py; report.py renders them.

Each config is measured in a fresh process, `python -m mlxgpt.bench.speed`, so that neither its
memory nor its speed depends on what ran before.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxgpt import __version__
from mlxgpt.backend import device, execution, macos
from mlxgpt.bench.records import (
    GenerationSpeed,
    Machine,
    Measurement,
    SummaryStats,
    TierResult,
    TrainingSpeed,
    parse_tier_result,
)
from mlxgpt.config import Config, ModelConfig, SamplingParams, config_from_tree, fill_vocab_size
from mlxgpt.data.token_array import TokenArray, dtype_for
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.model.gpt import GPT
from mlxgpt.model.stats import count_parameters, count_parameters_by_part, flops_per_token
from mlxgpt.training.step import make_train_step, take_steps
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

PACKAGE_ROOT = Path(__file__).parents[2]  # folder of the package: a checkout or site-packages


@dataclass(frozen=True)
class BenchPlan:
    """How much to measure: `repeats`, in training each of as many steps as take `seconds`."""

    repeats: int = 7
    seconds: float = 1.0
    prompt_tokens: int = 16
    new_tokens: int = 200


DEFAULT_PLAN = BenchPlan()


def benchmark_configs(configs: Mapping[str, Config], plan: BenchPlan = DEFAULT_PLAN) -> Measurement:
    """Measure configs one after another.

    Args:
        configs: by their names in the report.

    Raises:
        UserError: if a measurement fails.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()  # first, since measuring adds to the load
    tiers = []
    with macos.prevent_sleep():
        for name, config in configs.items():
            logger.info(f"{name}: benchmarking training and generation …")
            tiers.append(_measure_in_subprocess(name, resolve_vocab_and_dtype(config), plan))
    return Measurement(date, machine, tuple(tiers))


def resolve_vocab_and_dtype(config: Config) -> Config:
    """`config` with `vocab_size` and `dtype` filled in, as a run on this device would have them."""
    return device.resolve_dtype(fill_vocab_size(config))


CHILD_COMMAND = (sys.executable, "-m", "mlxgpt.bench.speed")


def _measure_in_subprocess(name: str, config: Config, plan: BenchPlan) -> TierResult:
    request = json.dumps({"name": name, "config": asdict(config), "plan": asdict(plan)})
    # Not a fork, which would inherit memory and threads. In PACKAGE_ROOT, Python finds mlxgpt.
    child = subprocess.run(
        [*CHILD_COMMAND, request],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=PACKAGE_ROOT,
        check=False,
    )
    if child.returncode != 0:
        reason = child.stderr.strip() or f"the process exited with code {child.returncode}"
        raise UserError(
            f"benchmarking {name} failed: {reason.splitlines()[-1]}",
            "make sure that `mlxgpt check` passes and that enough memory is free, then try again.",
        )
    return parse_tier_result(json.loads(child.stdout))


def run_child() -> None:
    """Entry point of a child: measure the request in argv[1], and print a TierResult as JSON."""
    request = json.loads(sys.argv[1])
    config, plan = config_from_tree(request["config"]), BenchPlan(**request["plan"])
    device.limit_memory()  # as a training run does
    tier = TierResult(
        name=request["name"],
        parameters=count_parameters(config.model),
        dtype=config.train.dtype,
        training=measure_training(config, plan),
        generation=measure_generation(config.model, plan),
        config=request["config"],
    )
    print(json.dumps(asdict(tier)))


WARMUP_STEPS = 2  # steps until every kernel is compiled


def measure_training(config: Config, plan: BenchPlan) -> TrainingSpeed:
    """Measure training steps on random ids; the speed does not depend on the data."""
    t, vocab_size = config.train, config.model.vocab_size
    tokens_per_step = config.tokens_per_step
    peak = device.matmul_peak(t.dtype)
    device.reset_peak_memory()
    random_integers = np.random.default_rng(0).integers
    ids = random_integers(vocab_size, size=64 * tokens_per_step, dtype=dtype_for(vocab_size))
    train_step, tokens, steps_done = make_train_step(config), TokenArray(ids, vocab_size), 0

    def time_steps(steps: int) -> float:
        nonlocal steps_done
        first_step, steps_done = steps_done, steps_done + steps
        start_time = time.monotonic()
        take_steps(train_step, tokens, config, steps, first_step)
        return time.monotonic() - start_time

    time_steps(WARMUP_STEPS)
    steps = math.ceil(plan.seconds / time_steps(1))
    warmup_steps = steps_done
    step_ms = SummaryStats.from_values(
        [1000 * time_steps(steps) / steps for _ in range(plan.repeats)]
    )
    memory = device.peak_memory_bytes()
    # The larger of two, since a shared machine's speed varies and a chip may start at a low clock.
    device.matmul_peak.cache_clear()
    peak = max(peak, device.matmul_peak(t.dtype))
    rate, flops = 1000 * tokens_per_step / step_ms.median, flops_per_token(config.model)
    return TrainingSpeed(
        tokens_per_step=tokens_per_step,
        plan_tokens=t.max_steps * tokens_per_step,
        flops_per_token=flops,
        warmup_steps=warmup_steps,
        steps_per_repeat=steps,
        ms_per_step=step_ms,
        tokens_per_second=rate,
        matmul_peak=peak,
        peak_share=rate * flops / peak,
        peak_memory=memory,
        peak_memory_of="the whole process" if device.device_type() == "cpu" else "MLX's arrays",
    )


def measure_generation(model_config: ModelConfig, plan: BenchPlan) -> GenerationSpeed:
    """Measure generation at batch size 1 with random weights; the speed does not depend on them."""
    model = GPT(model_config)
    mx.eval(model.parameters())  # else compiled steps would initialize them again per token
    compiled = CompiledModel(model, model_config.vocab_size)
    prompt = np.arange(plan.prompt_tokens) % model_config.vocab_size
    sampling = SamplingParams(max_tokens=plan.new_tokens, seed=0)

    def time_generation() -> tuple[float, float]:
        start = time.perf_counter()
        rows = generate_step(BatchDecoder(compiled, [(prompt, 0)], sampling))
        next(rows)
        first_token_time = time.perf_counter()
        remaining_tokens = sum(1 for _ in rows)
        remaining_seconds = time.perf_counter() - first_token_time
        return 1000 * (first_token_time - start), remaining_tokens / remaining_seconds

    time_generation()  # compiles the kernels
    first_token_ms, rates = zip(*(time_generation() for _ in range(plan.repeats)), strict=True)
    return GenerationSpeed(
        prompt_tokens=plan.prompt_tokens,
        new_tokens=plan.new_tokens,
        bytes_per_token=bytes_per_new_token(model_config),
        ms_to_first_token=SummaryStats.from_values(first_token_ms),
        tokens_per_second=SummaryStats.from_values(rates),
    )


def bytes_per_new_token(model: ModelConfig) -> int:
    """Bytes read to decode one token, in float32: all weights (but only one row of `wpe`) and a
    full KV cache.
    """
    positions = count_parameters_by_part(model).get("wpe (positions)", 0)
    weights = count_parameters(model) - positions * (model.block_size - 1) // model.block_size
    return 4 * (weights + 2 * model.n_layer * model.block_size * model.n_embd)


def describe_machine() -> Machine:
    """Describe this machine and its software versions."""
    return Machine(
        chip=device.device_name(),
        backend=device.device_type(),
        cores=os.cpu_count() or 1,
        performance_cores=_count_performance_cores(),
        memory=device.total_memory_bytes(),
        system=platform.platform(),
        blas=execution.blas_status(),
        versions={
            "mlxgpt": __version__,
            "mlx": version("mlx"),
            "numpy": np.__version__,
            "Python": platform.python_version(),
        },
        commit=read_git_commit(PACKAGE_ROOT),
        load=os.getloadavg()[0],
        bandwidth=device.memory_bandwidth(),
    )


def _count_performance_cores() -> int | None:
    """Number of performance cores of an Apple chip; None on other chips."""
    value = macos.sysctl("hw.perflevel0.physicalcpu") if sys.platform == "darwin" else ""
    return int(value) if value.isdecimal() else None


def read_git_commit(root: Path) -> str | None:
    """Commit of a checkout of mlxgpt, marked if it has uncommitted changes; None if `root` is not
    the top level of a checkout.
    """
    git_path = shutil.which("git")
    if git_path is None or macos.is_xcode_stub(git_path):
        return None
    git = (git_path, "--no-optional-locks", "-C", str(root))  # read-only
    toplevel, _, commit = _run_command(*git, "rev-parse", "--show-toplevel", "HEAD").partition("\n")
    if not commit or Path(toplevel).resolve() != root.resolve():
        return None
    changes = _run_command(*git, "status", "--porcelain", "--", "mlxgpt", "configs")
    return commit[:12] + (" + changes" if changes else "")


def _run_command(*command: str) -> str:
    """Standard output of a command; empty if it fails or is not installed."""
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return completed.stdout.strip()


if __name__ == "__main__":
    run_child()
