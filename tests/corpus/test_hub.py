"""The hub, played by a server of our own; `datasets` and everything below it are real."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlxgpt.corpus.tokens import open_dataset
from tests.corpus.texts import sides

Splits = dict[str, list[str]]  # the documents of each

SHAKESPEARE = {"train": ["abc" * 300], "validation": ["de"], "test": ["fg"]}
PINNED = hashlib.sha256(
    "".join(text for texts in SHAKESPEARE.values() for text in texts).encode()
).hexdigest()
STORIES = {
    "train": [f"Once upon a time, there were {n} cats.\n" for n in range(300)],
    # Two of them are known to the training side, one of these with other newlines.
    "validation": [f"Once upon a time, there were {n} cats." for n in (7, 8, 300, 301)],
}
COMMIT = "a" * 40
# The program as it is, but for the hash of our small text.
PROGRAM = """
import sys
from dataclasses import replace
from mlxgpt import cli
from mlxgpt.corpus.hub import HUB
HUB["shakespeare"] = replace(HUB["shakespeare"], sha256=sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""


def repository(splits: Splits) -> dict[str, bytes]:
    """The files of a dataset, as Tiny Shakespeare and TinyStories are on the hub."""
    import pyarrow
    import pyarrow.parquet

    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    files = {}
    for split, texts in splits.items():
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)
        files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        card += [f"  - split: {split}", f"    path: data/{split}-*"]
    return {"README.md": "\n".join([*card, "---", ""]).encode(), **files}


class Hub(ThreadingHTTPServer):
    """A hub in one of several moods: `well`, `hangs`, `truncates`, or a number: that status."""

    daemon_threads = True

    def __init__(self, mood: str, splits: Splits) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mood = mood
        self.files = repository(splits)
        self.asked: list[str] = []
        self.over = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(path)
        if hub.mood == "hangs":
            hub.over.wait()
            return
        if hub.mood.isdecimal():
            self.answer(b"", status=int(hub.mood))
        elif "/resolve/" in path:
            file = path.split("/resolve/")[1].split("/", 1)[1]
            content = hub.files.get(file)
            if content is None:
                self.answer(b"", {"X-Error-Code": "EntryNotFound"}, status=404)
                return
            tag = hashlib.sha1(content).hexdigest()
            cut = hub.mood == "truncates" and file.endswith(".parquet")
            self.answer(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}, cut=cut)
        elif "/tree/" in path:
            folder = path.split("/tree/")[1].partition("/")[2]
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"}
                for name, content in hub.files.items()
                if name.startswith(folder)
            ]
            tree += [{"type": "directory", "path": "data", "size": 0, "oid": "0"}][: not folder]
            self.answer(json.dumps(tree).encode())
        else:
            name = "/".join(path.split("/api/datasets/")[1].split("/")[:2])
            about = {"id": name, "sha": COMMIT, "siblings": [], "tags": []}
            self.answer(json.dumps(about).encode())

    def answer(
        self,
        content: bytes,
        headers: dict[str, str] | None = None,
        *,
        status: int = 200,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = cut

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None: ...


@contextmanager
def hub_that(mood: str, splits: Splits = SHAKESPEARE) -> Iterator[Hub]:
    hub = Hub(mood, splits)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        hub.shutdown()
        hub.server_close()


def start(address: str, folder: Path, *arguments: str, pinned: str = PINNED) -> subprocess.Popen:
    """The program, its hub at an address, in a folder that is home to everything it writes."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "huggingface"),
        "MLXGPT_HOME": str(folder),
        "NO_PROXY": "*",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, pinned, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def test_a_text_comes_from_the_hub_and_then_from_its_cache(tmp_path: Path) -> None:
    with hub_that("well") as hub:
        program = start(address(hub), tmp_path, "prepare", "shakespeare")
        out, err = program.communicate()
        assert program.returncode == 0, err
        assert "900 tokens to train on, 4 to judge by, vocabulary 7" in out
        assert "getting karpathy/tiny_shakespeare (1 MB of text) from the Hugging Face hub" in err
        asked = len(hub.asked)
        again = start(address(hub), tmp_path, "prepare", "shakespeare", "--name", "again")
        out, err = again.communicate()
        assert again.returncode == 0, err
        assert len(hub.asked) == asked, "the cache is used without asking"
    assert (tmp_path / "data" / "again" / "train.bin").stat().st_size == 1800


def test_stories_of_the_hub_become_a_bpe_and_none_that_judges_is_learnt(tmp_path: Path) -> None:
    line = ("prepare", "tinystories", "--vocab-size", "300")
    with hub_that("well", STORIES) as hub:
        program = start(address(hub), tmp_path, *line)
        out, err = program.communicate()
        assert program.returncode == 0, err
        assert "getting roneneldan/TinyStories (1,900 MB of text) from" in err
        assert "vocabulary 300" in out
    dataset = open_dataset(tmp_path / "data" / "tinystories-bpe300")
    train, val = sides(dataset)
    assert val == STORIES["validation"]
    assert train == [s.strip() for s in STORIES["train"] if s.strip() not in val]
    assert len(train) == 298
    # What is prepared needs no hub; and it is not taken for another tokenizer's.
    again = start("http://127.0.0.1:9", tmp_path, *line)
    other = start("http://127.0.0.1:9", tmp_path, *line[:2], "--name", "tinystories-bpe300")
    assert again.communicate()[0] == out
    assert "or with another tokenizer" in other.communicate()[1]
    assert (again.returncode, other.returncode) == (0, 2)


def test_another_text_under_the_same_name_is_refused(tmp_path: Path) -> None:
    with hub_that("well") as hub:
        program = start(address(hub), tmp_path, "prepare", "shakespeare", pinned="0" * 64)
        _, err = program.communicate()
    assert program.returncode == 2
    assert "on the hub is not the text it was" in err
    assert not (tmp_path / "data").exists()


def test_a_hub_with_errors_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """An HTTP error is an error, for Tier 1 too: there is a connection."""
    moods = {
        "404": "it answered 404",
        "500": "it answered 500",
        "401": "it answered 401",
        "truncates": "cannot get karpathy/tiny_shakespeare from the Hugging Face hub: ",
    }
    with (
        hub_that("404") as a,
        hub_that("500") as b,
        hub_that("401") as c,
        hub_that("truncates") as d,
    ):
        programs = [
            # All at once, since the library tries again and again, for half a minute.
            start(address(hub), tmp_path / hub.mood, "train", "--tier", "1")
            for hub in (a, b, c, d)
        ]
        for program, (mood, problem) in zip(programs, moods.items(), strict=True):
            out, err = program.communicate()
            assert program.returncode == 2, (mood, err)
            assert problem in err
            assert "Traceback" not in err
            assert out == ""
            assert not (tmp_path / mood / "data").exists()


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path, how: str) -> None:
    with hub_that("hangs") as hub:
        place = address(hub) if how == "hangs" else "http://127.0.0.1:9"
        program = start(place, tmp_path, "prepare", "shakespeare")
        out, err = program.communicate()
        assert len(hub.asked) == (how == "hangs"), "asked once, without any further try"
    assert program.returncode == 2
    assert "cannot be reached" in err.splitlines()[-2]
    assert "--source FILE" in err.splitlines()[-1]
    assert "--source storybook" in err.splitlines()[-1]
    assert out == ""
    assert not (tmp_path / "data").exists()


def test_a_download_that_was_cut_off_is_never_taken_for_whole(tmp_path: Path) -> None:
    """After a download that failed, the next one starts from what is really there."""
    with hub_that("truncates") as hub:
        start(address(hub), tmp_path, "prepare", "shakespeare").communicate()
    with hub_that("well") as hub:
        program = start(address(hub), tmp_path, "prepare", "shakespeare")
        out, err = program.communicate()
    assert program.returncode == 0, err
    assert "900 tokens" in out
