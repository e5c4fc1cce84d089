"""Check that tests guard Linux-only features, because the tests also run on macOS."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
ONLY_LINUX = re.compile(
    r"""["']/(proc|sys)/|/dev/(full|shm)\b|RLIMIT_AS\b|os\.fork\(|sched_\w+affinity"""
    r"""|O_TMPFILE|epoll|\bstrace\b|LD_PRELOAD|\[["'](sed|date|stat|timeout|nproc)["']"""
)
GUARD = re.compile(r"""platform != "linux"|\.exists\(\)|\.is_dir\(\)""")
# Used only through tests/faults/library.py, which skips the test on other systems.
GUARDED_ELSEWHERE = {"faults/forked.py"}


def test_linux_only_features_are_guarded() -> None:
    unguarded = {}
    for path in set(TESTS.rglob("*.py")) - {Path(__file__)}:
        name, text = path.relative_to(TESTS).as_posix(), path.read_text(encoding="utf-8")
        match = ONLY_LINUX.search(text)
        if match and not GUARD.search(text) and name not in GUARDED_ELSEWHERE:
            unguarded[name] = match[0]
    assert unguarded == {}, "skip these on other systems"
