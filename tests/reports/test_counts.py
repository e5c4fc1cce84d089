from __future__ import annotations

import mlx.core as mx
import pytest

from mlxgpt import config_files
from mlxgpt.config import Config, ModelConfig, override
from mlxgpt.model.counting import flops_per_token
from mlxgpt.reports import bench
from mlxgpt.reports.counts import workloads
from mlxgpt.reports.records import Workload

TINY = override(
    Config(ModelConfig(2, 2, 32, 16, 37, 0.0, False)), {"dtype": "float32", "batch_size": 4}
)


def launches(workload: Workload, kind: str) -> int:
    return sum(one.launches for one in workload.kernels if one.name == kind)


@pytest.mark.parametrize("tier", [1, 2])
def test_the_products_of_a_step_are_those_of_the_formula(tier: int) -> None:
    """`flops_per_token` counts what the literature does: all products, forward and backward."""
    config = bench.complete(config_files.tier(tier))
    step, evaluation, _, token = workloads(config)
    (products,) = [one for one in step.kernels if one.name == "Matmul"]
    told = config.tokens_per_step * flops_per_token(config.model)
    assert products.flops == pytest.approx(told, rel=0.01)
    assert step.tokens == config.tokens_per_step
    inside = [one.flops for one in evaluation.kernels if one.name in ("Matmul", "Attention")]
    assert sum(inside) == pytest.approx(told / 3, rel=0.01)
    least = bench.bytes_per_new_token(config.model)
    assert least < token.bytes < 1.4 * least, "besides, the cache is copied: slice_update"


def test_the_four_and_what_the_host_does() -> None:
    step, evaluation, prefill, token = workloads(TINY)
    names = ["training step", "evaluation batch", "prefill", "decoded token"]
    assert [one.name for one in (step, evaluation, prefill, token)] == names
    assert [one.tokens for one in (step, evaluation, prefill, token)] == [64, 64, 8, 1]
    told = [(one.handed_over, one.read) for one in (step, evaluation, prefill, token)]
    assert told == [(1, 2), (1, 1), (1, 1), (1, 1)], "a step's loss and norm, a batch's sum, an id"
    assert launches(prefill, "Attention") == launches(token, "Attention") == 2
    assert launches(step, "LayerNorm") == launches(step, "LayerNorm, backward") == 5


def test_micro_batches_are_counted_one_by_one() -> None:
    once, twice = (workloads(override(TINY, {"gradient_accumulation_steps": n}))[0] for n in (1, 2))
    assert launches(twice, "Matmul") == 2 * launches(once, "Matmul")
    assert twice.launches < 2 * launches(once, "elementwise") + 2 * once.launches, "one update"
    assert twice.tokens == 2 * once.tokens


def test_more_work_is_more_kernels() -> None:
    """What the committed counts are there to show."""
    deeper = override(TINY, {"n_layer": 3})
    for one, more in zip(workloads(TINY), workloads(deeper), strict=True):
        assert more.launches > one.launches
        assert more.bytes > one.bytes
        assert more.operations > one.operations


def test_nothing_is_left_behind() -> None:
    before = mx.eval, mx.async_eval, mx.array.item
    workloads(TINY)
    assert (mx.eval, mx.async_eval, mx.array.item) == before
