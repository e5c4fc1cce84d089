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
    from mlxgpt.bench.distributed import Together

logger = logging.getLogger(__name__)


def benchmark_together() -> Together | None:
    """Measure a training step of Tier 2 on the ranks that mlx.launch started, or on two ranks on
    this machine; None on all ranks but the first.
    """
    from mlxgpt.bench import distributed, speed
    from mlxgpt.distributed.launcher import launched

    config = speed.complete(toml.tier(2))
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
    from mlxgpt.bench import speed  # only here, since other commands would wait for its imports

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.os_error(error, "write", folder, "choose another folder: --out DIR") from error
    tiers = [tier] if tier else [1, 2]
    configs = {f"tier{n}": speed.complete(toml.tier(n)) for n in tiers}
    measurement = speed.measure(configs)
    return measurement, report.write(measurement, folder)
