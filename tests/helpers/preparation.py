"""A preparation that is watched, for tests."""

from __future__ import annotations

from pathlib import Path

from mlxgpt.config import DataConfig
from mlxgpt.data import hash_cache
from mlxgpt.data.prepare import PrepareRequest, find_or_prepare
from tests.helpers.log_lines import logged_to

FILES = {"train.bin", "val.bin", "meta.json", "tokenizer.json", "verified.json"}


def contents(folder: Path) -> dict[str, bytes]:
    """All but what is only remembered of the other files."""
    own = [path for path in folder.iterdir() if path.name != hash_cache.CACHE_FILENAME]
    return {path.name: path.read_bytes() for path in own}


class Recorder:
    """Remembers what it is told; after so many chunks or characters it has had enough."""

    def __init__(self, enough: int | None = None, *, doing: str = "encoding") -> None:
        self.lines: list[str] = []
        self.chunks = 0
        self.enough, self.doing = enough, doing

    def progress(self, doing: str, done: int, total: int) -> None:
        self.chunks += doing == "encoding"
        if doing == self.doing and self.enough is not None:
            self.enough -= 1
            if self.enough < 0:
                raise KeyboardInterrupt


def prepared(source: Path, data_dir: Path, kind: str, recorder: Recorder) -> dict[str, bytes]:
    data = DataConfig((str(source),), tokenizer=kind)
    request = PrepareRequest(data, vocab_size=280, name="x")
    with logged_to(recorder.lines.append):
        dataset = find_or_prepare(request, data_dir, recorder.progress)
    return contents(dataset.folder)
