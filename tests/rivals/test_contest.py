"""Contests: in turn, in fresh processes, and what comes of those that fail. What the rivals do is
tried by tests/oracle/test_oracle_rivals.py, where they are installed.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.backend.cpu import blas
from mlxgpt.config import Config, ModelConfig, override
from mlxgpt.errors import UserError
from mlxgpt.rivals import contest
from mlxgpt.rivals.contest import NANOGPT, OURS, Contender, Length
from mlxgpt.rivals.record import Contest

TINY = override(
    Config(ModelConfig(1, 2, 32, 16, 37, 0.0, False)), {"dtype": "float32", "batch_size": 2}
)
QUICK = Length(rounds=1, seconds=0.01, sequences=2, texts=(1, 3), steps=6, megabytes=0.05)
OTHER = Contender("other", "other", ("training", "generate"), "sys")


def test_we_can_do_all_of_it() -> None:
    held = list(contest.contests({"tiny": TINY}, [OURS], length=QUICK))
    assert [(one.config, one.what, one.texts) for one in held] == [
        ("tiny", "training", 0),
        ("tiny", "generate", 1),
        ("tiny", "generate", 3),
        ("tiny", "learning", 0),
        ("tiny", "preparation", 0),
    ]
    for one in held:
        assert not one.failed
        (figures,) = one.rounds["mlxgpt"]
        assert figures["peak_memory"] > 10e6
        assert all(value > 0 for name, value in figures.items() if name != "curve")
        assert "mlx" in one.made_with["mlxgpt"]["versions"]
    curve = held[3].rounds["mlxgpt"][0]["curve"]
    assert [seconds > 0 for seconds, _ in curve] == [False, False, True, True, True, True]
    assert curve[-1][1] < curve[0][1], "something is learned"


def test_some_are_trained_or_write_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "_ask", lambda one, task: {"made_with": {}})
    length = Length(rounds=1, texts=(1, 2), steps=1, megabytes=0.05)
    narrow, deep, two = {"narrow": TINY}, {"deep": TINY}, [OURS, NANOGPT]
    held = list(
        contest.contests({"tiny": TINY}, two, to_train=narrow, to_write=deep, length=length)
    )
    wrote = [one.rounds.keys() for one in held if one.what == "generate"]
    assert wrote == [{"mlxgpt", "nanoGPT"}, {"mlxgpt"}, {"mlxgpt"}], "without a cache it takes long"
    assert [(one.config, one.what, one.texts) for one in held] == [
        ("tiny", "training", 0),
        ("tiny", "generate", 1),
        ("tiny", "generate", 2),
        ("narrow", "training", 0),
        ("deep", "generate", 1),
        ("tiny", "learning", 0),
        ("tiny", "preparation", 0),
    ]


def test_all_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, int]] = []

    def ask(one: Contender, task: dict[str, Any]) -> dict[str, Any]:
        asked.append((task["what"], one.name, task["texts"]))
        return {"tokens_per_second": 1.0 + len(asked), "made_with": {"versions": one.name}}

    monkeypatch.setattr(contest, "_ask", ask)
    length = Length(rounds=2, texts=(1,), steps=1, megabytes=0.05)
    held = list(contest.contests({"tiny": TINY}, [OURS, OTHER], length=length))
    assert asked[:4] == [("training", name, 0) for name in ("mlxgpt", "other")] * 2
    assert asked[4:8] == [("generate", name, 1) for name in ("mlxgpt", "other")] * 2
    assert [name for _, name, _ in asked[8:]] == ["mlxgpt"] * 4, "the other cannot do the rest"
    rates = [figures["tokens_per_second"] for figures in held[0].rounds["other"]]
    assert rates == [3.0, 5.0]
    assert held[0].made_with["other"] == {"versions": "other"}


def test_who_fails_is_named_and_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(one: Contender, task: dict[str, Any]) -> dict[str, Any]:
        asked.append(one.name)
        if one is OTHER:
            raise UserError("it has no room", "…")
        return {"made_with": {}}

    monkeypatch.setattr(contest, "_ask", ask)
    length = Length(rounds=3, texts=(), steps=1, megabytes=0.05)
    first = next(contest.contests({"tiny": TINY}, [OURS, OTHER], length=length))
    assert first.failed == {"other": "it has no room"}
    assert asked == ["mlxgpt", "other", "mlxgpt", "mlxgpt"]


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ("import sys; print('a'); sys.exit('no module of that name')", "no module of that name"),
        ("import os; os._exit(7)", "its process ended with code 7"),
    ],
)
def test_a_process_that_ends_badly_says_why(
    monkeypatch: pytest.MonkeyPatch, child: str, said: str
) -> None:
    monkeypatch.setattr(contest, "CHILD", (sys.executable, "-c", child))
    with pytest.raises(UserError, match=said):
        contest._ask(OURS, {"what": "training"})


TELLS_ITS_BLAS = """
import json, mlxgpt
from mlxgpt.backend.cpu import blas
print(json.dumps({"blas": blas.status()}))
"""


def test_nothing_of_ours_is_in_the_process_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's BLAS, and our settings of the allocator, would be in all of it."""
    monkeypatch.setattr(contest, "CHILD", (sys.executable, "-c", TELLS_ITS_BLAS))
    ours, theirs = (contest._ask(one, {})["blas"] for one in (OURS, OTHER))
    assert theirs == "MLX's own BLAS"
    assert ours == blas.status()


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "find_spec", lambda name: None if name == "torch" else object())
    here, missing = contest.contenders()
    assert missing == ["torch"]
    assert [one.name for one in here] == ["mlxgpt", "transformers", "mlx-lm", "datasets.map"]


def test_a_folder_that_is_no_nanogpt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no model\.py"):
        contest.contenders(tmp_path)
    (tmp_path / "model.py").touch()
    here, missing = contest.contenders(tmp_path)
    assert ("nanoGPT" in [one.name for one in here]) == ("torch" not in missing)


def test_a_contest_is_plain_data() -> None:
    one = Contest("tiny", "training", 0, {"a": [{"x": 1.0}]}, {"a": {"b": "c"}}, {"d": "e"})
    assert Contest(**asdict(one)) == one
