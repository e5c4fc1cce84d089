"""Downloads of HellaSwag's validation split from a local server in place of GitHub."""

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
from tests.helpers.fake_hub import GitHub, run_servers
from tests.helpers.hellaswag_examples import EXAMPLES_JSONL, check_error_format

NOWHERE = "http://127.0.0.1:9"  # refuses connections


class HellaSwagServer(GitHub):
    """raw.githubusercontent.com, with our file in place of HellaSwag."""

    path = "/rowanz/hellaswag/master/data/hellaswag_val.jsonl"


class HellaSwagCache:
    """An empty cache that expects the size and hash of our file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
        self.folder, self.monkeypatch, self.notes = folder, monkeypatch, notes

    def load(self, address: str) -> list[HellaSwagExample]:
        """Load the examples, downloading from `address` if they are not cached."""
        self.monkeypatch.setattr(hellaswag, "VALIDATION_URL", address + HellaSwagServer.path)
        self.notes.clear()
        return load_examples()

    @property
    def cached_file(self) -> Path:
        (path,) = self.folder.rglob("hellaswag_val.jsonl")
        return path


@pytest.fixture
def hellaswag_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> Iterator[HellaSwagCache]:
    # Bypass any configured proxies; the hub's session has to be recreated for this.
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    assets_path = partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", assets_path)
    monkeypatch.setattr(hellaswag, "VALIDATION_BYTES", len(EXAMPLES_JSONL.encode()))
    monkeypatch.setattr(
        hellaswag, "VALIDATION_SHA256", hashlib.sha256(EXAMPLES_JSONL.encode()).hexdigest()
    )
    huggingface_hub.close_session()
    yield HellaSwagCache(tmp_path, monkeypatch, notes)
    huggingface_hub.close_session()


def test_the_default_url_is_on_github() -> None:
    assert (
        hellaswag.VALIDATION_URL.removeprefix("https://raw.githubusercontent.com")
        == HellaSwagServer.path
    )


def test_the_file_is_downloaded_once_and_cached(
    hellaswag_cache: HellaSwagCache, examples: list[HellaSwagExample]
) -> None:
    github = HellaSwagServer(EXAMPLES_JSONL)
    with run_servers(github):
        assert hellaswag_cache.load(github.address) == examples
        assert hellaswag_cache.notes == ["downloading HellaSwag (0 MB) from 127.0.0.1"]
        assert hellaswag_cache.load(github.address) == examples
        assert hellaswag_cache.notes == []
    assert github.requests == [f"GET {HellaSwagServer.path}"]
    assert hellaswag_cache.load(NOWHERE) == examples
    assert hellaswag_cache.cached_file.read_bytes() == EXAMPLES_JSONL.encode()


@pytest.mark.parametrize(
    "damaged",
    [EXAMPLES_JSONL[:-1], EXAMPLES_JSONL.replace("kettle", "nettle"), EXAMPLES_JSONL + "\n"],
)
def test_a_damaged_cached_file_is_downloaded_again(
    hellaswag_cache: HellaSwagCache, examples: list[HellaSwagExample], damaged: str
) -> None:
    github = HellaSwagServer(EXAMPLES_JSONL)
    with run_servers(github):
        hellaswag_cache.load(github.address)
        hellaswag_cache.cached_file.write_text(damaged, encoding="utf-8")
        assert hellaswag_cache.load(github.address) == examples
    assert len(github.requests) == 2
    assert hellaswag_cache.cached_file.read_bytes() == EXAMPLES_JSONL.encode()


def test_an_interrupted_download_is_retried(
    hellaswag_cache: HellaSwagCache, examples: list[HellaSwagExample]
) -> None:
    github = HellaSwagServer(EXAMPLES_JSONL, "breaks")
    with run_servers(github):
        assert hellaswag_cache.load(github.address) == examples
    assert len(github.requests) == 2


def test_an_unwritable_cache_is_not_used(
    hellaswag_cache: HellaSwagCache,
    examples: list[HellaSwagExample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raise_disk_full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    github = HellaSwagServer(EXAMPLES_JSONL)
    with run_servers(github), monkeypatch.context() as patch:
        patch.setattr(files, "fsync_path", raise_disk_full)
        assert hellaswag_cache.load(github.address) == examples
        assert "could not be cached" in hellaswag_cache.notes[-1]
        assert "No space left on device" in hellaswag_cache.notes[-1]
        (hellaswag_cache.folder / "mlxgpt").rename(hellaswag_cache.folder / "before")
        (hellaswag_cache.folder / "mlxgpt").write_text("a file in the folder's place")
        assert hellaswag_cache.load(github.address) == examples
        assert "could not be cached" in hellaswag_cache.notes[-1]


SERVERS_BY_REASON = {
    "HTTP status 404": HellaSwagServer(EXAMPLES_JSONL, "404"),
    "HTTP status 503": HellaSwagServer(EXAMPLES_JSONL, "503"),
    "no response after 1 s": HellaSwagServer(EXAMPLES_JSONL, "hangs"),
    "unexpected content, sha256 ": HellaSwagServer(EXAMPLES_JSONL.replace("kettle", "nettle")),
    "the response is larger than expected": HellaSwagServer(EXAMPLES_JSONL + "\n"),
}


@pytest.mark.parametrize("reason", SERVERS_BY_REASON)
def test_a_failed_download_reports_the_reason(hellaswag_cache: HellaSwagCache, reason: str) -> None:
    with run_servers(SERVERS_BY_REASON[reason]), pytest.raises(UserError) as error:
        hellaswag_cache.load(SERVERS_BY_REASON[reason].address)
    check_error_format(error.value, rf"^HellaSwag could not be downloaded \(127.0.0.1: {reason}")
    assert not list(hellaswag_cache.folder.rglob("*.jsonl"))


def test_a_missing_network_is_reported(
    hellaswag_cache: HellaSwagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as error:
        hellaswag_cache.load(NOWHERE)
    check_error_format(
        error.value,
        r"^HellaSwag could not be downloaded \(127.0.0.1: connection failed: .*refused\)$",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        hellaswag_cache.load(NOWHERE)
    check_error_format(
        error.value, r"^HellaSwag could not be downloaded \(127.0.0.1: HF_HUB_OFFLINE is set"
    )
