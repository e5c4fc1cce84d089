from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mlxgpt.errors import UserError
from mlxgpt.reports import report
from mlxgpt.reports.report import (
    CHIPS,
    Chip,
    Generation,
    Machine,
    Measurement,
    Spread,
    Tier,
    Training,
)


def tier(name: str, parameters: int, flops: int, bytes_per_token: int) -> Tier:
    training = Training(
        tokens_per_step=2048,
        plan_tokens=36_000_000,
        flops_per_token=flops,
        warmup_steps=3,
        steps_per_repeat=11,
        ms_per_step=Spread.of([205.4, 198.2, 231.9, 204.0, 207.7]),
        tokens_per_second=9970.8,
        matmul_peak=187.4e9,
        peak_share=0.3644,
        peak_memory=345_678_901,
        peak_memory_of="the whole process",
    )
    generation = Generation(
        prompt_tokens=17,
        new_tokens=199,
        bytes_per_token=bytes_per_token,
        ms_to_first_token=Spread.of([8.124, 7.911, 9.339, 8.0, 8.5]),
        tokens_per_second=Spread.of([812.2, 799.0, 820.9, 811.0, 814.0]),
    )
    return Tier(name, parameters, "float32", training, generation, {"model": {"n_layer": 4}})


@pytest.fixture
def measurement() -> Measurement:
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
        tier("small", 1_024_416, 2_500_000, 4_000_000),
        tier("large", 12_300_000, 65_000_000, 50_000_000),
    )
    return Measurement("2026-11-22T23:59:58+00:00", machine, tiers)


def cells(text: str, row: str, table: int = 0) -> list[str]:
    """The cells of the n-th table row that begins with `row`, without it."""
    rows = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if x[:1] == "|"]
    return [others for first, *others in rows if first == row][table]


def test_a_spread_is_the_median_the_least_and_the_most() -> None:
    assert Spread.of([9.0, 1.0, 2.0, 100.0, 3.0]) == Spread(3.0, 1.0, 100.0, (9, 1, 2, 100, 3))


def test_json_gives_the_measurement_back(measurement: Measurement) -> None:
    again = Measurement.from_json(measurement.to_json())
    assert again == measurement
    assert report.markdown(again) == report.markdown(measurement)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"chip"', '"chop"'),
        lambda text: text.replace('"ms_per_step"', '"ms"'),
    ],
)
def test_other_json_is_refused(damage: Callable[[str], str], measurement: Measurement) -> None:
    with pytest.raises(UserError, match="no measurement"):
        Measurement.from_json(damage(measurement.to_json()))


def test_the_report_has_each_figure_of_both_tiers(measurement: Measurement) -> None:
    slow = replace(measurement.tiers[0].training, tokens_per_second=123.4, peak_share=0.041)
    tiers = (replace(measurement.tiers[0], training=slow), measurement.tiers[1])
    text = report.markdown(replace(measurement, tiers=tiers))
    assert cells(text, "") == ["small", "large"]
    for row, small, large in (
        ("parameters", "1,024,416", "12,300,000"),
        ("numbers", "float32", "float32"),
        ("tokens in a step", "2,048", "2,048"),
        ("operations for a token in training", "2.50 MFLOP", "65.0 MFLOP"),
        ("training, tokens/s", "123", "9,970"),
        ("training, ms a step", "205 (198 to 232)", "205 (198 to 232)"),
        ("peak of a matrix product", "187 GFLOP/s", "187 GFLOP/s"),
        ("training's share of that peak", "4.1 %", "36.4 %"),
        ("peak memory in training", "346 MB", "346 MB"),
        ("generation, first token after, ms", "8.12 (7.91 to 9.34)", "8.12 (7.91 to 9.34)"),
        ("generation, tokens/s", "812 (799 to 821)", "812 (799 to 821)"),
    ):
        assert cells(text, row) == [small, large], row
    assert "small, training: 5 repeats of 11 steps, after 3 to warm up" in text
    assert "memory of the whole process" in text
    assert "large, generation: 5 texts of 199 tokens, after a prompt of 17," in text


def test_the_report_says_what_was_measured_on(measurement: Measurement) -> None:
    text = report.markdown(measurement)
    assert text.startswith("# small and large on Intel(R) Xeon(R) Processor\n")
    for row, value in (
        ("chip", "Intel(R) Xeon(R) Processor"),
        ("cores", "2"),
        ("memory", "25.3 GB"),
        ("system", "Linux-6.1-x86_64"),
        ("MLX computes on", "cpu"),
        ("BLAS", "OpenBLAS 0.3.34"),
        ("mlxgpt", "0.1.0"),
        ("mlx", "0.32.4"),
        ("numpy", "2.4.1"),
        ("Python", "3.11.9"),
        ("commit", "0123456789ab + changes"),
        ("load before", "0.38"),
        ("time", "2026-11-22T23:59:58+00:00"),
    ):
        assert cells(text, row) == [value], row
    assert "\n    mlxgpt bench\n" in text
    machine = replace(measurement.machine, performance_cores=4, cores=8, commit=None)
    text = report.markdown(replace(measurement, machine=machine))
    assert cells(text, "cores") == ["8, 4 of them fast"]
    assert cells(text, "commit") == ["not a checkout"]


def test_predictions_by_hand(measurement: Measurement) -> None:
    small, large = measurement.tiers
    m1, m3_max = CHIPS[0], next(chip for chip in CHIPS if chip.name == "M3 Max")
    assert m1 == Chip("M1", 2.6, (68,))
    # A quarter of 2.6e12 operations a second, of 2.5e6 each; 68e9 bytes a second, of 4e6 each.
    assert report.predicted_training(m1, small) == pytest.approx(260_000)
    assert report.predicted_generation(m1, small) == pytest.approx((17_000,))
    assert report.predicted_training(m1, large) == pytest.approx(10_000)
    text = report.markdown(measurement)
    # 36e6 tokens at 260,000 a second take 138 seconds; at 10,000 a second, an hour.
    assert cells(text, "M1", 0) == ["2.6", "68", "260,000", "2.3 min", "17,000"]
    assert cells(text, "M1", 1) == ["2.6", "68", "10,000", "1.0 h", "1,400"]
    assert cells(text, "M1 Ultra", 0)[3] == "17 s"
    assert m3_max.gb_per_second == (300, 400)
    assert cells(text, "M3 Max", 1)[1::3] == ["300 to 400", "6,000 to 8,000"]
    assert cells(text, "M5 Max", 1)[1::3] == ["–", "–"], "its bandwidth is in no source of ours"


def test_the_chips_are_those_of_the_spec_sheets() -> None:
    names = [chip.name for chip in CHIPS]
    assert len(names) == len(set(names)) == 18
    assert "M4 Ultra" not in names
    assert Chip("M3 Ultra", 28.4, (819,)) in CHIPS
    assert Chip("M4 Max", 18.4, (410, 546)) in CHIPS
    assert Chip("M5", 5.7, ()) in CHIPS


def test_what_is_predicted_says_so_and_what_is_measured_does_not(measurement: Measurement) -> None:
    measured, predicted = report.markdown(measurement).split("## Apple chips: *predicted*")
    assert "predicted" not in measured
    assert all(chip.name + " " not in measured for chip in CHIPS)
    heads = [x for x in predicted.splitlines() if x.startswith("| chip")]
    assert len(heads) == 2
    for head in heads:
        for title in head.strip("|").split("|")[3:]:
            assert "*predicted*" in title
    assert "### small, *predicted*" in predicted
    assert "### large, *predicted*" in predicted
    smaller = "Smaller than any model in those measurements"
    assert smaller in predicted.split("### large")[0], "1M parameters: nobody measured so few"
    assert smaller not in predicted.split("### large")[1]


def test_the_tables_can_be_read_as_plain_text(measurement: Measurement) -> None:
    tables = [
        block for block in report.markdown(measurement).split("\n\n") if block.startswith("|")
    ]
    assert len(tables) == 4
    for table in tables:
        lines = table.rstrip("\n").splitlines()
        assert len({len(line) for line in lines}) == 1
        assert set(lines[1]) <= set("| -:")
    assert max(map(len, report.markdown(measurement).splitlines())) < 150


def test_figures_have_three_digits() -> None:
    for number, text in (
        (123_456.0, "123,000"),
        (9_995.0, "10,000"),
        (999.6, "1,000"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.0, "1.00"),
        (0.01234, "0.0123"),
        (0.0, "0"),
    ):
        assert report.figure(number) == text
    assert report.figure(1_360, 2) == "1,400"


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
def test_a_report_is_named_after_day_and_chip(
    chip: str, backend: str, name: str, measurement: Measurement
) -> None:
    machine = replace(measurement.machine, chip=chip, backend=backend)
    assert report.slug(replace(measurement, machine=machine)) == f"2026-11-22-{name}"


def test_both_files_are_written_and_none_is_written_over(
    measurement: Measurement, tmp_path: Path
) -> None:
    folder, name = tmp_path / "benchmarks" / "reports", "2026-11-22-xeon-2-cores"
    paths = report.write(measurement, folder)
    assert paths == (folder / f"{name}.json", folder / f"{name}.md")
    assert Measurement.from_json(paths[0].read_text(encoding="utf-8")) == measurement
    assert json.loads(paths[0].read_text(encoding="utf-8"))["tiers"][1]["name"] == "large"
    assert paths[1].read_text(encoding="utf-8") == report.markdown(measurement)
    first = paths[0].read_bytes()
    (folder / f"{name}-2.md").write_text("mine")  # one of the two is enough to leave both alone
    later = replace(measurement, date="2026-11-22T23:59:59+00:00")
    assert report.write(later, folder) == (folder / f"{name}-3.json", folder / f"{name}-3.md")
    assert report.write(later, folder) == (folder / f"{name}-4.json", folder / f"{name}-4.md")
    assert paths[0].read_bytes() == first
    assert (folder / f"{name}-2.md").read_text() == "mine"
    assert len(list(folder.iterdir())) == 7, "and nothing else lies there"
