"""Test how tests/conftest.py handles markers."""

from __future__ import annotations

from typing import Any

import pytest

from mlxgpt.backend import device
from tests.conftest import pytest_runtest_setup


class FakeItem:
    def __init__(self, *marks: str) -> None:
        self.marks = marks

    def get_closest_marker(self, name: str) -> bool:
        return name in self.marks


@pytest.mark.parametrize("cpu", [True, False])
def test_exact_bits_tests_run_only_on_the_cpu(cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: cpu)
    exact: Any = FakeItem("exact_bits")
    slow: Any = FakeItem("slow")
    pytest_runtest_setup(slow)
    if cpu:
        pytest_runtest_setup(exact)
    else:
        with pytest.raises(pytest.skip.Exception, match="another order"):
            pytest_runtest_setup(exact)
