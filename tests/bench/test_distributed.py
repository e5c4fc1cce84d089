"""Benchmark of a distributed training step on the loopback."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from mlxgpt.bench import distributed
from mlxgpt.bench.distributed import DistributedBenchPlan, DistributedTiming
from mlxgpt.bench.records import SummaryStats
from mlxgpt.cli import main as cli
from mlxgpt.config import Config, override_config
from mlxgpt.model.stats import count_parameters
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import Capture

QUICK = DistributedBenchPlan(repeats=2, seconds=0.01)


def test_measure_two_ranks(tiny_model: Config) -> None:
    timing = distributed.measure_on_loopback(tiny_model, 2, QUICK)
    assert timing.size == 2
    assert timing.sequences == tiny_model.sequences_per_step
    assert timing.parameters == count_parameters(tiny_model.model)
    for name in distributed.TIMING_FIELDS:
        spread = getattr(timing, name)
        assert 0 < spread.least <= spread.median <= spread.most
    assert timing == distributed.parse_distributed_timing(json.loads(json.dumps(asdict(timing))))
    assert "sequences per step" in distributed.format_distributed_timing(timing)[0]


def test_batch_that_cannot_be_divided_by_the_ranks_is_refused(tiny_model: Config) -> None:
    odd = override_config(tiny_model, {"batch_size": 3})
    with pytest.raises(UserError, match="a different number of ranks"):
        distributed.measure_on_loopback(odd, 2, QUICK)


def test_efficiency() -> None:
    def ms(value: float) -> SummaryStats:
        return SummaryStats.from_values([value])

    timing = DistributedTiming(4, ("a",), 32, 8192, 10, ms(800), ms(200), ms(250), ms(225))
    assert timing.efficiency == pytest.approx(0.8)
    lines = distributed.format_distributed_timing(timing)
    assert "efficiency      0.80" in lines
    assert "step           250.0 ms in total; 225.0 with --reduce-dtype bfloat16" in lines


def test_bench_distributed_command(
    tiny_model: Config, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms = SummaryStats.from_values([100.0])
    timing = DistributedTiming(2, ("a", "b"), 32, 8192, 10, ms, ms, ms, ms)
    monkeypatch.setattr(distributed, "measure_on_loopback", lambda *_: timing)
    assert cli.main(["bench", "--distributed"]) == 0
    assert "efficiency      0.50" in capsys.readouterr().out
    assert cli.main(["bench", "--distributed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == 2
