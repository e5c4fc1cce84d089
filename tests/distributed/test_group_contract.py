"""Local and MLX groups fulfill the same contract: see tests/helpers/group_contract.py."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Callable
from inspect import getsource
from pathlib import Path

import pytest

from mlxgpt.distributed.group import LocalGroup, ProcessGroup
from tests.helpers import group_contract
from tests.helpers.rank_processes import RankProcesses

SIZE = 2
PROMISES = pytest.mark.parametrize(
    "promise", group_contract.CONTRACT, ids=lambda check: check.__name__
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The result of each check of the contract on each of several processes."""
    with contextlib.chdir(tmp_path_factory.mktemp("ranks")):
        with RankProcesses(command=["-m", "tests.helpers.group_contract"], size=SIZE) as ranks:
            results = ranks.wait()
        assert results.codes == [0] * SIZE, results.errors
        return [json.loads(Path(f"rank-{rank}.json").read_text()) for rank in range(SIZE)]


@PROMISES
def test_one_process_fulfills_the_contract(
    promise: Callable[[ProcessGroup], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    promise(LocalGroup())


@PROMISES
def test_several_processes_fulfill_the_contract(
    promise: Callable[[ProcessGroup], None], outcomes: list[dict[str, str]]
) -> None:
    for rank in range(SIZE):
        assert outcomes[rank][promise.__name__] == "kept", outcomes[rank][promise.__name__]


def test_every_method_is_in_the_contract() -> None:
    """Except `close` and `abort`, which end a group: see test_group.py."""
    tree = ast.parse(getsource(group_contract))
    called_methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    public_methods = {name for name in vars(ProcessGroup) if not name.startswith("_")}
    assert public_methods - called_methods == {"close", "abort"}
