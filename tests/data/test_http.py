"""Timeouts and errors of downloads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session

from mlxgpt.data import http
from mlxgpt.utils.errors import UserError


def test_hub_session_gets_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a request without its own timeout would wait forever."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 7)
    monkeypatch.setattr(get_session(), "timeout", None)
    http.configure_hub(show_warnings=True)
    timeout = get_session().timeout
    assert {timeout.connect, timeout.read, timeout.write, timeout.pool} == {7.0}


def test_run_with_timeout_returns_the_result_or_raises_the_error() -> None:
    assert http.run_with_timeout(60, lambda: 3) == 3

    def fail() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        http.run_with_timeout(60, fail)


def test_download_that_takes_too_long_is_abandoned() -> None:
    finished = threading.Event()
    with pytest.raises(http.DownloadError, match="download timed out after 0 s"):
        http.run_with_timeout(0.01, finished.wait)
    finished.set()


@pytest.mark.parametrize(
    "cause", [http.DownloadError("short\nlong"), UserError("short", "do this.")]
)
def test_download_error_is_described_in_one_line(cause: Exception) -> None:
    with pytest.raises(RuntimeError) as excinfo:
        raise RuntimeError("while generating") from cause
    assert http.describe_download_error(excinfo.value) == "short"


def test_only_disk_errors_are_raised_as_disk_errors() -> None:
    http.raise_disk_error(PermissionError(13, "Permission denied"), Path("cache"))
    with pytest.raises(UserError, match="cannot use cache"):
        http.raise_disk_error(OSError(28, "No space left on device"), Path("cache"))
