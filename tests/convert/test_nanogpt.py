"""nanoGPT checkpoints without PyTorch; the other tests are in tests/oracle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlxgpt.convert import nanogpt
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT


def test_without_pytorch_the_error_explains_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="PyTorch, which is not installed") as error:
        nanogpt.read_nanogpt_checkpoint(tmp_path / "ckpt.pt")
    assert "pip install 'torch>=2.6,<3'" in error.value.remedy
    assert "\nnanogpt = [" in (ROOT / "pyproject.toml").read_text()
