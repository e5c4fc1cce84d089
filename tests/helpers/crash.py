"""A training run that kills itself at a planned moment, and a simulated power cut of its files.

`python -m tests.helpers.crash PLAN` trains in the current folder and is killed as the JSON object
PLAN says. The only assumption about how mlxgpt writes files is that it syncs by `files.fsync_path`.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"


def kill_self(delay: float = 0.0) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def make_kill_hook(event: int, delay: float) -> Callable[[], None]:
    """Return a hook that kills the process `delay` seconds after its call number `event`. The delay
    lets the kill hit the middle of a write.
    """
    count = 0

    def on_write() -> None:
        nonlocal count
        count += 1
        if count == event:
            threading.Thread(target=kill_self, args=(delay,), daemon=True).start()

    return on_write


def call_before(owner: Any, name: str, hook: Callable[[], None]) -> None:
    """Patch `owner.name` to call `hook` before each call."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        hook()
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


class SyncJournal:
    """Journal of what the disk is sure to hold below a folder: file contents and folder entries as
    of their last sync. Indexed by inode, because files are renamed.
    """

    def __init__(self, folder: Path, journal: Path) -> None:
        self.journal = journal
        self._descriptors: list[int] = []  # kept open so that no inode is reused
        folder.mkdir(exist_ok=True)
        for path in (folder, *folder.rglob("*")):
            self.sync(path)

    def sync(self, path: Path) -> None:
        """Replacement for `files.fsync_path`."""
        self._descriptors.append(os.open(path, os.O_RDONLY))
        inode = os.fstat(self._descriptors[-1]).st_ino
        entry: dict[str, Any] = {"inode": inode}
        if path.is_dir():
            entry["names"] = {item.name: item.stat().st_ino for item in path.iterdir()}
        else:
            entry["copy"] = f"{inode}-{len(self._descriptors)}"
            shutil.copyfile(path, self.journal / entry["copy"])
        with (self.journal / JOURNAL_FILE).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def simulate_power_cut(folder: Path, journal: Path, draw: random.Random) -> None:
    """Rebuild a folder as after a power cut: synced data stays, unsynced data may or may not."""
    synced_folders: dict[int, dict[str, int]] = {}
    synced_copies: dict[int, Path] = {}
    lines = (
        (journal / JOURNAL_FILE).read_text().splitlines()
        if (journal / JOURNAL_FILE).exists()
        else []
    )
    for line in lines:
        entry = json.loads(line)
        if "names" in entry:
            synced_folders[entry["inode"]] = entry["names"]
        else:
            synced_copies[entry["inode"]] = journal / entry["copy"]
    current_paths = {path.stat().st_ino: path for path in (folder, *folder.rglob("*"))}
    rebuilt = folder.with_name("after")

    def rebuild(inode: int, target: Path) -> None:
        current_path = current_paths.get(inode)
        if inode in synced_folders or (current_path and current_path.is_dir()):
            target.mkdir()
            synced_names = synced_folders.get(inode, {})
            current_names = (
                {p.name: p.stat().st_ino for p in current_path.iterdir()} if current_path else {}
            )
            for name, child in (
                current_names if current_names and draw.random() < 0.3 else synced_names
            ).items():
                rebuild(child, target / name)
            return
        synced_content = synced_copies[inode].read_bytes() if inode in synced_copies else b""
        current_content = current_path.read_bytes() if current_path else b""
        content = draw.choice(
            [
                synced_content,
                synced_content,
                current_content,
                current_content[: draw.randrange(len(current_content) + 1)],
            ]
        )
        if (
            current_content.startswith(synced_content) and draw.random() < 0.3
        ):  # the length was written, the data was not
            content = synced_content + bytes(len(current_content) - len(synced_content))
        # Synced content is safe; appended, unsynced data may be missing.
        target.write_bytes(content if content.startswith(synced_content) else synced_content)

    rebuild(folder.stat().st_ino, rebuilt)
    shutil.rmtree(folder)
    rebuilt.rename(folder)


def main(plan: dict[str, Any]) -> None:
    from mlxgpt import api
    from mlxgpt.utils import files  # before mlx, so that MLX uses mlxgpt's BLAS

    import mlx.core as mx  # isort: skip
    from mlxgpt.backend import device
    from mlxgpt.config import config_from_tree
    from mlxgpt.storage import run
    from mlxgpt.training import estimate, selfcheck, setup, spike_guard, step
    from mlxgpt.training.estimate import Estimate
    from tests.helpers.training_runs import Recorder

    selfcheck.run_self_check = lambda config: iter([])
    device.matmul_peak = lambda dtype: 1e9  # type: ignore[assignment]
    for module in (estimate, setup):
        module.estimate_training = lambda *_: Estimate(1e-3, 0.0, 0, 0)  # type: ignore[attr-defined]
    if spike_step := plan.get("spike"):  # this step counts as a spike the first time

        def loss_limit(self: spike_guard.SpikeGuard, step: int) -> float:
            return 0.0 if step == spike_step and not self.rollbacks else math.inf

        spike_guard.SpikeGuard.loss_limit = loss_limit  # type: ignore[method-assign]
    if failing_step := plan.get("gpu_failure"):  # the step at which the GPU fails
        remaining = [failing_step]

        def fail_gpu() -> None:
            remaining[0] -= 1
            if not remaining[0]:
                raise RuntimeError(
                    "[METAL] Command buffer execution failed: Impacting Interactivity."
                )

        call_before(step.TrainStep, "__call__", fail_gpu)
    if plan.get("journal"):
        files.fsync_path = SyncJournal(Path("runs"), Path(plan["journal"])).sync
    if plan.get("event"):
        on_write = make_kill_hook(plan["event"], plan["late"])
        for owner, name in (
            (files, "fsync_path"),
            (files, "write_atomically"),
            (mx, "save_safetensors"),
            (shutil, "rmtree"),
            (Path, "rename"),
            (Path, "replace"),
            (Path, "unlink"),
            (run.Run, "log"),
            (run.Run, "add_sample"),
        ):
            call_before(owner, name, on_write)
    if plan.get("after"):

        class DyingRecorder(Recorder):
            def on_train_begin(self, *_: Any) -> None:
                threading.Timer(plan["after"], kill_self).start()

        recorder: Recorder = DyingRecorder()
    else:
        recorder = Recorder(echo="MLX_RANK" in os.environ)
    if plan.get("compare"):
        api.compare(config=config_from_tree(plan["config"]), source="words.txt", **plan["compare"])
    else:
        train_options = {name: plan[name] for name in ("memory_limit",) if name in plan}
        config = config_from_tree(plan["config"])
        with recorder.recording_logs() if os.environ.get("MLX_RANK", "0") == "0" else nullcontext():
            api.train(
                config=config, source="words.txt", run="a", callbacks=[recorder], **train_options
            )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
