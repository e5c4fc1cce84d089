"""Builds inject.c, the library that makes file operations fail; and what is common to its users."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

SOURCE_FILE = Path(__file__).with_name("inject.c")
WORK_FOLDERS = ("runs", "data", "source", "export", "tmp", "log")  # folders of a work folder
MODEL_FLAGS = """--n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 32 --warmup-steps 0
    --sample-tokens 4 --log-interval 1 --dropout 0.1"""  # of a model whose training is quick


def build_fault_library(folder: Path) -> Path:
    """The library, built into a folder; skips the test where it cannot be built."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("faults are injected on Linux only, and with a C compiler")
    library = folder / "inject.so"
    flags = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE_FILE), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return library


def fault_roots_env(work: Path) -> Mapping[str, str]:
    """The environment that names the classes of paths in a work folder."""
    return {"FAULT_ROOTS": ":".join(f"{name}={work / name}" for name in WORK_FOLDERS)}
