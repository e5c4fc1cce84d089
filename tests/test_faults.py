"""Make every file operation of every command fail once: a sample in `make test`, all of them in
`make torture`. tests/faults/sweep.py defines the accepted outcomes.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import ForkServer
from tests.faults.library import build_fault_library
from tests.faults.sweep import (
    ACCEPTED_VERDICTS,
    COMMANDS,
    Case,
    Result,
    Sweep,
    find_loss,
    find_message_defect,
)

SAMPLE = {"resume": 6, "prepare": 3, "export": 3, "import": 3, "runs": 3}  # cases in `make test`
PARTS = {"train": 3, "resume": 3, "compare": 4, "prepare": 2}  # the slowest commands are split


def count_verdicts(results: list[Result]) -> Counter[str]:
    defects = [result for result in results if result.verdict not in ACCEPTED_VERDICTS]
    assert not defects, "\n\n".join(f"{r.verdict}: {r.case}\n{r.detail}" for r in defects)
    return Counter(result.verdict for result in results)


def test_sample_of_failing_operations(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    with ForkServer(build_fault_library(tmp_path)) as server:
        sweep = Sweep(server, tmp_path)
        results = [
            sweep.run(case)
            for command, count in SAMPLE.items()
            for case in rng.sample(sweep.cases(command), count)
        ]
    verdicts = count_verdicts(results)
    assert verdicts["missed"] < len(results) / 2, "faults do not reach the program"
    assert verdicts["stopped"], "no fault stopped a command"


CASE = Case("resume", "open runs storage/storage/logs.py:1", 1, errno.EIO)
DISK = "  → check the disk."


@pytest.mark.parametrize(
    ("lines", "defect"),
    [
        (["mlxgpt: cannot read runs/a/metrics.jsonl: Input/output error", DISK], ""),
        (["mlxgpt: cannot read runs/a/metrics.jsonl: no luck", DISK], "unclear message"),
        (["mlxgpt: Input/output error", DISK], "names no file"),
        (["mlxgpt: cannot read runs/a: Input/output error", "  → wait."], "wrong remedy"),
        (
            ["mlxgpt: cannot read runs/a: Input/output error", "  → free some space on the disk."],
            "wrong remedy",
        ),
        (["mlxgpt: cannot read runs/a: Input/output error"], "unclear message"),
    ],
)
def test_unclear_messages_are_detected(lines: list[str], defect: str) -> None:
    assert find_message_defect(CASE, lines) == defect


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ({"source/a": "1"}, {"source/a": "1", "data/a": "2"}, False),
        ({"source/a": "1"}, {}, True),
        ({"source/a": "1"}, {"source/a": "2"}, True),
        ({"runs/a newest": 4}, {"runs/a newest": 6}, False),
        ({"runs/a newest": 4}, {"runs/a newest": 2}, True),
        ({"runs/a best": 2.5}, {"runs/a best": 2.4}, False),
        ({"runs/a best": 2.5}, {"runs/a best": 2.6}, True),
        ({"runs/a samples": {1, 2}}, {"runs/a samples": {1, 2, 3}}, False),
        ({"runs/a samples": {1, 2}}, {"runs/a samples": {2, 3}}, True),
        ({"data/.b.new/progress.json": True}, {"data/b/train.bin": "1"}, False),
        ({"data/.b.new/progress.json": True}, {}, True),
    ],
)
def test_lost_files_are_detected(before: dict[str, Any], after: dict[str, Any], lost: bool) -> None:
    assert bool(find_loss(before, after)) == lost


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "part"),
    [(name, (n, PARTS.get(name, 1))) for name in COMMANDS for n in range(PARTS.get(name, 1))],
    ids=lambda value: value if isinstance(value, str) else f"{value[0] + 1}of{value[1]}",
)
def test_every_failing_operation(tmp_path: Path, command: str, part: tuple[int, int]) -> None:
    with ForkServer(build_fault_library(tmp_path)) as server:
        sweep = Sweep(server, tmp_path)
        cases = sweep.cases(command)
        results = [sweep.run(case) for case in cases[part[0] :: part[1]]]
    print(command, len({case.site for case in cases}), "sites", count_verdicts(results))
