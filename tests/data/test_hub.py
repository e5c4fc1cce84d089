"""Shakespeare from the hub and from its mirror, from an empty cache to token arrays."""

from __future__ import annotations

import errno
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mlxgpt.data.dataset import open_dataset
from tests.helpers.fake_hub import (
    GitHub,
    Hub,
    Repository,
    make_shakespeare_repos,
    split_text,
    to_parquet,
)
from tests.helpers.offline_machine import (
    REFUSED_ADDRESS,
    SMALL_TEXT,
    OfflineMachine,
    run_offline_machine,
)


@pytest.fixture(scope="module")
def shakespeare_text(real_texts: Path) -> str:
    return (real_texts / "shakespeare" / "input.txt").read_bytes().decode()


# Shakespeare from the hub.


def test_shakespeare_is_downloaded_once_and_then_read_from_the_cache(tmp_path: Path) -> None:
    hub = Hub(make_shakespeare_repos(SMALL_TEXT))
    with run_offline_machine(tmp_path, hub) as client:
        code, out, err = client.run("prepare", "shakespeare")
        assert code == 0, err
        assert "900 training tokens, 100 validation tokens, vocabulary 7" in out
        expected = "downloading karpathy/tiny_shakespeare (1 MB of text) from the Hugging Face hub"
        assert expected in err
        assert client.read_splits() == (SMALL_TEXT[:900], SMALL_TEXT[900:])
        requested = len(hub.requests)
        code, out, err = client.run("prepare", "shakespeare", "--name", "again")
        assert code == 0, err
        assert len(hub.requests) == requested, "the cache is used without asking"
        assert "downloading" not in err
    assert not any("tiny_shakespeare.py" in requested for requested in hub.cdn.requests)


def test_shakespeare_from_parquet_files_on_the_main_branch(tmp_path: Path) -> None:
    files = {
        f"data/{s}-00000-of-00001.parquet": to_parquet([t])
        for s, t in split_text(SMALL_TEXT).items()
    }
    hub = Hub({"karpathy/tiny_shakespeare": Repository({"main": files})})
    with run_offline_machine(tmp_path, hub) as client:
        code, _, err = client.run("prepare", "shakespeare")
        assert code == 0, err
        assert client.read_splits() == (SMALL_TEXT[:900], SMALL_TEXT[900:])


def test_slow_connection_is_waited_for(tmp_path: Path) -> None:
    with run_offline_machine(tmp_path, Hub(make_shakespeare_repos(SMALL_TEXT), "slow")) as client:
        code, _, err = client.run("prepare", "shakespeare", HF_HUB_DOWNLOAD_TIMEOUT="30")
        assert code == 0, err
        assert "the same text" not in err
        assert client.read_splits() == (SMALL_TEXT[:900], SMALL_TEXT[900:])


def test_interrupted_download_resumes_where_it_stopped(tmp_path: Path) -> None:
    hub = Hub(make_shakespeare_repos(SMALL_TEXT), cdn="breaks")
    with run_offline_machine(tmp_path, hub) as client:
        code, _, err = client.run("prepare", "shakespeare", CHUNK="50")
        assert code == 0, err
        assert client.read_splits() == (SMALL_TEXT[:900], SMALL_TEXT[900:])
    assert hub.cdn.truncated_responses == 2
    assert hub.cdn.resumed_downloads == 2


def test_real_shakespeare_has_the_pinned_hash(tmp_path: Path, shakespeare_text: str) -> None:
    """Runs the unmodified program."""
    with run_offline_machine(tmp_path, Hub(make_shakespeare_repos(shakespeare_text))) as client:
        code, out, err = client.run("prepare", "shakespeare", program=("-m", "mlxgpt"))
        assert code == 0, err
        assert "1,003,854 training tokens, 111,540 validation tokens, vocabulary 65" in out


# Failures of the hub.

HUB_FAILURES = {
    "HTTP status 401": ("401", "/", "well"),
    "HTTP status 403": ("403", "/", "well"),
    "HTTP status 404": ("404", "/", "well"),
    "HTTP status 429": ("429", "/", "well"),  # with a request to wait five minutes
    "HTTP status 500": ("500", "/", "well"),
    "HTTP status 503": ("503", "default/", "well"),  # after the metadata was served
    "the response is not from the hub": ("login", "/", "well"),
    "no response after 2 s": ("hangs", "/", "well"),
    "download timed out after 5 s": ("hangs", "resolve", "well"),  # after the first response
    "the connection was lost": ("well", "/", "truncates"),
    "no response after 2 s (storage)": ("well", "/", "hangs"),
    "the content has changed, sha256": ("other", "/", "well"),
    "karpathy/tiny_shakespeare has no text column 'text'": ("columns", "/", "well"),
}


def prepare_without_hub(folder: Path, reason: str) -> tuple[int, int, str]:
    """Prepare Shakespeare while the hub fails; then prepare it again without any network."""
    behavior, path_filter, cdn = HUB_FAILURES[reason]
    repositories = make_shakespeare_repos(SMALL_TEXT[::-1] if behavior == "other" else SMALL_TEXT)
    if behavior == "columns":
        repositories["karpathy/tiny_shakespeare"].push(
            "main", {"t.parquet": to_parquet("ab", "line")}
        )
    hub, github = Hub(repositories, behavior, path_filter, cdn), GitHub(SMALL_TEXT)
    with run_offline_machine(folder, hub, github) as client:
        # huggingface_hub retries metadata requests for a minute each; only the deadline ends that.
        deadline = "5" if path_filter == "resolve" else "60"
        code, _, err = client.run("prepare", "shakespeare", DEADLINE=deadline)
        client.hub = client.github = REFUSED_ADDRESS
        repeat_code, _, _ = client.run("prepare", "shakespeare", "--name", "again")
    assert len(github.requests) == 1
    assert sum("tiny_shakespeare" in line for line in hub.requests) < 30
    assert (
        client.read_splits("again") == client.read_splits() == (SMALL_TEXT[:900], SMALL_TEXT[900:])
    )
    return code, repeat_code, err


@pytest.fixture(scope="module")
def fetches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[tuple[int, int, str]]]:
    """All preparations in parallel, since they mostly wait."""
    with ThreadPoolExecutor(4) as executor:
        return {
            reason: executor.submit(prepare_without_hub, tmp_path_factory.mktemp("machine"), reason)
            for reason in HUB_FAILURES
        }


@pytest.mark.parametrize("reason", HUB_FAILURES)
def test_shakespeare_comes_from_its_mirror_if_the_hub_fails(
    fetches: dict[str, Future[tuple[int, int, str]]], reason: str
) -> None:
    code, repeat_code, err = fetches[reason].result()
    assert code == repeat_code == 0, err
    assert f"the Hugging Face hub: {reason.partition(' (')[0]}" in err
    assert "; downloading the same dataset from 127.0.0.1" in err


def test_hub_and_mirror_give_the_same_dataset(tmp_path: Path) -> None:
    with run_offline_machine(tmp_path / "a", Hub(make_shakespeare_repos(SMALL_TEXT))) as first:
        first.run("prepare", "shakespeare")
    with run_offline_machine(tmp_path / "b", Hub({}), GitHub(SMALL_TEXT)) as second:
        second.run("prepare", "shakespeare")
    from_hub, from_mirror = (
        open_dataset(machine_run.folder / "data" / "shakespeare") for machine_run in (first, second)
    )
    assert from_hub.meta.fingerprint == from_mirror.meta.fingerprint
    assert {
        key: value for key, value in from_hub.meta.origin.items() if key != "revision"
    } == from_mirror.meta.origin
    assert len(from_hub.meta.origin["revision"]) == 40


MIRROR_FAILURES = {
    "HTTP status 404": "404",
    "the content has changed, sha256": "other",
    "no response after 2 s": "hangs",
    "connection failed": "nowhere",
}


@pytest.mark.parametrize("reason", MIRROR_FAILURES)
def test_if_hub_and_mirror_fail_both_reasons_are_shown(tmp_path: Path, reason: str) -> None:
    behavior = MIRROR_FAILURES[reason]
    github = GitHub("fgh" if behavior == "other" else SMALL_TEXT, behavior)
    with run_offline_machine(
        tmp_path, Hub(make_shakespeare_repos(SMALL_TEXT), "500"), github
    ) as client:
        if behavior == "nowhere":
            client.github = REFUSED_ADDRESS
        code, out, err = client.run("prepare", "shakespeare")
    assert (code, out) == (2, "")
    reasons = f"the Hugging Face hub: HTTP status 500; 127.0.0.1: {reason}"
    assert f"mlxgpt: karpathy/tiny_shakespeare could not be downloaded ({reasons}" in err
    assert "--source synthetic" in err.splitlines()[-1]
    assert not (client.folder / "data").exists()


def test_without_either_tier_1_trains_on_synthetic_stories_and_logs_it(tmp_path: Path) -> None:
    with run_offline_machine(tmp_path, Hub(make_shakespeare_repos(SMALL_TEXT), "500")) as client:
        flags = "--n-layer 1 --n-embd 4 --max-steps 2 --sample-tokens 0 --warmup-steps 0"
        code, _, err = client.run("train", "--tier", "1", *flags.split())
        assert code == 0, err
        assert err.count("refused); using the built-in dataset") == 2
        assert {path.name for path in (client.folder / "data").iterdir()} == {"synthetic"}
        # An explicit request for Shakespeare fails instead.
        code, out, err = client.run("train", "--tier", "1", "--source", "shakespeare")
        assert (code, out) == (2, "")
        assert "karpathy/tiny_shakespeare could not be downloaded" in err


def test_truncated_mirror_download_is_repeated(tmp_path: Path) -> None:
    github = GitHub(SMALL_TEXT, "breaks")
    with run_offline_machine(tmp_path, Hub({}), github) as client:
        code, _, err = client.run("prepare", "shakespeare")
        assert code == 0, err
        assert client.read_splits() == (SMALL_TEXT[:900], SMALL_TEXT[900:])
    assert len(github.requests) == 2


def test_proxy_is_used(tmp_path: Path) -> None:
    github = GitHub(SMALL_TEXT)
    with run_offline_machine(tmp_path, Hub({}), github) as client:
        client.github = f"http://raw.example{GitHub.path}"
        code, _, err = client.run(
            "prepare", "shakespeare", HTTP_PROXY=github.address, NO_PROXY="127.0.0.1"
        )
        assert code == 0, err
        assert client.read_splits() == (SMALL_TEXT[:900], SMALL_TEXT[900:])
    assert github.requests == [f"GET http://raw.example{GitHub.path}"]


def test_missing_network_fails_without_waiting(tmp_path: Path) -> None:
    client = OfflineMachine(tmp_path, REFUSED_ADDRESS)
    code, _, err = client.run("prepare", "shakespeare")
    assert code == 2
    no_connection = f"connection failed: [Errno {errno.ECONNREFUSED}] Connection refused"
    assert f"(the Hugging Face hub: {no_connection}; 127.0.0.1: {no_connection})" in err
    assert "check the connection" in err.splitlines()[-1]
    assert "no answer yet" not in err
    code, _, err = client.run("prepare", "shakespeare", HF_HUB_OFFLINE="1")
    assert code == 2
    assert "the Hugging Face hub: HF_HUB_OFFLINE is set" in err
