"""A machine with an empty cache that reaches only fake servers (fake_hub.py). `datasets`,
`huggingface_hub` and everything below them are real.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxgpt.data.dataset import open_dataset
from tests.helpers.commands import ROOT
from tests.helpers.fake_hub import GitHub, Hub, run_servers

REFUSED_ADDRESS = "http://127.0.0.1:9"  # a port that refuses connections
SMALL_TEXT = "abc" * 300 + "de" * 25 + "fg" * 25  # 900 characters for training, 100 for validation
# mlxgpt, except for the small text's hash and length, and GitHub's address.
PROGRAM_CODE = """
import os, signal, sys
from dataclasses import replace
from mlxgpt.cli import main as cli
from mlxgpt.data import http
from mlxgpt.data.hub import HUB_DATASETS, Mirror
http.MIRROR_TIMEOUT_SECONDS = float(os.environ.get("DEADLINE", http.MIRROR_TIMEOUT_SECONDS))
if "CHUNK" in os.environ:
    from huggingface_hub import constants
    constants.DOWNLOAD_CHUNK_SIZE = int(os.environ["CHUNK"])  # what a broken download keeps
signal.signal(signal.SIGINT, signal.default_int_handler)  # also if the tests run in the background
digest, github, *arguments = sys.argv[1:]
HUB_DATASETS["shakespeare"] = replace(
    HUB_DATASETS["shakespeare"], sha256=digest, mirror=Mirror(github, 900)
)
sys.exit(cli.main(arguments))
"""


class OfflineMachine:
    """A simulated machine; `folder` contains everything that the program writes."""

    def __init__(
        self, folder: Path, hub: str, github: str = REFUSED_ADDRESS, digest: str = ""
    ) -> None:
        self.folder, self.hub, self.github = folder, hub, github
        self.digest = digest or hashlib.sha256(SMALL_TEXT.encode()).hexdigest()
        folder.mkdir(exist_ok=True)

    def start(
        self, *args: str, program: tuple[str, ...] = (), **environment: str
    ) -> subprocess.Popen[str]:
        program_args = ("-c", PROGRAM_CODE, self.digest, self.github)
        return subprocess.Popen(
            [sys.executable, *(program or program_args), *args],
            env={
                **{
                    key: value
                    for key, value in os.environ.items()
                    if not key.startswith(("HF_", "MLXGPT"))
                },
                "HF_ENDPOINT": self.hub,
                "HF_HOME": str(self.folder / "huggingface"),
                "HF_HUB_DOWNLOAD_TIMEOUT": "2",
                "HF_HUB_ETAG_TIMEOUT": "2",
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
        self, *args: str, program: tuple[str, ...] = (), **environment: str
    ) -> tuple[int, str, str]:
        process = self.start(*args, program=program, **environment)
        out, err = process.communicate()
        assert "Traceback" not in err
        return process.returncode, out, err

    def read_splits(self, name: str = "shakespeare") -> tuple[str, str]:
        """Return both splits of a single-document dataset."""
        dataset = open_dataset(self.folder / "data" / name)
        decode = dataset.tokenizer.decode
        return decode(dataset.train.ids), decode(dataset.val.ids)


@contextmanager
def run_offline_machine(
    folder: Path, hub: Hub, github: GitHub | None = None
) -> Iterator[OfflineMachine]:
    """Run these servers and a machine that reaches only them."""
    with run_servers(hub, *([github] if github else [])):
        address = github.address + GitHub.path if github else REFUSED_ADDRESS
        yield OfflineMachine(folder, hub.address, address)
