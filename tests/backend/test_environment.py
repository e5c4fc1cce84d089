from __future__ import annotations

import pytest

from mlxgpt.backend import device, environment, execution
from mlxgpt.backend.cpu import blas
from mlxgpt.backend.environment import describe_environment, environment_changes


def test_a_cpu_names_its_blas_and_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    monkeypatch.setattr(blas, "_status", "OpenBLAS 1")
    monkeypatch.setattr(blas, "blas_thread_count", lambda: 3)
    monkeypatch.setattr(execution, "compile_failure", lambda: None)
    values = describe_environment(2)
    assert list(values) == [
        *("mlxgpt", "mlx", "device", "ranks", "backend", "BLAS", "BLAS threads", "compiler")
    ]
    assert (values["ranks"], values["backend"]) == ("2", "cpu")
    assert (values["BLAS"], values["BLAS threads"]) == ("OpenBLAS 1", "3")
    assert values["compiler"].startswith("g++")
    monkeypatch.setattr(execution, "compile_failure", lambda: "no compiler")
    assert describe_environment()["compiler"] == "none"


def test_a_gpu_names_neither_unless_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "device_name", lambda: "Apple M1")
    monkeypatch.setattr(execution, "compile_failure", lambda: None)
    assert list(describe_environment()) == ["mlxgpt", "mlx", "device", "ranks", "backend"]
    monkeypatch.setattr(execution, "compile_failure", lambda: "a kernel failed")
    assert describe_environment()["compiler"] == "none"


def test_a_compiler_that_does_not_answer_is_named_without_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment.jit, "find_gxx", lambda: "/nowhere/g++")
    assert environment._gxx_version() == "g++"


def test_changes_are_those_of_what_was_known_before() -> None:
    before, now = {"mlx": "1", "device": "M1"}, {"mlx": "2", "device": "M1", "compiler": "none"}
    assert environment_changes(before, now) == ["mlx 1 → 2"]
