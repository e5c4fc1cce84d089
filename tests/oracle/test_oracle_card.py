"""Every example in the README.md of an exported model runs. Needs the extra `oracle`."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.convert import exporting
from mlxgpt.storage.loading import load_model
from tests.convert.test_model_card import RUNS, make_run

pytest.importorskip("torch", reason="the extra `oracle` is not installed")
pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
pytest.importorskip("mlx_lm", reason="the extra `oracle` is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # third-party warnings

MODERN = {"position": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "bias": False}


def export_readme(folder: Path, case: str, parts: dict[str, Any], to: str, bits: int | None) -> str:
    """Export a model; return its README.md."""
    tokenizer, block = RUNS[case]
    run = make_run(folder / "run", tokenizer, block, **parts)
    _, checkpoint = load_model(run)
    exporting.export_run(run, checkpoint.parameters, 0, folder / "out", to, bits)
    return (folder / "out" / "README.md").read_text(encoding="utf-8")


def run_mlx_lm(text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party warnings
        generate = importlib.import_module("mlx_lm.generate")  # the attribute is a function
    (line,) = re.findall(r"^mlx_lm\.generate .*?(?=\n```)", text, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        generate.main()
    return output.getvalue()


@pytest.mark.parametrize("parts", [{}, MODERN], ids=["classic", "modern"])
@pytest.mark.parametrize("case", RUNS)
def test_examples_of_hf_exports_run(
    tmp_path: Path, case: str, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = export_readme(tmp_path, case, parts, "hf", None)
    monkeypatch.chdir(tmp_path / "out")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(example, "README.md", "exec"), {})
    assert output.getvalue()
    assert "Generation:" in run_mlx_lm(text, monkeypatch)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_example_of_mlx_lm_exports_runs(
    tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = export_readme(tmp_path, "words", {}, "mlx-lm", bits)
    monkeypatch.chdir(tmp_path / "out")
    assert "Generation:" in run_mlx_lm(text, monkeypatch)
