"""What links cost: the model, its fit, and what it predicts."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from mlxgpt import config_files
from mlxgpt.config import Config, override
from mlxgpt.reports import links
from mlxgpt.reports.chips import Chip
from mlxgpt.reports.links import Costs, Link

CHIP = Chip("M9", 4.0, (100,))
COSTS = Costs(share=0.5, byte=1e-9, turn=1e-3, crowded=2e-3)
LINK = Link("wire", 1e9, 2e-3)


@pytest.fixture
def config() -> Config:
    return override(config_files.tier(2), {"dtype": "float32"})


def test_a_sum_by_hand() -> None:
    # Of 4 MB each of 4 machines sends one and a half times as much, in 6 turns: at 0.5 Gb/s 96 ms,
    # copied in 6 ms, and 6 times 3 ms.
    assert links.sum_seconds(4, 4_000_000, LINK, COSTS) == pytest.approx(0.120)
    assert links.sum_seconds(1, 4_000_000, LINK, COSTS) == 0


def test_averaging_is_a_sum_of_gradients_and_one_of_the_loss(config: Config) -> None:
    loss = links.sum_seconds(4, 8, LINK, COSTS)
    found = links.averaging_seconds(4, config, LINK, COSTS)
    assert found - loss == pytest.approx(links.sum_seconds(4, 4 * 12_292_992, LINK, COSTS))
    halved = override(config, {"reduce_dtype": "bfloat16"})
    found = links.averaging_seconds(4, halved, LINK, COSTS)
    assert found - loss == pytest.approx(links.sum_seconds(4, 2 * 12_292_992, LINK, COSTS))


def test_the_fit_finds_what_made_the_numbers() -> None:
    def link(size: int, bits: float) -> Link:
        return Link("", bits, COSTS.crowded if size > 2 else 0.0)

    observed = [
        (size, nbytes, bits, links.sum_seconds(size, nbytes, link(size, bits), COSTS))
        for size in (2, 3, 4)
        for nbytes in (4 * 10**6, 4 * 10**7)
        for bits in (1e8, 1e9, 1e10)
    ]
    assert astuple(links.fit(observed, cores=2)) == pytest.approx(astuple(COSTS))


def test_no_cost_is_below_nothing() -> None:
    observed = [(2, 10**6, 1e9, 0.1), (2, 10**7, 1e9, 0.9), (4, 10**6, 1e9, 0.11)]
    found = links.fit(observed, cores=4)
    assert min(found.byte, found.turn) >= 0
    assert found.crowded == 0, "never seen"
    assert found.share > 0


def test_more_machines_never_bring_more_than_themselves(config: Config) -> None:
    for link in links.LINKS:
        for grown in (False, True):
            for size in links.MACHINES:
                one = links.brought(CHIP, config, link, size, grown=grown)
                if one is None:
                    assert size > config.sequences_per_step
                    assert not grown
                else:
                    assert 0 < one < size


def test_without_a_cost_each_brings_itself(config: Config) -> None:
    free, nothing = Link("free", 1e30, 0.0), Costs(1.0, 0.0, 0.0)
    for size in links.MACHINES:
        one = links.brought(CHIP, config, free, size, grown=True, costs=nothing)
        assert one == pytest.approx(size)
    assert links.worth(CHIP, config, free, grown=True, costs=nothing) == 64


def test_worth_is_where_the_next_brings_less_than_half(config: Config) -> None:
    link = Link("some", 2e10, 0.0)

    def times(size: int) -> float:
        own = links.share_seconds(CHIP, config, 32 / size)
        together = own + links.averaging_seconds(size, config, link, COSTS)
        return links.share_seconds(CHIP, config, 32) / together

    last = links.worth(CHIP, config, link, grown=False, costs=COSTS)
    assert times(last + 1) - (times(last) if last > 1 else 1) < 0.5
    assert all(times(n + 1) - (times(n) if n > 1 else 1) >= 0.5 for n in range(1, last))


def test_the_table_has_every_config_and_link(config: Config) -> None:
    text = "\n".join(links.markdown(CHIP, {"a": config, "b": config}))
    assert "*predicted*" in text
    for name in ("a", "b"):
        for link in links.LINKS:
            assert text.count(link.name) == 2 * 3
        assert name in text
