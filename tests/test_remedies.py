"""Whichever file operation fails, the message names the file, and errno selects the remedy."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt.backend import safetensors_io
from mlxgpt.cli import main as cli
from mlxgpt.data import hub
from mlxgpt.data.tokenizers import bpe
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import Capture
from tests.helpers.external_models import write_gpt2_folder
from tests.helpers.faulty_disk import FaultyDisk

ERRNOS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE, errno.EROFS)

# Command, and the file that cannot be opened.
READ_CASES = {
    "prepare": ("prepare words.txt --name other", "words.txt"),
    "config": ("train --config my.toml", "my.toml"),
    "prompts": ("generate --prompts prompts.txt", "prompts.txt"),
    "hellaswag": ("eval --hellaswag mine.jsonl", "mine.jsonl"),
    "data": ("eval", "data/words/meta.json"),
    "array": ("eval", "data/words/tokenizer.json"),
    "report of a benchmark": ("report mine.json", "mine.json"),
    "report": ("report mine.json", "mine.json"),
    "import, config": ("import small", "small/config.json"),
    "import, tokenizer": ("import small", "small/tokenizer.json"),
    "import, weights": ("import small", "small/model.safetensors"),
}
WRITE_CASES = {
    "prepare": ("prepare words.txt --name other", "data/.other.new/train.bin"),
    "lock": ("prepare words.txt --name other", "data/.other.lock"),
    "report": ("report --output page.html", ".page.html.new"),
    "export": ("export --to hf", "config.json"),
}


@pytest.fixture
def sources(place: Path) -> Path:
    for name in ("prompts.txt", "my.toml", "mine.json", "mine.jsonl"):
        Path(name).write_text("{}")
    write_gpt2_folder(place / "small")
    return place


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", ["reading", "writing"])
def test_error_names_the_file_and_errno_selects_the_remedy(
    sources: Path, kind: str, number: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = READ_CASES if kind == "reading" else WRITE_CASES
    for case, (line, name) in table.items():
        with monkeypatch.context() as patch:
            patch.setattr(io, "open", failing_open(io.open, name, number))
            patch.setattr(os, "open", failing_open(os.open, name, number))
            patch.setattr(safetensors_io, "ErrorRecordingFile", failing_read(name, number))
            capsys.readouterr()
            assert cli.main(line.split()) == 2, case
        problem, remedy = capsys.readouterr().err.splitlines()[-2:]
        assert Path(name).name.removeprefix(".").removesuffix(".new") in problem, case
        assert os.strerror(number) in problem, case
        assert remedy == f"  → {files.REMEDIES[number]}", case
    assert not list(sources.glob("exports/*"))
    shutil.rmtree(sources / "runs" / "small", ignore_errors=True)


def failing_open(original: Callable[..., Any], name: str, number: int) -> Callable[..., Any]:
    """Wrap `open` so that it fails for one file."""

    def open_or_fail(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(name) or f".{name}.new" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **options)

    return open_or_fail


def failing_read(name: str, number: int) -> type[safetensors_io.ErrorRecordingFile]:
    """Return a file class whose reads fail for the file of this name."""

    class Failing(safetensors_io.ErrorRecordingFile):
        def readinto(self, buffer: Any) -> int | None:
            if str(self.name).endswith(name):
                self.error = OSError(number, os.strerror(number))
                raise self.error
            return super().readinto(buffer)

    return Failing


def test_damaged_weights_are_not_reported_as_a_disk_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors_io.save_arrays(path, {"x": mx.arange(500)}, {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RuntimeError, match=r"safetensors|read"):
        safetensors_io.load_arrays(path)


@pytest.mark.parametrize("operation", ["open", "write"])
def test_failed_write_of_weights_raises_the_disk_error(tmp_path: Path, operation: str) -> None:
    disk = FaultyDisk(tmp_path, errno.ENOSPC)
    with (
        disk.watching(fail_at=["open", "write"].index(operation)),
        pytest.raises(OSError, match=r"a\.safetensors") as error,
    ):
        safetensors_io.save_arrays(tmp_path / "a.safetensors", {"x": mx.arange(5)}, {})
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_disk_error_is_not_reported_as_a_network_error(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise Tier 1 would train on another dataset when the cache's disk is full."""
    cause = OSError(number, os.strerror(number), "cache/train.arrow")

    def fail(_: object) -> None:
        raise RuntimeError("An error occurred while generating the dataset") from cause

    monkeypatch.setattr(hub, "_load_splits", fail)
    text = hub.find_hub_dataset("shakespeare")
    assert text
    with pytest.raises(UserError, match=r"cannot use cache/train\.arrow") as error:
        hub.load_hub_rows(text)
    assert error.value.remedy == files.REMEDIES[number]
    assert not isinstance(error.value, hub.DatasetUnavailableError)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_disk_error_in_the_tiktoken_cache(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    def fail(_: str) -> None:
        raise OSError(number, os.strerror(number), "cache/9b5ad716")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    bpe.load_gpt2_tokenizer.cache_clear()
    with pytest.raises(UserError, match="cannot use cache/9b5ad716") as error:
        bpe.load_gpt2_tokenizer()
    assert error.value.remedy == files.REMEDIES[number]
    bpe.load_gpt2_tokenizer.cache_clear()
