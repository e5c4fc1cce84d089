"""HellaSwag's validation split from a server that is laid out as GitHub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mlxgpt.evaluation import hellaswag
from mlxgpt.evaluation.hellaswag import HellaSwagExample, load_examples
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.fake_hub import GitHub, running
from tests.helpers.hellaswag_examples import TEXT, line

NOWHERE = "http://127.0.0.1:9"  # a port that refuses


class HellaSwag(GitHub):
    """raw.githubusercontent.com with our file in HellaSwag's place."""

    path = "/rowanz/hellaswag/master/data/hellaswag_val.jsonl"


class Here:
    """A machine with an empty cache, that knows our file's size and hash as HellaSwag's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
        self.folder, self.monkeypatch, self.notes = folder, monkeypatch, notes

    def load(self, address: str) -> list[HellaSwagExample]:
        """From GitHub, or what stands at that address instead."""
        self.monkeypatch.setattr(hellaswag, "VALIDATION_URL", address + HellaSwag.path)
        self.notes.clear()
        return load_examples()

    @property
    def kept(self) -> Path:
        (path,) = self.folder.rglob("hellaswag_val.jsonl")
        return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> Iterator[Here]:
    # Servers are reached directly, whatever proxies there are, by a session that knows it.
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    in_folder = partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", in_folder)
    monkeypatch.setattr(hellaswag, "VALIDATION_BYTES", len(TEXT.encode()))
    monkeypatch.setattr(hellaswag, "VALIDATION_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    huggingface_hub.close_session()
    yield Here(tmp_path, monkeypatch, notes)
    huggingface_hub.close_session()


def test_the_address_is_githubs() -> None:
    assert (
        hellaswag.VALIDATION_URL.removeprefix("https://raw.githubusercontent.com") == HellaSwag.path
    )


def test_it_is_fetched_once_and_kept(here: Here, examples: list[HellaSwagExample]) -> None:
    github = HellaSwag(TEXT)
    with running(github):
        assert here.load(github.address) == examples
        assert here.notes == ["getting HellaSwag (0 MB) from 127.0.0.1"]
        assert here.load(github.address) == examples
        assert here.notes == []
    assert github.asked == [f"GET {HellaSwag.path}"]
    assert here.load(NOWHERE) == examples
    assert here.kept.read_bytes() == TEXT.encode()


@pytest.mark.parametrize("damaged", [TEXT[:-1], TEXT.replace("kettle", "nettle"), TEXT + "\n"])
def test_a_damaged_cache_is_fetched_anew(
    here: Here, examples: list[HellaSwagExample], damaged: str
) -> None:
    github = HellaSwag(TEXT)
    with running(github):
        here.load(github.address)
        here.kept.write_text(damaged, encoding="utf-8")
        assert here.load(github.address) == examples
    assert len(github.asked) == 2
    assert here.kept.read_bytes() == TEXT.encode()


def test_a_download_that_breaks_off_is_tried_again(
    here: Here, examples: list[HellaSwagExample]
) -> None:
    github = HellaSwag(TEXT, "breaks")
    with running(github):
        assert here.load(github.address) == examples
    assert len(github.asked) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    here: Here, examples: list[HellaSwagExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    github = HellaSwag(TEXT)
    with running(github), monkeypatch.context() as patch:
        patch.setattr(files, "fsync_path", full)
        assert here.load(github.address) == examples
        assert "cannot be kept" in here.notes[-1]
        assert "No space left on device" in here.notes[-1]
        (here.folder / "mlxgpt").rename(here.folder / "before")
        (here.folder / "mlxgpt").write_text("a file in the folder's place")
        assert here.load(github.address) == examples
        assert "cannot be kept" in here.notes[-1]


REASONS = {
    "it answered 404": HellaSwag(TEXT, "404"),
    "it answered 503": HellaSwag(TEXT, "503"),
    "no answer in 1 s": HellaSwag(TEXT, "hangs"),
    "another text, sha256 ": HellaSwag(TEXT.replace("kettle", "nettle")),
    "it gave something longer": HellaSwag(TEXT + "\n"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_where_it_cannot_be_had_the_reason_is_told(here: Here, reason: str) -> None:
    with running(REASONS[reason]), pytest.raises(UserError) as caught:
        here.load(REASONS[reason].address)
    line(caught.value, rf"^HellaSwag could not be downloaded \(127.0.0.1: {reason}")
    assert not list(here.folder.rglob("*.jsonl"))


def test_without_a_network_it_is_told(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        here.load(NOWHERE)
    line(
        caught.value, r"^HellaSwag could not be downloaded \(127.0.0.1: no connection, .*refused\)$"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        here.load(NOWHERE)
    line(caught.value, r"^HellaSwag could not be downloaded \(127.0.0.1: HF_HUB_OFFLINE is set")
