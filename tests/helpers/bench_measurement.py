"""A measurement with round numbers, and a reader of table rows in a report."""

from __future__ import annotations

from mlxgpt.bench.records import (
    GenerationSpeed,
    Machine,
    Measurement,
    SummaryStats,
    TierResult,
    TrainingSpeed,
)


def make_tier_result(name: str, parameters: int, flops: int, bytes_per_token: int) -> TierResult:
    training = TrainingSpeed(
        tokens_per_step=2048,
        plan_tokens=36_000_000,
        flops_per_token=flops,
        warmup_steps=3,
        steps_per_repeat=11,
        ms_per_step=SummaryStats.from_values([205.4, 198.2, 231.9, 204.0, 207.7]),
        tokens_per_second=9970.8,
        matmul_peak=187.4e9,
        peak_share=0.3644,
        peak_memory=345_678_901,
        peak_memory_of="the whole process",
    )
    generation = GenerationSpeed(
        prompt_tokens=17,
        new_tokens=199,
        bytes_per_token=bytes_per_token,
        ms_to_first_token=SummaryStats.from_values([8.124, 7.911, 9.339, 8.0, 8.5]),
        tokens_per_second=SummaryStats.from_values([812.2, 799.0, 820.9, 811.0, 814.0]),
    )
    return TierResult(name, parameters, "float32", training, generation, {"model": {"n_layer": 4}})


def make_measurement() -> Measurement:
    """Return a measurement of two tiers, as read from a file of format 1."""
    machine = Machine(
        chip="Intel(R) Xeon(R) Processor",
        backend="cpu",
        cores=2,
        performance_cores=None,
        memory=25_276_000_000,
        system="Linux-6.1-x86_64",
        blas="OpenBLAS 0.3.34",
        versions={"mlxgpt": "0.1.0", "mlx": "0.32.4", "numpy": "2.4.1", "Python": "3.11.9"},
        commit="0123456789ab + changes",
        load=0.376,
    )
    tiers = (
        make_tier_result("small", 1_024_416, 2_500_000, 4_000_000),
        make_tier_result("large", 12_300_000, 65_000_000, 50_000_000),
    )
    return Measurement("2026-11-22T23:59:58+00:00", machine, tiers)


def table_cells(text: str, row: str, table: int = 0) -> list[str]:
    """Return the cells of the n-th table row that starts with `row`, without that first cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return [values for first, *values in rows if first == row][table]
