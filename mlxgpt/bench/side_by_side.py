"""Several machines' measurements side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mlxgpt.bench.markdown import figure, spread_of, table
from mlxgpt.bench.records import Measurement, Tier
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

REMEDY = "give JSON files that `mlxgpt bench` wrote, in benchmarks/reports."


def read(paths: Sequence[str | Path]) -> list[Measurement]:
    """Measurements from their JSON files.

    Raises:
        UserError: if one cannot be read.
    """
    read = []
    for path in map(Path, paths):
        try:
            with files.naming(path):
                text = path.read_text(encoding="utf-8")
            read.append(Measurement.from_json(text))
        except OSError as error:
            raise files.os_error(error, "read", path, REMEDY) from error
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {path}: {error}", REMEDY) from error
        except UserError as error:
            raise UserError(f"{path}: {error.problem}", error.remedy) from error
    return read


def markdown(measurements: Sequence[Measurement]) -> str:
    """One column for each measurement, and a table for each of their configs."""
    heads = ["", *(f"{n}: {one.machine.chip}" for n, one in enumerate(measurements, start=1))]
    lines = ["# Machines side by side", "", *table([heads, *_machines(measurements)])]
    for name in dict.fromkeys(tier.name for one in measurements for tier in one.tiers):
        columns = [next((t for t in one.tiers if t.name == name), None) for one in measurements]
        lines += ["", f"## {name}", "", *table([heads, *_speeds(columns)], ">")]
    return "\n".join(lines).rstrip() + "\n"


def _machines(measurements: Sequence[Measurement]) -> list[list[str]]:
    rows: dict[str, list[str]] = {}
    for one in measurements:
        m = one.machine
        peak = max(tier.training.matmul_peak for tier in one.tiers)
        band = f"{figure(m.bandwidth / 1e9)} GB/s" if m.bandwidth else "–"
        for name, text in (
            ("day", one.date[:10]),
            ("MLX computes on", m.backend),
            ("cores", str(m.cores)),
            ("memory", f"{m.memory / 1e9:.1f} GB"),
            ("bandwidth, measured", band),
            ("peak of a matrix product, measured", f"{figure(peak / 1e9)} GFLOP/s"),
            ("system", m.system),
            ("BLAS", m.blas),
            ("mlx", m.versions.get("mlx", "–")),
            ("commit", m.commit or "–"),
        ):
            rows.setdefault(name, []).append(text)
    return [[name, *texts] for name, texts in rows.items()]


SPEEDS: dict[str, Callable[[Tier], str]] = {
    "numbers": lambda t: t.dtype,
    "training, tokens/s": lambda t: figure(t.training.tokens_per_second),
    "training, ms a step": lambda t: spread_of(t.training.ms_per_step),
    "training's share of the peak": lambda t: f"{100 * t.training.peak_share:.1f} %",
    "peak memory in training": lambda t: f"{figure(t.training.peak_memory / 1e6)} MB",
    "generation, tokens/s": lambda t: spread_of(t.generation.tokens_per_second),
    "generation, first token after, ms": lambda t: spread_of(t.generation.ms_to_first_token),
}


def _speeds(columns: Sequence[Tier | None]) -> list[list[str]]:
    return [
        [name, *("–" if tier is None else told(tier) for tier in columns)]
        for name, told in SPEEDS.items()
    ]
