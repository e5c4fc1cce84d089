"""A training that dies at a moment of its own choosing, and what a power cut leaves of its files.

Run as `python -m tests.helpers.crash PLAN`, it trains in the current folder and is killed as the
plan, a JSON object, says. Nothing here knows how mlxgpt writes its files, but that it syncs by
`files.fsync_path`.
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

JOURNAL = "journal.jsonl"


def die(late: float = 0.0) -> None:
    time.sleep(late)
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(event: int, late: float) -> Callable[[], None]:
    """What to call at each writing: at the event of that number it dies, so many seconds late, so
    that it may be in the middle of it.
    """
    count = 0

    def writing() -> None:
        nonlocal count
        count += 1
        if count == event:
            threading.Thread(target=die, args=(late,), daemon=True).start()

    return writing


def before(owner: Any, name: str, call: Callable[[], None]) -> None:
    """Have something called before each call of a function."""
    real = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        call()
        return real(*given, **named)

    setattr(owner, name, wrapped)


class Disk:
    """What the disk itself holds of the files below a folder: a file as it was when it was last
    synced, a folder's names as they were then. Kept by inode, since files are renamed.
    """

    def __init__(self, folder: Path, journal: Path) -> None:
        self.journal = journal
        self._open: list[int] = []  # so that no inode is used again
        folder.mkdir(exist_ok=True)
        for path in (folder, *folder.rglob("*")):
            self.sync(path)

    def sync(self, path: Path) -> None:
        """In place of `files.fsync_path`."""
        self._open.append(os.open(path, os.O_RDONLY))
        inode = os.fstat(self._open[-1]).st_ino
        entry: dict[str, Any] = {"inode": inode}
        if path.is_dir():
            entry["names"] = {item.name: item.stat().st_ino for item in path.iterdir()}
        else:
            entry["copy"] = f"{inode}-{len(self._open)}"
            shutil.copyfile(path, self.journal / entry["copy"])
        with (self.journal / JOURNAL).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def cut_the_power(folder: Path, journal: Path, draw: random.Random) -> None:
    """Leave of a folder what the disk is sure to hold, and of what it is not sure to hold, some."""
    names: dict[int, dict[str, int]] = {}
    copies: dict[int, Path] = {}
    lines = (journal / JOURNAL).read_text().splitlines() if (journal / JOURNAL).exists() else []
    for line in lines:
        entry = json.loads(line)
        if "names" in entry:
            names[entry["inode"]] = entry["names"]
        else:
            copies[entry["inode"]] = journal / entry["copy"]
    now = {path.stat().st_ino: path for path in (folder, *folder.rglob("*"))}
    after = folder.with_name("after")

    def rebuild(inode: int, place: Path) -> None:
        there = now.get(inode)
        if inode in names or (there and there.is_dir()):
            place.mkdir()
            sure = names.get(inode, {})
            here = {p.name: p.stat().st_ino for p in there.iterdir()} if there else {}
            for name, child in (here if here and draw.random() < 0.3 else sure).items():
                rebuild(child, place / name)
            return
        synced = copies[inode].read_bytes() if inode in copies else b""
        unsure = there.read_bytes() if there else b""
        kept = draw.choice([synced, synced, unsure, unsure[: draw.randrange(len(unsure) + 1)]])
        if unsure.startswith(synced) and draw.random() < 0.3:  # the length is known, the rest not
            kept = synced + bytes(len(unsure) - len(synced))
        # What was synced is safe, and what was only added to it may be there or not.
        place.write_bytes(kept if kept.startswith(synced) else synced)

    rebuild(folder.stat().st_ino, after)
    shutil.rmtree(folder)
    after.rename(folder)


def main(plan: dict[str, Any]) -> None:
    from mlxgpt import api
    from mlxgpt.utils import files  # before mlx, so that its own BLAS serves MLX

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
    if spike := plan.get("spike"):  # a step that looks like one, the first time

        def limit(self: spike_guard.SpikeGuard, step: int) -> float:
            return 0.0 if step == spike and not self.rollbacks else math.inf

        spike_guard.SpikeGuard.loss_limit = limit  # type: ignore[method-assign]
    if failing := plan.get("gpu_failure"):  # the step that it fails at
        left = [failing]

        def fail() -> None:
            left[0] -= 1
            if not left[0]:
                raise RuntimeError(
                    "[METAL] Command buffer execution failed: Impacting Interactivity."
                )

        before(step.TrainStep, "__call__", fail)
    if plan.get("journal"):
        files.fsync_path = Disk(Path("runs"), Path(plan["journal"])).sync
    if plan.get("event"):
        writing = die_at(plan["event"], plan["late"])
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
            before(owner, name, writing)
    if plan.get("after"):

        class Dying(Recorder):
            def on_train_begin(self, *_: Any) -> None:
                threading.Timer(plan["after"], die).start()

        recorder: Recorder = Dying()
    else:
        recorder = Recorder(aloud="MLX_RANK" in os.environ)
    if plan.get("compare"):
        api.compare(config=config_from_tree(plan["config"]), source="words.txt", **plan["compare"])
    else:
        given = {name: plan[name] for name in ("memory_limit",) if name in plan}
        config = config_from_tree(plan["config"])
        with recorder.listening() if os.environ.get("MLX_RANK", "0") == "0" else nullcontext():
            api.train(config=config, source="words.txt", run="a", callbacks=[recorder], **given)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
