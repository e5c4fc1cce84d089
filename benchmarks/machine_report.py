"""Check, benchmark and train on this machine, and write one Markdown report, for Macs and GPUs.

    make report-machine [SOURCE=my.txt] [ARGS="--output DIR --skip tests"]

or report-machine.sh, which needs no make. Takes about 20 minutes: self-check, benchmarks of both
tiers, a short run of Tier 1, the same run killed and resumed, and the tests. Each part runs in
separate processes, and the report is written after each part, so that an error or Ctrl-C does not
lose the other parts. Exit code 1 if a part failed, 2 if the report could not start, 130 if it was
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlxgpt.backend import macos
from mlxgpt.bench import report
from mlxgpt.bench.markdown import format_number, render_markdown_table
from mlxgpt.bench.records import Machine, Measurement
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.redact import redact

ROOT = Path(__file__).resolve().parents[1]
MLXGPT_COMMAND = (sys.executable, "-m", "mlxgpt")

PartResult = tuple[bool, str, list[str]]  # passed, one-line summary, lines of Markdown

COMMAND_TIMEOUT = 3600.0  # seconds


@dataclass
class Workspace:
    """A temporary folder with the report's data and runs.

    Attributes:
        home: the folder, used as MLXGPT_HOME by all commands.
        source: text file to train on; None for Tier 1's dataset.
        train_args: arguments of every `mlxgpt train`.
        pytest_args: arguments of pytest.
        max_steps: length of each training run.
        machine: set by the first benchmark.
    """

    home: Path
    source: Path | None = None
    train_args: Sequence[str] = ("--tier", "1")
    pytest_args: Sequence[str] = ("-rfE", "--tb=no")
    max_steps: int = 300
    machine: Machine | None = None

    def run(self, *command: str, exit_codes: Sequence[int] = (0,), **environment: str) -> str:
        """Run a command and return its standard output.

        Raises:
            RuntimeError: with the last line of its output, if its exit code is not in `exit_codes`.
        """
        with self.start_process(command, environment) as (process, stdout_path, stderr_path):
            try:
                exit_code = process.wait(COMMAND_TIMEOUT)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"no result after {COMMAND_TIMEOUT / 60:.0f} minutes") from None
            stdout = stdout_path.read_text(errors="replace")
            stderr = stderr_path.read_text(errors="replace")
        if exit_code not in exit_codes:
            raise RuntimeError(f"exit code {exit_code}: {last_line(stderr or stdout)}")
        return stdout

    @contextlib.contextmanager
    def start_process(
        self, command: Sequence[str], environment: dict[str, str]
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
        """Start a process in the checkout, and yield it with the files of its stdout and stderr. On
        exit, the process and its children are killed.
        """
        stdout_path, stderr_path = self.home / "output", self.home / "errors"
        with stdout_path.open("wb") as stdout, stderr_path.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, "MLXGPT_HOME": str(self.home), **environment},
                start_new_session=True,
            )
        try:
            yield process, stdout_path, stderr_path
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run_mlxgpt(self, *command: str) -> Any:
        """Run an mlxgpt command with `--json`, and return its parsed output."""
        exit_codes = (0, 1) if command[0] == "check" else (0,)
        return json.loads(self.run(*MLXGPT_COMMAND, *command, "--json", exit_codes=exit_codes))

    def train_command(self, name: str) -> list[str]:
        """Arguments that train the run `name` with the same settings as the other runs."""
        source = ["--source", str(self.source)] if self.source else []
        interval = str(max(1, self.max_steps // 4))
        steps = ["--max-steps", str(self.max_steps), "--log-interval", "10"]
        intervals = ["--save-interval", interval, "--eval-interval", interval]
        return ["train", *self.train_args, *source, "--run", name, *steps, *intervals]

    def load_metrics(self, name: str) -> list[dict[str, Any]]:
        """The records in a run's metrics.jsonl; an incomplete line is skipped."""
        records = []
        with contextlib.suppress(OSError):
            for line in (self.home / "runs" / name / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
        return records

    def list_checkpoints(self, name: str) -> list[Path]:
        """Checkpoints of a run, newest last."""
        return sorted((self.home / "runs" / name / "checkpoints").glob("step-*"))

    def checkpoint_digest(self, name: str) -> str:
        """SHA-256 of the weights and moments in a run's newest checkpoint."""
        digest = hashlib.sha256()
        for path in sorted(self.list_checkpoints(name)[-1].glob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def main(argv: Sequence[str] | None = None, workspace: Workspace | None = None) -> int:
    """Write a report, and return the exit code."""
    parser = argparse.ArgumentParser(prog="report-machine", description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, metavar="FILE", help="a text to train on")
    parser.add_argument("--output", type=Path, metavar="DIR", default=ROOT / "benchmarks/reports")
    parser.add_argument(
        "--skip",
        nargs="+",
        choices=REPORT_PARTS,
        default=[],
        metavar="PART",
        help=", ".join(REPORT_PARTS),
    )
    args = parser.parse_args(argv)
    # All act like Ctrl-C. Shells ignore SIGINT for background jobs, but the tests need it.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    try:
        macos.check_apple_silicon()
        with macos.prevent_sleep(), tempfile.TemporaryDirectory(prefix="mlxgpt-") as folder:
            workspace = workspace or Workspace(Path(folder).resolve())
            args.output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.output).close()
            if args.source:  # copied under another name, so that the report does not show it
                workspace.source = workspace.home / f"text{args.source.suffix}"
                shutil.copyfile(args.source, workspace.source)
            parts = [part for part in REPORT_PARTS if part not in args.skip]
            return write_report(workspace, args.output, parts)
    except UserError as error:
        problem, remedy = error.problem, error.remedy
    except OSError as error:
        problem = f"cannot use {error.filename or args.output}: {error.strerror}"
        remedy = "choose another text or folder: --source FILE --output DIR"
    print(f"report-machine: {problem}\n  → {remedy}", file=sys.stderr)
    return 2


EXIT_INTERRUPTED = 130
HOW_TO_SEND = """written to {path}
  Look through it: its first lines say which parts passed. Names and folders were removed.
  → send it, also if parts failed: on the project's page, Issues, New issue, Machine report"""


def write_report(workspace: Workspace, folder: Path, parts: Sequence[str]) -> int:
    """Run the parts, write the report after each, and return the exit code."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    results: dict[str, PartResult] = {}
    stem, path = "", folder
    exit_code = 0
    for name in parts:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            results[name] = REPORT_PARTS[name](workspace)
        except Exception as error:
            problem = error.problem if isinstance(error, UserError) else last_line(str(error))
            is_expected = isinstance(error, UserError | RuntimeError)
            summary = problem if is_expected else f"{type(error).__name__}: {problem}"
            results[name] = (False, summary, [])
        except KeyboardInterrupt:
            results[name], exit_code = (False, "stopped", []), EXIT_INTERRUPTED
        passed, summary, _ = results[name]
        print(f"  {'passed' if passed else 'FAILED'}: {summary}", file=sys.stderr, flush=True)
        if (new_stem := file_stem(workspace, date)) != stem:  # the first time, or now with the chip
            new_path = folder / f"{report.find_unused_stem(folder, new_stem)}.md"
            if stem:
                path.rename(new_path)
            stem, path = new_stem, new_path
        files.write_atomically(
            path, redact(render_report(workspace, date, results), {"CHECKOUT": ROOT})
        )
        if exit_code:
            break
    print(HOW_TO_SEND.format(path=path), file=sys.stderr)
    return exit_code or int(not all(passed for passed, _, _ in results.values()))


def file_stem(workspace: Workspace, date: str) -> str:
    """File name of the report without extension, such as 2026-11-22-m1-max-machine."""
    machine = workspace.machine
    return f"{report.report_slug(Measurement(date, machine, ())) if machine else date[:10]}-machine"


def render_report(workspace: Workspace, date: str, results: dict[str, PartResult]) -> str:
    """Render the whole report as Markdown."""
    machine = workspace.machine
    lines = [f"# mlxgpt on {machine.chip if machine else 'this machine'}, {date[:10]}", ""]
    if machine and machine.backend == "cpu":
        lines += ["Measured on a CPU: no value here is about a GPU.", ""]
    lines += ["Written by report-machine. Names and folders were removed; check that before"]
    lines += ["you add it to `benchmarks/reports/` in a pull request, or send it in an issue.", ""]
    for name, (passed, summary, _) in results.items():
        lines.append(f"- {name}: {'passed' if passed else '**failed**'}: {summary}")
    for name, (_, _, details) in results.items():
        lines += ["", f"## {name}", "", *details] if details else []
    return "\n".join(lines) + "\n"


def self_check(workspace: Workspace) -> PartResult:
    """Run `mlxgpt check`."""
    checks = workspace.run_mlxgpt("check")
    failed = [check["name"] for check in checks if check["ok"] is False]
    labels = {True: "passed", False: "FAILED", None: ""}
    rows = [[check["name"], labels[check["ok"]], check["detail"]] for check in checks]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [["check", "", "found"], *rows]]
    summary = f"failed: {', '.join(failed)}" if failed else f"{len(checks)} checks"
    return not failed, summary, render_markdown_table(cells)


def measure_tier(workspace: Workspace, tier: int) -> PartResult:
    """Run `mlxgpt bench` for one tier, and include the report that it writes."""
    out = ("--output", str(workspace.home / "bench"))
    measurement = workspace.run_mlxgpt("bench", "--tier", str(tier), *out)
    workspace.machine = Machine(**measurement["machine"])
    speeds = measurement["tiers"][0]
    markdown = Path(measurement["reports"][1]).read_text(encoding="utf-8")
    summary = f"{format_number(speeds['training']['tokens_per_second'])} tokens/s in training, "
    summary += f"{format_number(speeds['generation']['tokens_per_second']['median'])} in generation"
    return True, summary, re.sub("^#", "###", markdown, flags=re.M).splitlines()


def train_uninterrupted(workspace: Workspace) -> PartResult:
    """A short training run; passes if the loss falls."""
    result = workspace.run_mlxgpt(*workspace.train_command("whole"))
    records = workspace.load_metrics("whole")
    first_loss, last_loss = (float(records[n]["loss"] or "nan") for n in (0, -1))
    memory = format_number(records[-1]["memory_bytes"] / 1e6)
    summary = f"{result['steps']:,} steps, loss {first_loss:.3f} to {last_loss:.3f}, {memory} MB"
    return last_loss < first_loss, summary, []


def kill_and_resume(workspace: Workspace) -> PartResult:
    """Kill a training run, resume it, and compare its checkpoint with the uninterrupted run's. On a
    GPU, the bits may differ if those of two uninterrupted runs also do.
    """
    command = workspace.train_command("killed")
    killed_step = kill_after_step(workspace, command, workspace.max_steps * 6 // 10)
    checkpoint = workspace.list_checkpoints("killed")[-1].name
    result = workspace.run_mlxgpt(*command)
    summary = f"killed after step {killed_step:,}, "
    summary += f"resumed from {checkpoint} to {result['step']:,}: "
    if not result["resumed"]:
        return False, summary + "started again, not resumed", []
    if workspace.checkpoint_digest("whole") == workspace.checkpoint_digest("killed"):
        return True, summary + "the same bits as the uninterrupted run", []
    workspace.run_mlxgpt(*workspace.train_command("again"))
    is_reproducible = workspace.checkpoint_digest("whole") == workspace.checkpoint_digest("again")
    on_gpu = workspace.machine is not None and workspace.machine.backend != "cpu"
    summary += "different bits from the uninterrupted run; two uninterrupted runs have "
    summary += "the same bits" if is_reproducible else "different bits"
    return on_gpu and not is_reproducible, summary, []


def kill_after_step(workspace: Workspace, command: Sequence[str], step: int) -> int:
    """Start the run `killed`, kill it once it has reached `step` and saved a checkpoint, and return
    the last step that it logged.
    """

    def last_logged_step() -> int:
        records = workspace.load_metrics("killed")
        return int(records[-1]["step"]) if records else 0

    with workspace.start_process([*MLXGPT_COMMAND, *command], {}) as (process, _, stderr_path):
        while not (last_logged_step() >= step and workspace.list_checkpoints("killed")):
            if process.poll() is not None:
                reason = last_line(stderr_path.read_text(errors="replace"))
                raise RuntimeError(f"it ended before it was killed: {reason}")
            time.sleep(0.05)
    return last_logged_step()


def run_tests(workspace: Workspace) -> PartResult:
    """Run the checkout's tests."""
    command = (sys.executable, "-m", "pytest", *workspace.pytest_args)
    # A wide terminal keeps pytest from truncating the reasons of failures.
    lines = workspace.run(*command, exit_codes=(0, 1), COLUMNS="400").splitlines()
    failed = [f"    {line}" for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return not failed, lines[-1].strip("= "), failed


def last_line(text: str) -> str:
    """Last line of an output that is neither empty nor a remedy."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("  →")]
    return lines[-1].strip() if lines else "no output"


REPORT_PARTS: dict[str, Callable[[Workspace], PartResult]] = {
    "check": self_check,
    "tier1": lambda workspace: measure_tier(workspace, 1),
    "tier2": lambda workspace: measure_tier(workspace, 2),
    "training": train_uninterrupted,
    "resume": kill_and_resume,  # compared with the run of the previous part
    "tests": run_tests,  # last: they take longest
}

if __name__ == "__main__":
    sys.exit(main())
