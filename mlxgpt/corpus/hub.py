"""The Hugging Face hub: the corpora that we know there, through `datasets`.

What lies in its cache is used without asking. A text whose hash is pinned is the same for
everybody, whenever it is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.corpus import readers
from mlxgpt.errors import UserError

ANSWER_SECONDS = 3.0  # for any answer at all


@dataclass(frozen=True)
class HubText:
    """A dataset on the hub: its column `text`, and which splits serve for what.

    Attributes:
        train, val: splits; without one to judge by, a part of `train` is kept for it.
        single: whether the splits are pieces of one document.
        megabytes: of text, about.
        sha256: of all the text, where that is known.
    """

    path: str
    train: str
    val: str | None
    single: bool
    megabytes: int
    sha256: str | None = None


HUB = {
    "shakespeare": HubText(
        path="karpathy/tiny_shakespeare",
        train="train",
        val="validation+test",  # joined they are nanoGPT's last 10 %
        single=True,
        megabytes=1,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": HubText(
        path="roneneldan/TinyStories",
        train="train",
        val="validation",
        single=False,
        megabytes=1900,
    ),
    # A copy that is plain Parquet files: `datasets` no longer runs the original's script.
    "openwebtext": HubText(
        path="vietgpt/openwebtext_en",
        train="train",
        val=None,
        single=False,
        megabytes=38_000,
    ),
}


class NoConnection(UserError):
    """The hub does not answer, not even with an error."""


def origin(name: str) -> dict[str, Any]:
    """The origin of a corpus on the hub, known without reaching it."""
    known = HUB[name]
    return {"hub": known.path} | ({"sha256": known.sha256} if known.sha256 else {})


def load(name: str) -> tuple[list[Path], list[Path]]:
    """Arrow files of documents to train on and to judge by, of a corpus in HUB; they stay in the
    cache of `datasets`.

    Raises:
        NoConnection: within a few seconds, if it is not in the cache and the hub does not answer.
        UserError: if the hub answers with an error, or with another text.
    """
    import datasets  # slow to import: only where it is used
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
    hub = HUB[name]
    try:
        with _offline():
            train, val = _splits(hub)
    except Exception:  # it is not in the cache, or damaged there
        if not _answers(hub):
            raise NoConnection(
                f"the Hugging Face hub, where {hub.path} is, cannot be reached",
                "check the connection; or train on a text of your own, --source FILE, or on the "
                "built-in stories, --source storybook.",
            ) from None
        try:
            train, val = _splits(hub)
        except Exception as error:  # datasets lets through whatever its transports raise
            raise UserError(
                f"cannot get {hub.path} from the Hugging Face hub: {_reason(error)}",
                "try again later, or take a text file of your own.",
            ) from error
    if hub.sha256 and (digest := _digest(train + val)) != hub.sha256:
        raise UserError(
            f"{hub.path} on the hub is not the text it was (sha256 {digest[:8]}…)",
            "get the original, and name that file.",
        )
    return train, val


def _splits(hub: HubText) -> tuple[list[Path], list[Path]]:
    import datasets

    def arrow_files(split: str | None) -> list[Path]:
        if split is None:
            return []
        cached = datasets.load_dataset(hub.path, split=split).cache_files
        return [Path(file["filename"]) for file in cached]

    return arrow_files(hub.train), arrow_files(hub.val)


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        for piece in readers.read(path):
            digest.update(piece.text.encode("utf-8"))
    return digest.hexdigest()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1, which both libraries read only once, when they are imported."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _answers(hub: HubText) -> bool:
    """Whether the hub answers at all; left to itself, `datasets` tries for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            url = f"{constants.ENDPOINT}/api/datasets/{hub.path}"
            answers.append(get_session().head(url, timeout=ANSWER_SECONDS))

    # In a thread, since looking up the name may take longer than any timeout says.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return bool(answers)


def _reason(error: BaseException | None) -> str:
    """The HTTP status somewhere behind an error, or else its kind and first line."""
    first = error
    while error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status:
            return f"it answered {status}"
        error = error.__cause__ or error.__context__
    return f"{type(first).__name__}: {first}".splitlines()[0][:200]
