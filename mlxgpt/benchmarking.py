"""The functions behind `mlxgpt bench`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mlxgpt import config_files, files
from mlxgpt.reports import report
from mlxgpt.reports.records import Measurement
from mlxgpt.requests import PathLike

if TYPE_CHECKING:
    from mlxgpt.reports.distributed import Together

logger = logging.getLogger(__name__)


def benchmark_together() -> Together | None:
    """Measure a training step of Tier 2 on the ranks that mlx.launch started, or on two ranks on
    this machine; None on all ranks but the first.
    """
    from mlxgpt.distributed.launcher import launched
    from mlxgpt.reports import bench, distributed

    config = bench.complete(config_files.tier(2))
    if launched():
        return distributed.here(config, distributed.Plan())
    logger.info("no mlx.launch: two ranks on this machine, each with half of its cores …")
    return distributed.on_loopback(config, 2, distributed.Plan())


def benchmark(
    *, tier: int | None = None, out: PathLike = "benchmarks/reports"
) -> tuple[Measurement, tuple[Path, Path]]:
    """Measure both tiers on this machine, and write a report: its JSON file and its Markdown file.

    Args:
        tier: measure only this one.
        out: the folder of reports.
    """
    from mlxgpt.reports import bench  # only here, since other commands would wait for its imports

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.os_error(error, "write", folder, "choose another folder: --out DIR") from error
    tiers = [tier] if tier else [1, 2]
    configs = {f"tier{n}": bench.complete(config_files.tier(n)) for n in tiers}
    measurement = bench.measure(configs)
    return measurement, report.write(measurement, folder)
