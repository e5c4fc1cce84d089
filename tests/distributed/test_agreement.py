"""Checks that all ranks have the same settings and arrays, with fake ranks; group_contract.py tests
them on real groups.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt.config import Config
from mlxgpt.distributed.agreement import check_same_arrays, check_same_values, hash_arrays
from mlxgpt.distributed.group import LocalGroup
from mlxgpt.training.step import make_train_step
from mlxgpt.utils.errors import UserError


class AnsweringGroup(LocalGroup):
    """A main rank to which the other ranks send fixed values, or its own value where None."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(0, 1 + len(answers), ["a", "b", "c"][: 1 + len(answers)])
        self.answers = answers

    def gather(self, name: str, value: Any) -> list[Any]:
        return [value, *(value if answer is None else answer for answer in self.answers)]


def test_different_values_are_reported_with_their_ranks() -> None:
    check_same_values(AnsweringGroup(None, None), "settings", {"seed": 7})
    other_settings = {"seed": 8, "dtype": "float32"}, {"seed": 7, "dtype": "bfloat16", "bias": True}
    with pytest.raises(UserError, match="the ranks do not match") as excinfo:
        check_same_values(
            AnsweringGroup(*other_settings), "settings", {"seed": 7, "dtype": "float32"}
        )
    assert excinfo.value.problem.endswith(
        ": rank 1 (on b) has seed 8 instead of 7; "
        "rank 2 (on c) has dtype bfloat16 instead of float32, bias True instead of None"
    )


def test_different_arrays_stop_the_run(tiny_model: Config) -> None:
    arrays = make_train_step(tiny_model).state_dicts()
    check_same_arrays(AnsweringGroup(None, None), 5, *arrays)
    with pytest.raises(
        UserError, match=r"after step 5, the weights on rank 2 \(on c\) differ from those on rank 0"
    ):
        check_same_arrays(AnsweringGroup(None, "another hash"), 5, *arrays)


def test_every_array_changes_the_hash(tiny_model: Config) -> None:
    step = make_train_step(tiny_model)
    hashes = {hash_arrays(*step.state_dicts())}
    parameters, optimizer = step.state_dicts()
    # These are copies of one step counter, so changing one of them alone has no effect.
    duplicate_names = {name for name in optimizer if re.fullmatch(r"states\.[1-9]\.step", name)}
    for arrays in (parameters, optimizer):
        for name, value in arrays.items():
            if name in duplicate_names:
                continue
            changed = value.reshape(-1).at[0].add(1).reshape(value.shape)
            step.restore(
                {**parameters, name: changed} if arrays is parameters else parameters,
                {**optimizer, name: changed} if arrays is optimizer else optimizer,
            )
            hashes.add(hash_arrays(*step.state_dicts()))
    assert len(hashes) == 1 + len(parameters) + len(optimizer) - len(duplicate_names)
    step.restore(parameters, optimizer)
    assert hash_arrays(*step.state_dicts()) in hashes
    assert hash_arrays(*make_train_step(tiny_model).state_dicts()) in hashes


def test_the_hash_covers_names_and_the_sign_of_zero() -> None:
    zero = {"a": mx.array([0.0])}
    assert hash_arrays(zero) != hash_arrays({"a": mx.array([-0.0])})
    assert hash_arrays(zero) != hash_arrays({"b": mx.array([0.0])})
