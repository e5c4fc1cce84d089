"""Shakespeare from the hub and from what stands in for it, from an empty cache to token arrays."""

from __future__ import annotations

import errno
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mlxgpt.data.dataset import open_dataset
from tests.helpers.fake_hub import GitHub, Hub, Repository, parquet, shakespeare, splits
from tests.helpers.offline_machine import NOWHERE, TEXT, Machine, machine


@pytest.fixture(scope="module")
def shakespeare_text(real_texts: Path) -> str:
    return (real_texts / "shakespeare" / "input.txt").read_bytes().decode()


# Shakespeare from the hub.


def test_shakespeare_comes_from_the_hub_and_then_from_its_cache(tmp_path: Path) -> None:
    hub = Hub(shakespeare(TEXT))
    with machine(tmp_path, hub) as here:
        code, out, err = here.run("prepare", "shakespeare")
        assert code == 0, err
        assert "900 training tokens, 100 validation tokens, vocabulary 7" in out
        begun = "downloading karpathy/tiny_shakespeare (1 MB of text) from the Hugging Face hub"
        assert begun in err
        assert here.text() == (TEXT[:900], TEXT[900:])
        asked = len(hub.asked)
        code, out, err = here.run("prepare", "shakespeare", "--name", "again")
        assert code == 0, err
        assert len(hub.asked) == asked, "the cache is used without asking"
        assert "downloading" not in err
    assert not any("tiny_shakespeare.py" in asked for asked in hub.cdn.asked)


def test_shakespeare_may_be_converted_on_its_main_branch_one_day(tmp_path: Path) -> None:
    files = {f"data/{s}-00000-of-00001.parquet": parquet([t]) for s, t in splits(TEXT).items()}
    hub = Hub({"karpathy/tiny_shakespeare": Repository({"main": files})})
    with machine(tmp_path, hub) as here:
        code, _, err = here.run("prepare", "shakespeare")
        assert code == 0, err
        assert here.text() == (TEXT[:900], TEXT[900:])


def test_a_slow_line_is_waited_for(tmp_path: Path) -> None:
    with machine(tmp_path, Hub(shakespeare(TEXT), "slow")) as here:
        code, _, err = here.run("prepare", "shakespeare", HF_HUB_DOWNLOAD_TIMEOUT="30")
        assert code == 0, err
        assert "the same text" not in err
        assert here.text() == (TEXT[:900], TEXT[900:])


def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    hub = Hub(shakespeare(TEXT), cdn="breaks")
    with machine(tmp_path, hub) as here:
        code, _, err = here.run("prepare", "shakespeare", CHUNK="50")
        assert code == 0, err
        assert here.text() == (TEXT[:900], TEXT[900:])
    assert hub.cdn.broken == 2
    assert hub.cdn.resumed == 2


def test_the_real_text_has_the_hash_that_is_pinned(tmp_path: Path, shakespeare_text: str) -> None:
    """With the program as it is."""
    with machine(tmp_path, Hub(shakespeare(shakespeare_text))) as here:
        code, out, err = here.run("prepare", "shakespeare", program=("-m", "mlxgpt"))
        assert code == 0, err
        assert "1,003,854 training tokens, 111,540 validation tokens, vocabulary 65" in out


# Where the hub does not give the text.

HUBS = {
    "it answered 401": ("401", "/", "well"),
    "it answered 403": ("403", "/", "well"),
    "it answered 404": ("404", "/", "well"),
    "it answered 429": ("429", "/", "well"),  # and asks to wait five minutes
    "it answered 500": ("500", "/", "well"),
    "it answered 503": ("503", "default/", "well"),  # after everything went well
    "what answers is not the hub": ("login", "/", "well"),
    "no answer in 2 s": ("hangs", "/", "well"),
    "not downloaded in 5 s": ("hangs", "resolve", "well"),  # after its first answer
    "the connection breaks off": ("well", "/", "truncates"),
    "no answer in 2 s (storage)": ("well", "/", "hangs"),
    "another text, sha256": ("other", "/", "well"),
    "karpathy/tiny_shakespeare has no column 'text' of text": ("columns", "/", "well"),
}


def fetched(folder: Path, reason: str) -> tuple[int, int, str]:
    """What comes of a preparation, and of another one later, without any network."""
    mood, at, cdn = HUBS[reason]
    repositories = shakespeare(TEXT[::-1] if mood == "other" else TEXT)
    if mood == "columns":
        repositories["karpathy/tiny_shakespeare"].push("main", {"t.parquet": parquet("ab", "line")})
    hub, github = Hub(repositories, mood, at, cdn), GitHub(TEXT)
    with machine(folder, hub, github) as here:
        # The hub's metadata has retries of a minute each: only the deadline ends these.
        deadline = "5" if at == "resolve" else "60"
        code, _, err = here.run("prepare", "shakespeare", DEADLINE=deadline)
        here.hub = here.github = NOWHERE
        again, _, _ = here.run("prepare", "shakespeare", "--name", "again")
    assert len(github.asked) == 1
    assert sum("tiny_shakespeare" in line for line in hub.asked) < 30
    assert here.text("again") == here.text() == (TEXT[:900], TEXT[900:])
    return code, again, err


@pytest.fixture(scope="module")
def fetches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[tuple[int, int, str]]]:
    """All of them at once, since they mostly wait."""
    with ThreadPoolExecutor(4) as pool:
        return {
            reason: pool.submit(fetched, tmp_path_factory.mktemp("machine"), reason)
            for reason in HUBS
        }


@pytest.mark.parametrize("reason", HUBS)
def test_shakespeare_comes_from_its_origin_where_the_hub_does_not_give_it(
    fetches: dict[str, Future[tuple[int, int, str]]], reason: str
) -> None:
    code, again, err = fetches[reason].result()
    assert code == again == 0, err
    assert f"the Hugging Face hub: {reason.partition(' (')[0]}" in err
    assert "; downloading the same text from 127.0.0.1" in err


def test_from_wherever_it_comes_the_data_is_the_same(tmp_path: Path) -> None:
    with machine(tmp_path / "a", Hub(shakespeare(TEXT))) as first:
        first.run("prepare", "shakespeare")
    with machine(tmp_path / "b", Hub({}), GitHub(TEXT)) as second:
        second.run("prepare", "shakespeare")
    one, other = (open_dataset(m.folder / "data" / "shakespeare") for m in (first, second))
    assert one.meta.fingerprint == other.meta.fingerprint
    assert {k: v for k, v in one.meta.origin.items() if k != "revision"} == other.meta.origin
    assert len(one.meta.origin["revision"]) == 40


GITHUBS = {
    "it answered 404": "404",
    "another text, sha256": "other",
    "no answer in 2 s": "hangs",
    "no connection": "nowhere",
}


@pytest.mark.parametrize("reason", GITHUBS)
def test_where_neither_gives_it_both_reasons_are_told(tmp_path: Path, reason: str) -> None:
    mood = GITHUBS[reason]
    github = GitHub("fgh" if mood == "other" else TEXT, mood)
    with machine(tmp_path, Hub(shakespeare(TEXT), "500"), github) as here:
        if mood == "nowhere":
            here.github = NOWHERE
        code, out, err = here.run("prepare", "shakespeare")
    assert (code, out) == (2, "")
    why = f"the Hugging Face hub: it answered 500; 127.0.0.1: {reason}"
    assert f"mlxgpt: karpathy/tiny_shakespeare could not be downloaded ({why}" in err
    assert "--source storybook" in err.splitlines()[-1]
    assert not (here.folder / "data").exists()


def test_without_either_tier_1_trains_on_the_storybook_and_says_so(tmp_path: Path) -> None:
    with machine(tmp_path, Hub(shakespeare(TEXT), "500")) as here:
        small = "--n-layer 1 --n-embd 4 --max-steps 2 --sample-tokens 0 --warmup-steps 0"
        code, _, err = here.run("train", "--tier", "1", *small.split())
        assert code == 0, err
        assert err.count("refused): this is the built-in storybook instead") == 2
        assert {p.name for p in (here.folder / "data").iterdir()} == {"storybook"}
        # Whoever asked for Shakespeare gets it, or an error.
        code, out, err = here.run("train", "--tier", "1", "--source", "shakespeare")
        assert (code, out) == (2, "")
        assert "karpathy/tiny_shakespeare could not be downloaded" in err


def test_a_text_of_github_that_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    github = GitHub(TEXT, "breaks")
    with machine(tmp_path, Hub({}), github) as here:
        code, _, err = here.run("prepare", "shakespeare")
        assert code == 0, err
        assert here.text() == (TEXT[:900], TEXT[900:])
    assert len(github.asked) == 2


def test_a_proxy_is_asked_where_there_is_one(tmp_path: Path) -> None:
    github = GitHub(TEXT)
    with machine(tmp_path, Hub({}), github) as here:
        here.github = f"http://raw.example{GitHub.path}"
        code, _, err = here.run(
            "prepare", "shakespeare", HTTP_PROXY=github.address, NO_PROXY="127.0.0.1"
        )
        assert code == 0, err
        assert here.text() == (TEXT[:900], TEXT[900:])
    assert github.asked == [f"GET http://raw.example{GitHub.path}"]


def test_a_network_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    here = Machine(tmp_path, NOWHERE)
    code, _, err = here.run("prepare", "shakespeare")
    assert code == 2
    refused = f"no connection, [Errno {errno.ECONNREFUSED}] Connection refused"
    assert f"(the Hugging Face hub: {refused}; 127.0.0.1: {refused})" in err
    assert "check the connection" in err.splitlines()[-1]
    assert "no answer yet" not in err
    code, _, err = here.run("prepare", "shakespeare", HF_HUB_OFFLINE="1")
    assert code == 2
    assert "the Hugging Face hub: HF_HUB_OFFLINE is set" in err
