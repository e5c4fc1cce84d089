"""Check that all ranks have the same settings, data and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlxgpt.distributed.group import ProcessGroup
from mlxgpt.utils.errors import UserError


def check_same_values(group: ProcessGroup, name: str, values: Mapping[str, Any]) -> None:
    """Collective. Check that all ranks have the same values as the main rank.

    Args:
        name: name of the collective.
        values: settings, versions and fingerprints, by name; JSON-serializable.

    Raises:
        UserError: on all ranks, with the ranks and values that differ.
    """
    expected, *other_values = group.gather(name, dict(values))
    differing = []
    for rank, actual in enumerate(other_values, 1):
        differences = [
            f"{key} {actual.get(key)} instead of {expected.get(key)}"
            for key in {**expected, **actual}
            if actual.get(key) != expected.get(key)
        ]
        if differences:
            differing.append(f"{group.describe_rank(rank)} has {', '.join(differences)}")
    if differing:
        raise UserError(
            f"the ranks do not match: {'; '.join(differing)}",
            "use the same versions, settings and dataset on all machines; `mlxgpt prepare "
            "--verify` checks a dataset for damage.",
        )


def check_same_arrays(group: ProcessGroup, step: int, *arrays: Mapping[str, mx.array]) -> None:
    """Collective. Check that all ranks have the same weights and optimizer state as the main rank.

    Args:
        step: the step after which they are compared.
        arrays: everything that a step changes, by name.

    Raises:
        UserError: on all ranks, with the ranks that differ.
    """
    if group.size == 1:
        return
    expected, *other_hashes = group.gather(f"hash of step {step}", hash_arrays(*arrays))
    if differing := [
        group.describe_rank(rank)
        for rank, actual in enumerate(other_hashes, 1)
        if actual != expected
    ]:
        raise UserError(
            f"after step {step:,}, the weights on {', '.join(differing)} differ from those on "
            f"{group.describe_rank(0)}",
            "the same command resumes from the last checkpoint, which matched on all ranks; if "
            "this happens again, train without that machine.",
        )


def hash_arrays(*arrays: Mapping[str, mx.array]) -> str:
    """SHA-256 of arrays and their names."""
    digest = hashlib.sha256()
    for tree in arrays:
        mx.eval(tree)
        for name, array in sorted(tree.items()):
            digest.update(name.encode())
            digest.update(
                np.array(mx.contiguous(array), copy=False).reshape(-1).view(np.uint8).data
            )
    return digest.hexdigest()
