"""Run folders: config, tokenizer, metrics, samples, checkpoints. A run folder is self-contained and
can be copied to another machine.

    config.toml      the complete config; updated when a run resumes with changed intervals
    run.json         format version, name and fingerprint of the data, whether texts start with a
                     BOS token, and the origin of the initial weights
    tokenizer.json
    metrics.jsonl, history.jsonl, samples.txt: logs, see storage/logs.py
    chat_template.jinja  the Hugging Face chat template, if there is one
    wandb.txt, tensorboard/: from --report-to, see training/loggers.py
    best.json        step and validation loss of the best checkpoint
    checkpoints/step-NNNNNNN/
    snapshots/step-NNNNNNN/  16-bit weights only, see training/snapshots.py
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgpt.config import Config, toml
from mlxgpt.data.chat_template import CHAT_TEMPLATE
from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.storage import checkpoint
from mlxgpt.storage.checkpoint import Checkpoint
from mlxgpt.storage.logs import RUN_FILE, RunLogs
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_TOML, TOKENIZER_FILE, BEST_FILE = "config.toml", "tokenizer.json", "best.json"
RUN_FORMAT = 3  # format 1 had no spike guard settings, format 2 no add_bos_token


@dataclass(frozen=True)
class Run(RunLogs):
    """An opened run folder. Its contents are not trusted.

    Attributes:
        data_name, data_fingerprint: of the training data; None for an imported model.
        add_bos_token: whether texts start with the end-of-text token: true for models trained by
            mlxgpt if they have one, false for GPT-2.
        origin: where the initial weights come from; empty: random.
        tokens_per_row: mean number of tokens in a row of a batch, if rows are padded examples;
            None: rows are full.
    """

    config: Config
    tokenizer: Tokenizer
    data_name: str | None
    data_fingerprint: str | None
    add_bos_token: bool
    origin: Mapping[str, Any] = field(default_factory=dict)
    tokens_per_row: float | None = None

    @property
    def bos(self) -> int | None:
        """Id of the token that texts start with; None if there is none."""
        return self.tokenizer.end_of_text if self.add_bos_token else None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens per optimizer step, without padding."""
        row = self.tokens_per_row or self.config.model.block_size
        return self.config.sequences_per_step * row

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def snapshots(self) -> Path:
        return self.folder / "snapshots"

    @property
    def has_chat_template(self) -> bool:
        """Whether the run has a chat template."""
        return files.is_file(self.folder / CHAT_TEMPLATE)

    def chat_template(self) -> str:
        """The run's chat template.

        Raises:
            UserError: if there is none or it cannot be read.
        """
        path = self.folder / CHAT_TEMPLATE
        try:
            return files.read_small(path)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.name} has no chat template: it was not trained on conversations",
                "use mlxgpt generate, or /v1/completions.",
            ) from error
        except OSError as error:
            raise files.to_user_error(error, "read", path, "restore it.") from error
        except ValueError as error:
            raise UserError(f"cannot read {CHAT_TEMPLATE} of {self.name}", "restore it.") from error

    def saved_steps(self) -> list[int]:
        """Steps with a checkpoint or a snapshot, ascending."""
        return sorted({*self.steps(), *checkpoint.list_steps(self.snapshots)})

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        return checkpoint.list_steps(self.checkpoints)

    def best(self) -> Mapping[str, Any] | None:
        """{"step", "val_loss"} of the best checkpoint; None if there is none yet. If best.json is
        damaged, the best checkpoint is determined from the metrics.

        Raises:
            UserError: if best.json is damaged and the metrics contain no evaluation.
            OSError: if it cannot be read.
        """
        path = self.folder / BEST_FILE
        try:
            tree = json_files.read_checksummed(path, RUN_FORMAT)
            return {"step": int(tree["step"]), "val_loss": float(tree["val_loss"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            steps, candidates = self.steps(), []
            for record in self.metrics():
                loss = record.get("val_loss")
                if record["step"] in steps and isinstance(loss, float) and math.isfinite(loss):
                    candidates.append((loss, record["step"]))
            if not candidates:
                raise UserError(
                    f"{path} is damaged: {error}",
                    "restore it, or move it away and select a checkpoint with --checkpoint.",
                ) from error
            loss, step = min(candidates)
            return {"step": step, "val_loss": loss}

    def set_best(self, step: int, val_loss: float) -> None:
        """Record the best checkpoint."""
        best = {"format": RUN_FORMAT, "step": step, "val_loss": val_loss}
        self.check_folder_exists()
        files.write_atomically(self.folder / BEST_FILE, json_files.dump_checksummed(best))

    def save(
        self,
        folder: Path,
        step: int,
        parameters: dict[str, mx.array],
        optimizer: dict[str, mx.array],
        *,
        metrics: Mapping[str, float] | None = None,
        guard: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a checkpoint of this run's model in one of its folders.

        Args:
            metrics, guard: see `Checkpoint`.

        Raises:
            UserError: if it cannot be written, or the run's folder no longer exists.
        """
        self.check_folder_exists()
        ckpt = Checkpoint(
            step,
            self.config.model.fingerprint,
            self.tokenizer.fingerprint,
            dict(metrics or {}),
            dict(guard or {}),
            parameters,
            optimizer,
        )
        checkpoint.save_checkpoint(folder, ckpt, check=self.check_folder_exists)

    def checkpoint_path(self, selector: str = "best") -> Path:
        """Path of a checkpoint: `best` (the newest if there is no best yet), `newest`, or a step.

        Raises:
            UserError: if there is no such checkpoint.
        """
        steps = self.steps()
        if selector.isdecimal() and int(selector) in self.saved_steps():
            folder = self.checkpoints if int(selector) in steps else self.snapshots
            return checkpoint.checkpoint_folder(folder, int(selector))
        if not steps:
            raise UserError(f"{self.folder} has no checkpoint yet", "train it first.")
        best = self.best() if selector == "best" else None
        if best and best["step"] in steps:
            return checkpoint.checkpoint_folder(self.checkpoints, best["step"])
        if selector in ("best", "newest"):
            return checkpoint.checkpoint_folder(self.checkpoints, steps[-1])
        raise UserError(
            f"{self.name} has no checkpoint {selector!r}",
            f"use best, newest, or one of {', '.join(map(str, self.saved_steps()))}.",
        )

    def load_first_valid(
        self, paths: Sequence[Path], *, with_optimizer: bool = False
    ) -> Checkpoint:
        """Load the first undamaged checkpoint; damaged ones before it are logged.

        Raises:
            UserError: if all are damaged, or it does not belong to this run.
            OSError: if one cannot be read, though it may be undamaged.
        """
        for path in paths:
            try:
                ckpt = checkpoint.load_checkpoint(path, with_optimizer=with_optimizer)
            except checkpoint.DamagedCheckpointError as error:
                if len(self.steps()) == 1:
                    raise UserError(
                        error.problem,
                        "it is the only checkpoint of this run: copy it again, or train a new run.",
                    ) from error
                if path == paths[-1]:
                    raise
                logger.warning(error.problem)
                continue
            if ckpt.tokenizer != self.tokenizer.fingerprint:
                raise UserError(
                    f"the checkpoint {path} was written with a different tokenizer",
                    "restore the run's original checkpoint.",
                )
            # Shapes alone do not determine all settings, such as the number of heads.
            if ckpt.model not in ("", self.config.model.fingerprint):
                raise UserError(
                    f"the checkpoint {path} was written with different model settings than those "
                    "in config.toml",
                    "restore the config.toml that belongs to the run's checkpoints.",
                )
            return ckpt
        raise UserError(f"{self.folder} has no checkpoint yet", "train it first.")

    def write_config(self, config: Config) -> None:
        """Write the run's config.toml."""
        files.write_atomically(self.folder / CONFIG_TOML, toml.config_to_toml(config))


def create_run(run: Run, chat_template: str | None = None) -> None:
    """Create a run's folder.

    Args:
        chat_template: Jinja template of conversations; None without one.

    Raises:
        UserError: if it cannot be written.
    """
    folder = run.folder
    metadata = {
        "format": RUN_FORMAT,
        "data_name": run.data_name,
        "data_fingerprint": run.data_fingerprint,
        "tokenizer": run.tokenizer.fingerprint,
        "add_bos_token": run.add_bos_token,
        "origin": dict(run.origin),
        "tokens_per_row": run.tokens_per_row,
    }
    # Checked again, since everything in the folder is deleted below.
    if run.steps():
        raise UserError(
            f"{folder} already contains checkpoints", "choose another name: --run NAME."
        )
    # Under a temporary name, so that a killed process leaves a complete run or nothing.
    scratch = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "checkpoints").mkdir(parents=True)
        for name, text in (
            (CONFIG_TOML, toml.config_to_toml(run.config)),
            (TOKENIZER_FILE, run.tokenizer.to_json()),
            (RUN_FILE, json_files.dump_checksummed(metadata)),
            (CHAT_TEMPLATE, chat_template),
        ):
            if text is None:
                continue
            (scratch / name).write_text(text, encoding="utf-8")
            files.fsync_path(scratch / name)
        files.fsync_path(scratch)
        files.remove_folder(folder)  # it has no checkpoint, or it would have been resumed
        files.publish_folder(scratch, folder)
    except OSError as error:
        raise files.to_user_error(error, "write", folder, "choose another --runs-dir.") from error


def open_run(folder: Path) -> Run:
    """Open a run's folder.

    Raises:
        UserError: if it is not a run, damaged, or in a newer format.
        OSError: if it cannot be read.
    """
    files.reject_symlinks(folder)
    try:
        metadata = json_files.read_checksummed(folder / RUN_FILE, RUN_FORMAT)
        data_name, data_fingerprint = metadata["data_name"], metadata["data_fingerprint"]
        if data_name is not None or data_fingerprint is not None or metadata["format"] < 3:
            data_name, data_fingerprint = _check_data_name(data_name), str(data_fingerprint)
        add_bos_token, origin = metadata.get("add_bos_token", True), metadata.get("origin", {})
        tokens_per_row = metadata.get("tokens_per_row")
        if tokens_per_row is not None and not 0 < float(tokens_per_row) < 1e9:
            raise ValueError(f"tokens_per_row is {tokens_per_row}")
        if type(add_bos_token) is not bool or type(origin) is not dict:
            raise ValueError("its fields are inconsistent")
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not an mlxgpt run", "list the runs: mlxgpt runs") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / RUN_FILE} is damaged: {error}", "restore it, or use another run."
        ) from error
    config = toml.load_config(
        folder / CONFIG_TOML,
        "restore the run's original file; if a newer mlxgpt wrote it, update mlxgpt.",
    )
    if config.train.dtype == "auto":  # runs store the dtype that was chosen
        raise UserError(f"{folder / CONFIG_TOML} is incomplete", "restore the run's original file.")
    tokenizer = tokenizer_json.load_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.fingerprint != metadata.get("tokenizer"):
        raise UserError(
            f"{folder}: tokenizer.json is not the tokenizer this run was trained with",
            "restore the run's original file.",
        )
    add_bos_token &= tokenizer.end_of_text is not None
    return Run(
        folder,
        config,
        tokenizer,
        data_name,
        data_fingerprint,
        add_bos_token,
        origin,
        tokens_per_row,
    )


# Control and bidirectional characters, unsafe in a terminal.
CONTROL_CHARS = re.compile("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _check_data_name(name: Any) -> str:
    name = str(name)
    is_plain = name == Path(name).name and not CONTROL_CHARS.search(name)
    if not is_plain or name in ("", "..") or len(os.fsencode(name)) > 255:
        raise ValueError(f"{name!r} is not a valid data folder name")
    return name


def find_run(name: str | None, runs_dir: Path) -> Run:
    """Open a run by name or folder; without a name, the newest one with a checkpoint.

    Raises:
        UserError: if there is none.
    """
    if name is not None:
        folders = [runs_dir / name, Path(name)]
        for folder in folders:
            if files.exists(folder / RUN_FILE):
                return open_run(folder)
        raise UserError(
            f"there is no run named {name!r} in {runs_dir}, and no run folder at that path",
            "list the runs with mlxgpt runs, or train one with mlxgpt train --tier 1",
        )
    trained = [
        folder
        for folder in list_run_folders(runs_dir)
        if checkpoint.list_steps(folder / "checkpoints")
    ]
    if not trained:
        raise UserError(
            f"there is no trained run in {runs_dir.absolute()}",
            "train one with mlxgpt train --tier 1, or set the folder of a run with --run.",
        )
    return open_run(trained[0])


def list_run_folders(runs_dir: Path, *, skip_unreadable: bool = False) -> list[Path]:
    """List the folders of runs, most recently written first, without incompletely created ones.

    Args:
        skip_unreadable: log folders that cannot be read, instead of raising OSError.
    """
    mtimes: dict[Path, float] = {}
    for folder in files.list_matching(runs_dir, "[!.]*"):
        try:
            if files.exists(folder / RUN_FILE):
                mtimes[folder] = _last_modified(folder)
        except OSError as error:
            if not skip_unreadable:
                raise
            logger.warning(files.to_user_error(error, "read", folder).problem)
    return sorted(mtimes, key=lambda folder: mtimes[folder], reverse=True)


def _last_modified(folder: Path) -> float:
    paths = (folder / RUN_FILE, folder / "checkpoints")
    return max(path.stat().st_mtime for path in paths if files.exists(path))
