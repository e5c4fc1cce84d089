"""Observe and interrupt a dataset preparation."""

from __future__ import annotations

from pathlib import Path

from mlxgpt.config import DataConfig
from mlxgpt.data import hash_cache
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from tests.helpers.log_lines import capture_log_lines

DATASET_FILES = {"train.bin", "val.bin", "meta.json", "tokenizer.json", "verified.json"}


def read_folder_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files except the hash cache."""
    paths = [path for path in folder.iterdir() if path.name != hash_cache.CACHE_FILENAME]
    return {path.name: path.read_bytes() for path in paths}


class PrepareRecorder:
    """Records logs and progress; raises KeyboardInterrupt after `interrupt_after` updates of a
    stage.
    """

    def __init__(self, interrupt_after: int | None = None, *, stage: str = "encoding") -> None:
        self.lines: list[str] = []
        self.chunks = 0
        self.interrupt_after, self.stage = interrupt_after, stage

    def progress(self, stage: str, done: int, total: int) -> None:
        self.chunks += stage == "encoding"
        if stage == self.stage and self.interrupt_after is not None:
            self.interrupt_after -= 1
            if self.interrupt_after < 0:
                raise KeyboardInterrupt


def prepare_and_read(
    source: Path, data_dir: Path, kind: str, recorder: PrepareRecorder
) -> dict[str, bytes]:
    data = DataConfig((str(source),), tokenizer=kind)
    request = PrepareRequest(data, vocab_size=280, name="x")
    with capture_log_lines(recorder.lines.append):
        dataset = find_or_prepare(request, data_dir, recorder.progress)
    return read_folder_files(dataset.folder)
