"""Build the fault-injection library inject.c; constants shared by the fault tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

SOURCE_FILE = Path(__file__).with_name("inject.c")
WORK_FOLDERS = ("runs", "data", "source", "export", "tmp", "log")  # subfolders of a work folder
MODEL_FLAGS = """--n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 32 --warmup-steps 0
    --sample-tokens 4 --log-interval 1 --dropout 0.1"""  # a model that trains quickly


def build_fault_library(folder: Path) -> Path:
    """Build the library in a folder; skip the test if it cannot be built."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("faults are injected on Linux only, and with a C compiler")
    library = folder / "inject.so"
    flags = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE_FILE), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return library


def fault_roots_env(work: Path) -> Mapping[str, str]:
    """Environment variables that define the path classes of a work folder, for inject.c."""
    return {"FAULT_ROOTS": ":".join(f"{name}={work / name}" for name in WORK_FOLDERS)}
