from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlxgpt.bench import report
from mlxgpt.bench.records import Measurement
from tests.helpers import bench_measurement
from tests.helpers.bench_measurement import table_cells


@pytest.fixture
def measurement() -> Measurement:
    return bench_measurement.make_measurement()


def test_report_contains_all_results_of_both_tiers(measurement: Measurement) -> None:
    slow = replace(measurement.tiers[0].training, tokens_per_second=123.4, peak_share=0.041)
    tiers = (replace(measurement.tiers[0], training=slow), measurement.tiers[1])
    text = report.render_benchmark_report(replace(measurement, tiers=tiers))
    assert table_cells(text, "") == ["small", "large"]
    for row, small, large in (
        ("parameters", "1,024,416", "12,300,000"),
        ("dtype", "float32", "float32"),
        ("tokens per step", "2,048", "2,048"),
        ("training FLOPs per token", "2.50 MFLOP", "65.0 MFLOP"),
        ("training, tokens/s", "123", "9,970"),
        ("training, ms per step", "205 (198 to 232)", "205 (198 to 232)"),
        ("measured matmul peak", "187 GFLOP/s", "187 GFLOP/s"),
        ("training, % of the measured matmul peak", "4.1%", "36.4%"),
        ("training, peak memory", "346 MB", "346 MB"),
        ("generation, time to first token, ms", "8.12 (7.91 to 9.34)", "8.12 (7.91 to 9.34)"),
        ("generation, tokens/s", "812 (799 to 821)", "812 (799 to 821)"),
    ):
        assert table_cells(text, row) == [small, large], row
    assert "small, training: 5 repeats of 11 steps after 3 warmup steps" in text
    assert "memory of the whole process" in text
    assert "large, generation: 5 samples of 199 tokens after a prompt of 17," in text


def test_report_describes_the_machine(measurement: Measurement) -> None:
    text = report.render_benchmark_report(measurement)
    assert text.startswith("# small and large on Intel(R) Xeon(R) Processor\n")
    for row, value in (
        ("chip", "Intel(R) Xeon(R) Processor"),
        ("cores", "2"),
        ("memory", "25.3 GB"),
        ("system", "Linux-6.1-x86_64"),
        ("MLX device", "cpu"),
        ("BLAS", "OpenBLAS 0.3.34"),
        ("mlxgpt", "0.1.0"),
        ("mlx", "0.32.4"),
        ("numpy", "2.4.1"),
        ("Python", "3.11.9"),
        ("commit", "0123456789ab + changes"),
        ("load average before", "0.38"),
        ("time", "2026-11-22T23:59:58+00:00"),
    ):
        assert table_cells(text, row) == [value], row
    assert "\n    mlxgpt bench\n" in text
    machine = replace(measurement.machine, performance_cores=4, cores=8, commit=None)
    text = report.render_benchmark_report(replace(measurement, machine=machine))
    assert table_cells(text, "cores") == ["8 (4 performance cores)"]
    assert table_cells(text, "commit") == ["not a git checkout"]


def test_tables_are_aligned_as_plain_text(measurement: Measurement) -> None:
    tables = [
        block
        for block in report.render_benchmark_report(measurement).split("\n\n")
        if block.startswith("|")
    ]
    assert len(tables) == 4
    for table in tables:
        lines = table.rstrip("\n").splitlines()
        assert len({len(line) for line in lines}) == 1
        assert set(lines[1]) <= set("| -:")
    assert max(map(len, report.render_benchmark_report(measurement).splitlines())) < 150


@pytest.mark.parametrize(
    ("chip", "backend", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "cpu", "xeon-2-cores"),
        ("Intel(R) Xeon(R) CPU E5-2673 v4 @ 2.30GHz", "cpu", "xeon-e5-2673-v4-2-cores"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "cpu", "core-i7-9750h-2-cores"),
        ("AMD EPYC 7763 64-Core Processor", "cpu", "epyc-7763-2-cores"),
        ("Apple M1 Max", "metal", "m1-max"),
        ("NVIDIA H100 80GB HBM3", "cuda", "h100-80gb-hbm3"),
        ("../../x", "metal", "x"),
        ("Processor", "metal", "chip"),
    ],
)
def test_report_is_named_after_date_and_chip(
    chip: str, backend: str, name: str, measurement: Measurement
) -> None:
    machine = replace(measurement.machine, chip=chip, backend=backend)
    assert report.report_slug(replace(measurement, machine=machine)) == f"2026-11-22-{name}"


def test_both_files_are_written_and_none_is_overwritten(
    measurement: Measurement, tmp_path: Path
) -> None:
    folder, name = tmp_path / "benchmarks" / "reports", "2026-11-22-xeon-2-cores"
    paths = report.write_benchmark_report(measurement, folder)
    assert paths == (folder / f"{name}.json", folder / f"{name}.md")
    assert Measurement.from_json(paths[0].read_text(encoding="utf-8")) == measurement
    assert json.loads(paths[0].read_text(encoding="utf-8"))["tiers"][1]["name"] == "large"
    assert paths[1].read_text(encoding="utf-8") == report.render_benchmark_report(measurement)
    first = paths[0].read_bytes()
    (folder / f"{name}-2.md").write_text("mine")  # one existing file is enough to skip both names
    later = replace(measurement, date="2026-11-22T23:59:59+00:00")
    assert report.write_benchmark_report(later, folder) == (
        folder / f"{name}-3.json",
        folder / f"{name}-3.md",
    )
    assert report.write_benchmark_report(later, folder) == (
        folder / f"{name}-4.json",
        folder / f"{name}-4.md",
    )
    assert paths[0].read_bytes() == first
    assert (folder / f"{name}-2.md").read_text() == "mine"
    assert len(list(folder.iterdir())) == 7, "and nothing else lies there"
