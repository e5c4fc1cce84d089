"""Keep a run's folder open during training, to notice that it was deleted, moved or replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace

from mlxgpt.storage import checkpoint
from mlxgpt.storage.logs import HISTORY_FILE, METRICS_FILE, RUN_FILE, SAMPLES_FILE
from mlxgpt.storage.run import BEST_FILE, CONFIG_TOML, TOKENIZER_FILE, Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


@contextlib.contextmanager
def hold_run_folder(run: Run) -> Iterator[Run]:
    """Keep a run's folder open during training, so that writes raise UserError if the folder was
    deleted, moved or replaced, instead of going to another folder at the same path.
    """
    folder_fd = os.open(run.folder, os.O_RDONLY)
    try:
        run = replace(run, folder_fd=folder_fd)
        try:
            yield run
        except (OSError, UserError):
            with contextlib.suppress(OSError):
                _check_folder_or_clean_up(run)  # a deleted folder may be the cause
            raise
        _check_folder_or_clean_up(run)
    finally:
        files.close_ignoring_errors(folder_fd)


def _check_folder_or_clean_up(run: Run) -> None:
    try:
        run.check_folder_exists()
    except UserError:
        assert run.folder_fd is not None
        has_run_files = any(
            files.exists(run.folder / name) for name in (RUN_FILE, CONFIG_TOML, TOKENIZER_FILE)
        )
        has_older_checkpoints = max(len(run.steps()), len(checkpoint.list_steps(run.snapshots))) > 1
        if (
            files.is_same_file(run.folder_fd, run.folder)
            and not has_run_files
            and not has_older_checkpoints
        ):
            _remove_leftovers(run)
        raise


def _remove_leftovers(run: Run) -> None:
    """Remove files written while the run was deleted, which kept its folder from being removed."""
    for folder in (run.checkpoints, run.snapshots):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for name in (METRICS_FILE, SAMPLES_FILE, HISTORY_FILE, BEST_FILE):
            (run.folder / name).unlink(missing_ok=True)
        run.folder.rmdir()
