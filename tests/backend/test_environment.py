from __future__ import annotations

import pytest

from mlxgpt.backend import device, environment, execution
from mlxgpt.backend.cpu import blas
from mlxgpt.backend.environment import describe_environment, environment_changes


def test_cpu_environment_includes_blas_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_gpu_environment_includes_the_compiler_only_if_it_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "device_name", lambda: "Apple M1")
    monkeypatch.setattr(execution, "compile_failure", lambda: None)
    assert list(describe_environment()) == ["mlxgpt", "mlx", "device", "ranks", "backend"]
    monkeypatch.setattr(execution, "compile_failure", lambda: "a kernel failed")
    assert describe_environment()["compiler"] == "none"


def test_unresponsive_compiler_is_listed_without_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment.jit, "find_gxx", lambda: "/nowhere/g++")
    assert environment._gxx_version() == "g++"


def test_changes_include_only_previously_known_keys() -> None:
    before, now = {"mlx": "1", "device": "M1"}, {"mlx": "2", "device": "M1", "compiler": "none"}
    assert environment_changes(before, now) == ["mlx 1 → 2"]
