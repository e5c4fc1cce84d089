"""What lies outside this machine: whether it answers, how long it is waited for, and a file by its
address. All of it through `huggingface_hub`'s session, which knows certificates and proxies.

A line is slow as long as something arrives, and dead after SECONDS in which nothing does. Whoever
has another place to ask does not wait on this one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlxgpt.errors import UserError

SECONDS = 20.0  # without a byte; HF_HUB_DOWNLOAD_TIMEOUT, where that is set, comes first
LOOK_UP_SECONDS = 30.0  # more, at most, for looking up a name, which no time-out ends
# Not those that firewalls and folders of others give, too.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
SOON = 3.0  # seconds; whoever waits for longer is told
TRIES = 3
NOT_NOW = (408, 429, 500, 502, 503, 504)  # statuses after which `huggingface_hub` tries again


class Trouble(Exception):
    """Something outside is not as it should be; the message tells what, to a person."""


class NoAnswer(Trouble):
    """Nothing comes back."""


def seconds() -> float:
    """How long to wait for the next byte."""
    from huggingface_hub import constants

    chosen = constants.HF_HUB_DOWNLOAD_TIMEOUT
    return SECONDS if chosen == constants.DEFAULT_DOWNLOAD_TIMEOUT else float(chosen)


def must_answer(url: str, note: Callable[[str], None]) -> None:
    """See that anything at all comes back from an address, be it an error.

    Raises:
        NoAnswer: if nothing does.
    """
    from huggingface_hub.utils import get_session

    came: list[Exception | None] = []

    def ask() -> None:
        try:
            get_session().head(url, timeout=seconds())
            came.append(None)
        except Exception as error:
            came.append(error)

    # In a thread, since a name is looked up for as long as the system likes, deaf to Ctrl-C.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SOON)
    if not came:
        note(f"no answer yet; waiting up to {seconds():.0f} s for one")
        asking.join(LOOK_UP_SECONDS + seconds())
    if not came:
        raise NoAnswer("no answer")
    if came[0]:
        raise NoAnswer(reason(came[0]))


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1, which both libraries read only once, when they are imported."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def without_xet() -> Iterator[None]:
    """As with HF_HUB_DISABLE_XET=1: large files come by plain HTTP."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def through_xet(error: BaseException) -> bool:
    """Whether an error came from the hub's Xet storage: its own are of many kinds, and tell it
    only by where they were raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return any("xet" in frame.name or "_xet" in frame.filename for frame in frames)


@contextlib.contextmanager
def patience(note: Callable[[str], None], *, tries_again: bool) -> Iterator[None]:
    """How `huggingface_hub` is to wait: for each answer as long as `seconds` tells.

    Args:
        note: is told of longer waits that a server asks for.
        tries_again: whether to let it ask again, and wait as a server likes (left to itself, up
            to half an hour); otherwise the first answer that says "not now", and the first one
            that does not come, are errors.
    """
    from huggingface_hub.utils import get_session

    asked: dict[str, float] = {}  # hosts that have not answered yet, and when they were asked
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            told.add(line)
            note(line)

    def asking(request: Any) -> None:
        host = request.url.host
        if time.monotonic() - asked.get(host, math.inf) > 0.9 * seconds():
            if not tries_again:
                raise NoAnswer(f"no answer in {seconds():.0f} s")
            tell(f"no answer from {host} in {seconds():.0f} s; asking again")
        asked[host] = time.monotonic()
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = dict.fromkeys(kinds, seconds())

    def answered(response: Any) -> None:
        asked.pop(response.request.url.host, None)
        if response.status_code not in NOT_NOW:
            return
        if not tries_again:
            response.raise_for_status()
        code = response.status_code
        # Each answer has a RateLimit; only of a 429 it tells when to come again.
        limit = response.headers.get("RateLimit", "") if code == 429 else ""
        wait = re.search(r"\bt=(\d+)", limit) or re.match(
            r"(\d+)$", response.headers.get("Retry-After", "")
        )
        if wait and int(wait[1]) > SOON:
            often = "; whoever logs in, with hf auth login, may ask more often"
            tell(
                f"the hub answers {code}, and asks to wait {int(wait[1])} s"
                f"{often if code == 429 else ''}"
            )
        else:
            tell(f"the hub answers {code}; asking again")

    session = get_session()
    before = session.event_hooks
    session.event_hooks = {
        "request": [*before["request"], asking],
        "response": [*before["response"], answered],
    }
    try:
        yield
    finally:
        session.event_hooks = before


def fetch(url: str, longest: int) -> bytes:
    """What lies at an address, tried again where it broke off.

    Args:
        longest: bytes that it may have.

    Raises:
        Exception: whatever the transport raises; Trouble if it is longer.
    """
    from huggingface_hub.utils import get_session, httpx

    for left in reversed(range(TRIES)):
        content = bytearray()
        try:
            with get_session().stream("GET", url, timeout=seconds()) as response:
                response.raise_for_status()
                for block in response.iter_bytes():
                    content += block
                    if len(content) > longest:
                        raise Trouble("it gave something longer")
            return bytes(content)
        except httpx.TransportError:
            if not left or not content:  # who said nothing the first time is not asked again
                raise
    raise AssertionError("unreachable")


def cache_folder(name: str) -> Path:
    """Where that which was fetched by its address is kept: in a cache of `huggingface_hub`.

    Args:
        name: OWNER/NAME of what it belongs to.

    Raises:
        OSError, ValueError: if the folder is not there and cannot be made.
    """
    from huggingface_hub import cached_assets_path

    return cached_assets_path("mlxgpt", namespace="texts", subfolder=name)


def reason(error: BaseException) -> str:
    """What is wrong outside, from what stands behind an error; else what it says, in one line."""
    from huggingface_hub.errors import FileMetadataError
    from huggingface_hub.utils import httpx

    for behind in _behind(error):
        if isinstance(behind, Trouble | UserError):
            return str(behind).partition("\n")[0]
        if type(behind).__name__ == "DatasetNotFoundError":  # importing it takes a second
            return "there is no such dataset, or it is private or gated"
        if code := _status(behind):
            return f"it answered {code}"
        if isinstance(behind, FileMetadataError | json.JSONDecodeError):
            return "what answers is not the hub, but a login page or a proxy"
        if isinstance(behind, httpx.TimeoutException):
            return f"no answer in {seconds():.0f} s"
        if "CERTIFICATE_VERIFY_FAILED" in str(behind):
            return "its certificate is unknown here; if your network has its own, set SSL_CERT_FILE"
        if isinstance(behind, httpx.ProxyError):
            return f"the proxy answers {behind}"
        if isinstance(behind, httpx.ConnectError):
            return f"no connection, {behind}"
        if isinstance(behind, httpx.TransportError):
            return "the connection breaks off"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def disk_error(error: BaseException) -> OSError | None:
    """The error of a failing or full disk that is behind an error of a download."""
    errors = (e for e in _behind(error) if isinstance(e, OSError) and e.errno in DISK)
    return next(errors, None)


def status(error: BaseException) -> int | None:
    """The HTTP status somewhere behind an error."""
    return next((code for behind in _behind(error) if (code := _status(behind))), None)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
