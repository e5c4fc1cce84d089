"""Compare the measurements of several machines in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mlxgpt.bench.markdown import format_number, format_stats, render_markdown_table
from mlxgpt.bench.records import Measurement, TierResult
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

REMEDY = "use JSON files that `mlxgpt bench` wrote, by default to benchmarks/reports."


def read_measurements(paths: Sequence[str | Path]) -> list[Measurement]:
    """Read measurements from JSON files.

    Raises:
        UserError: if a file cannot be read or is not a measurement.
    """
    measurements = []
    for path in map(Path, paths):
        try:
            with files.add_filename_to_errors(path):
                text = path.read_text(encoding="utf-8")
            measurements.append(Measurement.from_json(text))
        except OSError as error:
            raise files.to_user_error(error, "read", path, REMEDY) from error
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {path}: {error}", REMEDY) from error
        except UserError as error:
            raise UserError(f"{path}: {error.problem}", error.remedy) from error
    return measurements


def render_machine_comparison(measurements: Sequence[Measurement]) -> str:
    """Render a Markdown table per config, with one column per measurement."""
    header = ["", *(f"{n}: {m.machine.chip}" for n, m in enumerate(measurements, start=1))]
    lines = [
        "# Machine comparison",
        "",
        *render_markdown_table([header, *_machine_rows(measurements)]),
    ]
    for name in dict.fromkeys(tier.name for m in measurements for tier in m.tiers):
        columns = [next((t for t in m.tiers if t.name == name), None) for m in measurements]
        lines += ["", f"## {name}", "", *render_markdown_table([header, *_tier_rows(columns)], ">")]
    return "\n".join(lines).rstrip() + "\n"


def _machine_rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    rows: dict[str, list[str]] = {}
    for measurement in measurements:
        machine = measurement.machine
        peak = max(tier.training.matmul_peak for tier in measurement.tiers)
        bandwidth = f"{format_number(machine.bandwidth / 1e9)} GB/s" if machine.bandwidth else "–"
        for name, text in (
            ("day", measurement.date[:10]),
            ("MLX device", machine.backend),
            ("cores", str(machine.cores)),
            ("memory", f"{machine.memory / 1e9:.1f} GB"),
            ("measured memory bandwidth", bandwidth),
            ("measured matmul peak", f"{format_number(peak / 1e9)} GFLOP/s"),
            ("system", machine.system),
            ("BLAS", machine.blas),
            ("mlx", machine.versions.get("mlx", "–")),
            ("commit", machine.commit or "–"),
        ):
            rows.setdefault(name, []).append(text)
    return [[name, *texts] for name, texts in rows.items()]


TIER_ROWS: dict[str, Callable[[TierResult], str]] = {
    "dtype": lambda t: t.dtype,
    "training, tokens/s": lambda t: format_number(t.training.tokens_per_second),
    "training, ms per step": lambda t: format_stats(t.training.ms_per_step),
    "training, % of the measured matmul peak": lambda t: f"{100 * t.training.peak_share:.1f}%",
    "training, peak memory": lambda t: f"{format_number(t.training.peak_memory / 1e6)} MB",
    "generation, tokens/s": lambda t: format_stats(t.generation.tokens_per_second),
    "generation, time to first token, ms": lambda t: format_stats(t.generation.ms_to_first_token),
}


def _tier_rows(columns: Sequence[TierResult | None]) -> list[list[str]]:
    return [
        [name, *("–" if tier is None else format_cell(tier) for tier in columns)]
        for name, format_cell in TIER_ROWS.items()
    ]
