"""A run's folder: config, tokenizer, metrics, samples, checkpoints. Self-contained: to generate
from it, nothing else is needed, on any machine.

    config.toml      the whole config; changed intervals are written back
    run.json         format version, the data's name and fingerprint
    tokenizer.json
    metrics.jsonl    one object a logged step
    samples.txt      what the model wrote at each evaluation
    best.json        step and validation loss of the best checkpoint
    checkpoints/step-NNNNNNN/
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt import checkpoint, files
from mlxgpt import config as configs
from mlxgpt.config import Config
from mlxgpt.corpus import tokenizer as tokenizers
from mlxgpt.corpus.tokenizer import Tokenizer
from mlxgpt.corpus.tokens import Dataset
from mlxgpt.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """One run's folder, opened."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    data_name: str
    data_fingerprint: str

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return checkpoint.steps(self.checkpoints)

    def best(self) -> Mapping[str, Any] | None:
        """{"step", "val_loss"} of the best checkpoint, or None where that is not known."""
        try:
            return files.read_sealed(self.folder / "best.json", FORMAT)
        except (OSError, ValueError):
            return None

    def set_best(self, step: int, val_loss: float) -> None:
        """Name the best checkpoint."""
        best = {"format": FORMAT, "step": step, "val_loss": val_loss}
        files.write_atomically(self.folder / "best.json", files.sealed(best))

    def checkpoint_path(self, which: str = "best") -> Path:
        """Where a checkpoint lies: `best` (the newest until there is one), `newest`, or a step.

        Raises:
            UserError: if there is no such checkpoint.
        """
        there = self.steps()
        if not there:
            raise UserError(f"{self.folder} has no checkpoint yet", "train it first.")
        best = self.best()
        if which == "best" and best and best["step"] in there:
            return checkpoint.path_of(self.checkpoints, best["step"])
        if which in ("best", "newest"):
            return checkpoint.path_of(self.checkpoints, there[-1])
        if which.isdecimal() and int(which) in there:
            return checkpoint.path_of(self.checkpoints, int(which))
        raise UserError(
            f"{self.name} has no checkpoint {which!r}",
            f"use best, newest, or one of {', '.join(map(str, there))}.",
        )

    def write_config(self, config: Config) -> None:
        """Store a config in the folder."""
        files.write_atomically(self.folder / "config.toml", configs.to_toml(config))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics; a last line that was cut off is left out."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def cut_metrics(self, step: int) -> None:
        """Forget the metrics of later steps than `step`."""
        kept = [json.dumps(r) + "\n" for r in self.metrics() if r["step"] <= step]
        if kept or (self.folder / "metrics.jsonl").exists():
            files.write_atomically(self.folder / "metrics.jsonl", "".join(kept))

    def add_sample(self, step: int, text: str) -> None:
        """Append what the model wrote at a step."""
        with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")


def create(folder: Path, config: Config, dataset: Dataset) -> Run:
    """Make a run's folder.

    Raises:
        UserError: if it cannot be written.
    """
    run = Run(folder, config, dataset.tokenizer, dataset.name, dataset.meta.fingerprint)
    identity = {
        "format": FORMAT,
        "data_name": run.data_name,
        "data_fingerprint": run.data_fingerprint,
        "tokenizer": dataset.tokenizer.fingerprint,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.write_config(config)
        files.write_atomically(folder / "tokenizer.json", dataset.tokenizer.to_json())
        # Last, since it is what makes the folder a run.
        files.write_atomically(folder / "run.json", files.sealed(identity))
    except OSError as error:
        raise UserError(
            f"cannot write the run {folder}: {error.strerror}", "choose another --runs-dir."
        ) from error
    return run


def open_run(folder: Path) -> Run:
    """Open a run's folder.

    Raises:
        UserError: if it is no run, damaged, or of a newer format.
    """
    try:
        identity = files.read_sealed(folder / "run.json", FORMAT)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a run of mlxgpt", "name another: mlxgpt runs lists them."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / 'run.json'} is damaged: {error}", "restore it, or name another run."
        ) from error
    config = configs.load(folder / "config.toml")
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != identity["tokenizer"]:
        raise UserError(
            f"{folder}: tokenizer.json is not the one this run was trained with",
            "restore the run's own file.",
        )
    return Run(folder, config, tokenizer, identity["data_name"], identity["data_fingerprint"])


def find(name: str | None, runs_dir: Path) -> Run:
    """The run of a name or a folder; without one, the newest that has a checkpoint.

    Raises:
        UserError: saying where it was looked for.
    """
    if name is not None:
        folders = [runs_dir / name, Path(name)]
        for folder in folders:
            if (folder / "run.json").exists():
                return open_run(folder)
        raise UserError(
            f"there is no run {name!r} in {runs_dir}, and no run's folder of that name",
            "mlxgpt runs lists them; mlxgpt train --tier 1 makes one.",
        )
    trained = [
        folder for folder in folders_in(runs_dir) if checkpoint.steps(folder / "checkpoints")
    ]
    if not trained:
        raise UserError(
            f"there is no trained run in {runs_dir.absolute()}",
            "train one: mlxgpt train --tier 1; or name its folder with --run.",
        )
    return open_run(trained[0])


def folders_in(runs_dir: Path) -> list[Path]:
    """The runs' folders, the one written to last first."""
    if not runs_dir.is_dir():
        return []
    folders = [p.parent for p in runs_dir.glob("*/run.json")]
    return sorted(folders, key=_last_written, reverse=True)


def _last_written(folder: Path) -> float:
    places = (folder / "run.json", folder / "checkpoints")
    return max(p.stat().st_mtime for p in places if p.exists())
