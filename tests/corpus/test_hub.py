"""The hub and what stands in for it, from an empty cache to token arrays: `datasets`,
`huggingface_hub` and everything below them are real; the servers are ours (hub.py).
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxgpt.corpus.dataset import open_dataset
from mlxgpt.corpus.hub import HUB
from tests.commands import ROOT
from tests.corpus.hub import (
    CONVERTED,
    Files,
    GitHub,
    Hub,
    Repository,
    parquet,
    running,
    shakespeare,
    splits,
)
from tests.corpus.texts import sides

NOWHERE = "http://127.0.0.1:9"  # a port that refuses
TEXT = "abc" * 300 + "de" * 25 + "fg" * 25  # 900 characters for training, 100 for validation
# The program as it is, but for the hash and the length of our small text, and GitHub's address.
PROGRAM = """
import os, signal, sys
from dataclasses import replace
from mlxgpt import cli
from mlxgpt.corpus.hub import HUB, Elsewhere
if "CHUNK" in os.environ:
    from huggingface_hub import constants
    constants.DOWNLOAD_CHUNK_SIZE = int(os.environ["CHUNK"])  # what is kept of a broken download
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in background
digest, github, *arguments = sys.argv[1:]
HUB["shakespeare"] = replace(HUB["shakespeare"], sha256=digest, elsewhere=Elsewhere(github, 900))
sys.exit(cli.main(arguments))
"""
STORIES = [f"Once upon a time, there were {n} cats.\n" for n in range(300)]
# Two of them are known to the training side, one of these with other newlines.
VALIDATING = [f"Once upon a time, there were {n} cats." for n in (7, 8, 300, 301)]


def tinystories() -> dict[str, Repository]:
    """The hub with TinyStories as it lies there."""
    files = {
        "README.md": b"---\nlicense: cdla-sharing-1.0\ntask_categories:\n- text-generation\n---\n",
        "Evaluation prompts.yaml": b"- Once upon a time",
        "MLP_input_output.npy": b"numbers",
        "TinyStories-train.txt": b"stories of GPT-3.5",
        "TinyStoriesV2-GPT4-train.txt": b"stories of GPT-4",
        "TinyStories_all_data.tar.gz": b"everything",
        "data/train-00000-of-00002-2d5a1467fff1081b.parquet": parquet(STORIES[:100]),
        "data/train-00001-of-00002-5852b56a2bd28fd9.parquet": parquet(STORIES[100:]),
        "data/validation-00000-of-00001-869c898b519ad725.parquet": parquet(VALIDATING),
    }
    return {"roneneldan/TinyStories": Repository({"main": files})}


class Machine:
    """Somebody's machine: a folder that is home to everything the program writes."""

    def __init__(self, folder: Path, hub: str, github: str = NOWHERE, digest: str = "") -> None:
        self.folder, self.hub, self.github = folder, hub, github
        self.digest = digest or hashlib.sha256(TEXT.encode()).hexdigest()
        folder.mkdir(exist_ok=True)

    def start(
        self, *arguments: str, program: tuple[str, ...] = (), **environment: str
    ) -> subprocess.Popen[str]:
        ours = ("-c", PROGRAM, self.digest, self.github)
        return subprocess.Popen(
            [sys.executable, *(program or ours), *arguments],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MLXGPT"))},
                "HF_ENDPOINT": self.hub,
                "HF_HOME": str(self.folder / "huggingface"),
                "HF_HUB_DOWNLOAD_TIMEOUT": "2",
                "NO_PROXY": "*",
                "PYTHONPATH": str(ROOT),
                **environment,
            },
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, *arguments: str, program: tuple[str, ...] = (), **environment: str
    ) -> tuple[int, str, str]:
        process = self.start(*arguments, program=program, **environment)
        out, err = process.communicate()
        assert "Traceback" not in err
        return process.returncode, out, err

    def text(self, name: str = "shakespeare") -> tuple[str, str]:
        """Both sides of a single document."""
        dataset = open_dataset(self.folder / "data" / name)
        decode = dataset.tokenizer.decode
        return decode(dataset.train.ids), decode(dataset.val.ids)


@contextmanager
def machine(folder: Path, hub: Hub, github: GitHub | None = None) -> Iterator[Machine]:
    """A machine that reaches these servers."""
    with running(hub, *([github] if github else [])):
        address = github.address + GitHub.path if github else NOWHERE
        yield Machine(folder, hub.address, address)


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
        assert "getting karpathy/tiny_shakespeare (1 MB of text) from the Hugging Face hub" in err
        assert here.text() == (TEXT[:900], TEXT[900:])
        asked = len(hub.asked)
        code, out, err = here.run("prepare", "shakespeare", "--name", "again")
        assert code == 0, err
        assert len(hub.asked) == asked, "the cache is used without asking"
        assert "getting" not in err
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
        assert "no answer yet; waiting up to 30 s for one" in err
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
    "no answer in 2 s (later)": ("hangs", "resolve", "well"),  # after its first answer
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
        code, _, err = here.run("prepare", "shakespeare")
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
    assert "; getting the same text from 127.0.0.1" in err


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
    why = "mlxgpt: karpathy/tiny_shakespeare cannot be had (the Hugging Face hub: it answered 500; "
    assert f"{why}127.0.0.1: {reason}" in err
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
        assert "karpathy/tiny_shakespeare cannot be had" in err


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


# Stories.


def test_stories_of_the_hub_become_a_bpe_and_none_is_in_both_splits(tmp_path: Path) -> None:
    line = ("prepare", "tinystories", "--vocab-size", "300")
    with machine(tmp_path, Hub(tinystories())) as here:
        code, out, err = here.run(*line)
        assert code == 0, err
        assert "getting roneneldan/TinyStories (1,900 MB of text) from" in err
        assert "vocabulary 300" in out
        train, val = sides(open_dataset(tmp_path / "data" / "tinystories-bpe300"))
        assert val == VALIDATING
        assert train == [s.strip() for s in STORIES if s.strip() not in val]
        assert len(train) == 298
        # What is prepared needs no hub; and it is not taken for another tokenizer's.
        here.hub = NOWHERE
        assert here.run(*line)[:2] == (0, out)
        code, _, err = here.run(*line[:2], "--name", "tinystories-bpe300")
        assert code == 2
        assert "or with another tokenizer" in err


def test_both_sides_are_of_the_same_commit(tmp_path: Path) -> None:
    """The hub's dataset changes while it is fetched."""
    hub = Hub(tinystories(), "moves")
    with machine(tmp_path, hub) as here:
        code, _, err = here.run("prepare", "tinystories", "--vocab-size", "300")
        assert code == 0, err
    train, val = sides(open_dataset(tmp_path / "data" / "tinystories-bpe300"))
    assert len({story.partition("commit")[2] for story in train + val}) == 1
    assert (len(train), len(val)) == (300, 150)
    assert len(hub.repositories["roneneldan/TinyStories"].commits) > 1


def test_where_xet_fails_files_come_without_it(tmp_path: Path) -> None:
    hub = Hub(tinystories(), "xet")
    with machine(tmp_path, hub) as here:
        code, _, err = here.run(
            "prepare", "tinystories", "--vocab-size", "300", HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1"
        )
        assert code == 0, err
        assert "the hub's Xet storage failed (RuntimeError: " in err
        assert "; once more without it" in err
        assert sides(open_dataset(tmp_path / "data" / "tinystories-bpe300"))[1] == VALIDATING
    assert any("/reconstructions/" in line for line in hub.cdn.asked), "it was tried"


def test_small_texts_do_not_go_through_xet(tmp_path: Path) -> None:
    hub = Hub(shakespeare(TEXT), "xet")
    with machine(tmp_path, hub) as here:
        assert here.run("prepare", "shakespeare")[0] == 0
    assert not any("xet-read-token" in line for line in hub.asked)


def test_validation_rows_are_not_trained_on_though_there_is_one_split(tmp_path: Path) -> None:
    """As the card of tinystories-gpt4-clean says: 10,000 rows to test, 10,000 to validate."""
    stories = [f"Story {n}." for n in range(20_250)]
    files = {"README.md": b"# Clean\n", "tinystories_gpt4_clean.parquet": parquet(stories)}
    hub = Hub({"karpathy/tinystories-gpt4-clean": Repository({"main": files})})
    with machine(tmp_path, hub) as here:
        code, _, err = here.run("prepare", "tinystories-gpt4", "--vocab-size", "260")
        assert code == 0, err
    train, val = sides(open_dataset(tmp_path / "data" / "tinystories-gpt4-bpe260"))
    assert train == stories[20_000:]
    assert val == stories[10_000:20_000]


def test_openwebtext_keeps_some_of_its_pages_to_judge_by(tmp_path: Path) -> None:
    pages = [f"Page {n} of the web." for n in range(400)]
    files = {
        f"data/train-{n:05}-of-00004.parquet": parquet(pages[100 * n : 100 * n + 100])
        for n in range(4)
    }
    hub = Hub({"vietgpt/openwebtext_en": Repository({"main": files})})
    with machine(tmp_path, hub) as here:
        code, _, err = here.run("prepare", "openwebtext", "--vocab-size", "270")
        assert code == 0, err
    train, val = sides(open_dataset(tmp_path / "data" / "openwebtext-bpe270"))
    assert sorted(train + val) == sorted(pages)
    assert 0 < len(val) < 40


def test_a_rate_limit_is_waited_for_where_there_is_no_other_place(tmp_path: Path) -> None:
    with machine(tmp_path, Hub(tinystories(), "429")) as here:
        process = here.start("prepare", "tinystories")
        assert process.stderr
        for line in process.stderr:
            if "asks to wait 300 s" in line:
                break
        assert "hf auth login" in line
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert process.returncode == 130
        assert "Traceback" not in err


# Any dataset.

FABLES = [f"A fox and {n} grapes." for n in range(120)]


def fables(column: str = "text", *splits: str) -> Repository:
    texts = {name: FABLES[n::2] for n, name in enumerate(splits or ("train", "validation"))}
    files = {f"{name}.parquet": parquet(part, column) for name, part in texts.items()}
    return Repository({"main": {"README.md": b"# Fables\n", **files}})


def test_any_dataset_of_the_hub_can_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "aesop" / "fables").mkdir(parents=True)  # a folder here is not meant
    with machine(tmp_path, Hub({"aesop/fables": fables("fable")})) as here:
        line = ("prepare", "hf:aesop/fables:fable", "--vocab-size", "280")
        code, out, err = here.run(*line)
        assert code == 0, err
        dataset = open_dataset(tmp_path / "data" / "aesop-fables-fable-bpe280")
        assert sides(dataset) == (FABLES[::2], FABLES[1::2])
        assert dataset.meta.origin["hub"] == "aesop/fables"
        assert dataset.meta.origin["column"] == "fable"
        here.hub = NOWHERE
        assert here.run(*line)[:2] == (0, out)


def test_a_dataset_without_a_split_to_judge_by_shares_out_what_it_has(tmp_path: Path) -> None:
    with machine(tmp_path, Hub({"aesop/fables": fables("text", "all")})) as here:
        code, _, err = here.run("prepare", "hf:aesop/fables", "--tokenizer", "char")
        assert code == 0, err
    train, val = sides(open_dataset(tmp_path / "data" / "aesop-fables"))
    assert sorted(train + val) == sorted(FABLES[::2])


def test_a_dataset_whose_script_was_converted_can_be_trained_on(tmp_path: Path) -> None:
    converted = {f"default/{s}/0000.parquet": parquet(FABLES) for s in ("train",)}
    repository = Repository({"main": {"fables.py": b"import os"}, CONVERTED: converted})
    with machine(tmp_path, Hub({"aesop/fables": repository})) as here:
        assert here.run("prepare", "hf:aesop/fables", "--tokenizer", "char")[0] == 0


REFUSED = {
    "hf:aesop/fables:title": "aesop/fables has no column 'title' of text; there is: text",
    "hf:aesop/numbers": "aesop/numbers has no column 'text' of text; there is: none",
    "hf:aesop/parts": "aesop/parts has no split 'train'; there is: one, two",
    "hf:aesop/nothing": "aesop/nothing cannot be had (the Hugging Face hub: it answered 401)",
    "hf:aesop/gated": "aesop/gated cannot be had (the Hugging Face hub: there is no such "
    "dataset, or it is private or gated)",
    "hf:aesop/many": "aesop/many cannot be had (the Hugging Face hub: ValueError: Config name is "
    "missing. Please pick one among the available configs: ['greek', 'latin']",
    "hf:fables": "'hf:fables' is no dataset's name",
}


def card(*lines: str) -> Files:
    """A dataset's card, with these lines at its head."""
    return {"README.md": "\n".join(["---", "configs:", *lines, "---", ""]).encode()}


def test_what_cannot_be_trained_on_is_named(tmp_path: Path) -> None:
    numbers = Repository({"main": {"train.parquet": parquet(range(3), "number")}})
    parts = fables("text", "one", "two")
    (files,) = parts.commits.values()
    splits = [f"  - {{split: {name}, path: {name}.parquet}}" for name in ("one", "two")]
    parts.push("main", files | card("- config_name: default", "  data_files:", *splits))
    configs = [
        f"- {{config_name: {name}, data_files: {path}.parquet}}"
        for name, path in (("greek", "one"), ("latin", "two"))
    ]
    many = Repository({"main": files | card(*configs)})
    gated = Repository({"main": {}}, gated=True)
    hub = Hub(
        {
            "aesop/fables": fables(),
            "aesop/numbers": numbers,
            "aesop/parts": parts,
            "aesop/gated": gated,
            "aesop/many": many,
        }
    )
    with machine(tmp_path, hub) as here:
        for source, problem in REFUSED.items():
            code, out, err = here.run("prepare", source)
            assert code == 2, source
            assert out == ""
            assert f"mlxgpt: {problem}" in err
            assert len(err.splitlines()[-1]) > 20
            assert ("hf auth login" in err) == (source in ("hf:aesop/nothing", "hf:aesop/gated"))
    assert not (tmp_path / "data").exists()


def test_the_table_of_texts_is_what_the_stand_ins_are() -> None:
    assert HUB["shakespeare"].path in shakespeare(TEXT)
    assert HUB["tinystories"].path in tinystories()
    assert {text.path for text in HUB.values()} == {
        "karpathy/tiny_shakespeare",
        "roneneldan/TinyStories",
        "karpathy/tinystories-gpt4-clean",
        "vietgpt/openwebtext_en",
    }
