"""Downloads through `huggingface_hub`, which handles retries, resuming, caching, certificates and
proxies, plus timeouts and readable error messages.

Timeouts:

    response, and each next byte    HF_HUB_DOWNLOAD_TIMEOUT, 10 s; huggingface_hub resumes up to
                                    5 times
    file metadata                   HF_HUB_ETAG_TIMEOUT, 10 s; then up to 6 times 60 s
    HTTP 429, too many requests     as long as the Hub asks for, up to 5 times, each wait logged
    datasets with a mirror          MIRROR_TIMEOUT_SECONDS in total, then the mirror
"""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

T = TypeVar("T")


class DownloadError(Exception):
    """A download timed out, or its content is not as expected; the message is shown to users."""


def response_timeout() -> float:
    """Timeout in seconds for the response, and for each next byte."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def configure_hub(*, show_warnings: bool) -> None:
    """Set the timeout that `huggingface_hub` lacks, and hide progress bars without a terminal.

    Args:
        show_warnings: whether it logs retries and rate-limit waits.
    """
    from huggingface_hub.utils import disable_progress_bars, get_session
    from huggingface_hub.utils import logging as hub_logging

    get_session().timeout = response_timeout()
    hub_logging.set_verbosity(hub_logging.WARNING if show_warnings else hub_logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()


@contextlib.contextmanager
def force_offline() -> Iterator[None]:
    """Set HF_HUB_OFFLINE in `datasets` and `huggingface_hub`, which read it only on import."""
    import datasets
    from huggingface_hub import constants

    previous = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = previous


MIRROR_TIMEOUT_SECONDS = 60.0  # for the Hub, before the mirror is used


def run_with_timeout(seconds: float, download: Callable[[], T]) -> T:
    """Run a download in a thread, which is abandoned after `seconds`, and return its result.

    Raises:
        DownloadError: if it takes longer.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(download())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result.done():
        raise DownloadError(f"download timed out after {seconds:.0f} s")
    return result.result()


MAX_DOWNLOAD_ATTEMPTS = 3  # if the connection is lost


def download_bytes(url: str, max_bytes: int) -> bytes:
    """Download the content of a URL; retries if the connection is lost.

    Args:
        max_bytes: maximum size of the content.

    Raises:
        Exception: any error of the transport; DownloadError if the content is too large.
    """
    from huggingface_hub.utils import get_session, httpx

    for attempts_left in reversed(range(MAX_DOWNLOAD_ATTEMPTS)):
        content = bytearray()
        try:
            with get_session().stream("GET", url, timeout=response_timeout()) as response:
                response.raise_for_status()
                for block in response.iter_bytes():
                    content += block
                    if len(content) > max_bytes:
                        raise DownloadError("the response is larger than expected")
            return bytes(content)
        except httpx.TransportError:
            if not attempts_left or not content:  # retry only if the server had sent something
                raise
    raise AssertionError("unreachable")


def download_cache_folder(name: str) -> Path:
    """Cache folder for files downloaded by URL, in `huggingface_hub`'s assets cache.

    Args:
        name: OWNER/NAME of the dataset.

    Raises:
        OSError, ValueError: if the folder does not exist and cannot be made.
    """
    from huggingface_hub import cached_assets_path

    return cached_assets_path("mlxgpt", namespace="texts", subfolder=name)


def describe_download_error(error: BaseException) -> str:
    """Why a download failed, in one line, from the first known error in the exception chain."""
    from huggingface_hub.errors import FileMetadataError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    for cause in _exception_chain(error):
        if isinstance(cause, DownloadError | UserError):
            return str(cause).partition("\n")[0]
        if type(cause).__name__ == "DatasetNotFoundError":  # importing the class takes a second
            return "the dataset does not exist, or is private or gated"
        if code := _response_status(cause):
            return f"HTTP status {code}"
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        if isinstance(cause, FileMetadataError | json.JSONDecodeError):
            return "the response is not from the hub, but from a login page or a proxy"
        if isinstance(cause, httpx.TimeoutException):
            return f"no response after {response_timeout():.0f} s"
        if "CERTIFICATE_VERIFY_FAILED" in str(cause):
            return (
                "certificate verification failed; if your network uses its own, set SSL_CERT_FILE"
            )
        if isinstance(cause, httpx.ProxyError):
            return f"proxy error: {cause}"
        if isinstance(cause, httpx.ConnectError):
            return f"connection failed: {cause}"
        if isinstance(cause, httpx.TransportError):
            return "the connection was lost"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def is_unreachable(error: BaseException) -> bool:
    """Whether the server could not be reached, or HF_HUB_OFFLINE is set."""
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    error_types = OfflineModeIsEnabled | httpx.TransportError
    return any(isinstance(cause, error_types) for cause in _exception_chain(error))


def is_xet_error(error: BaseException) -> bool:
    """Whether an error comes from the Hub's Xet storage, which only its traceback shows."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("xet" in frame.name or "_xet" in frame.filename for frame in frames)


# Without EACCES and EPERM, which firewalls and other users' folders cause, too.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)


def raise_disk_error(error: BaseException, folder: Path) -> None:
    """Raise UserError if a download into `folder` failed because of a full or failing disk."""
    for cause in _exception_chain(error):
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            raise files.to_user_error(cause, "use", folder) from error


def http_status(error: BaseException) -> int | None:
    """HTTP status of the first response in an exception chain; None if there is none."""
    return next(
        (code for cause in _exception_chain(error) if (code := _response_status(cause))), None
    )


def _response_status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
