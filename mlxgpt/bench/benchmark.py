"""The functions behind `mlxgpt bench`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mlxgpt.bench import report
from mlxgpt.bench.records import Measurement
from mlxgpt.config import toml
from mlxgpt.config.resolve import PathLike
from mlxgpt.utils import files

if TYPE_CHECKING:
    from mlxgpt.bench.distributed import DistributedTiming

logger = logging.getLogger(__name__)


def benchmark_distributed() -> DistributedTiming | None:
    """Measure a training step of Tier 2 on the ranks that mlx.launch started, or else on two local
    ranks; None on the non-main ranks.
    """
    from mlxgpt.bench import distributed, speed
    from mlxgpt.distributed.launcher import is_launched

    config = speed.resolve_vocab_and_dtype(toml.load_tier_config(2))
    if is_launched():
        return distributed.measure_on_launched_ranks(config, distributed.DistributedBenchPlan())
    logger.info("not started by mlx.launch: running two ranks here, each with half of the cores …")
    return distributed.measure_on_loopback(config, 2, distributed.DistributedBenchPlan())


def benchmark(
    *, tier: int | None = None, output: PathLike = "benchmarks/reports"
) -> tuple[Measurement, tuple[Path, Path]]:
    """Benchmark both tiers on this machine, and write a report as a JSON and a Markdown file.

    Args:
        tier: measure only this tier.
        output: folder for the report.
    """
    from mlxgpt.bench import speed  # slow to import

    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.to_user_error(
            error, "write", folder, "choose another folder: --output DIR"
        ) from error
    tiers = [tier] if tier else [1, 2]
    configs = {f"tier{n}": speed.resolve_vocab_and_dtype(toml.load_tier_config(n)) for n in tiers}
    measurement = speed.benchmark_configs(configs)
    return measurement, report.write_benchmark_report(measurement, folder)
