"""Fixtures for tests in Chromium; they need playwright and axe-core.

Without Chromium the tests are skipped, unless MLXGPT_BROWSER has its path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    configured = os.environ.get("MLXGPT_BROWSER")
    executable = configured or next(filter(None, map(shutil.which, NAMES)), None)
    if not executable and MAC.exists():
        executable = str(MAC)
    if not executable:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
