"""Check, measure and train on this machine, and write one Markdown report: for Macs and GPUs.

    make report-machine [SOURCE=my.txt] [ARGS="--out DIR --skip tests"]

Takes some twenty minutes: the self-check, the speed of both tiers, a short run of Tier 1, the same
killed and resumed, and the tests. Each part runs in processes of its own, and the file is written
after each part, so that an error or Ctrl-C loses no other part. Exit code 1 if a part failed, 2 if
the report could not start, 130 if it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
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

ROOT = Path(__file__).resolve().parents[1]
MLXGPT = (sys.executable, "-m", "mlxgpt")
LIMIT = 3600.0  # seconds that one command may take
INTERRUPTED = 130

Result = tuple[bool, str, list[str]]  # passed, one line, lines of Markdown


@dataclass
class Workspace:
    """A temporary folder with the report's data and runs.

    Attributes:
        source: the text to train on; None for Tier 1's own.
        train: arguments of every `mlxgpt train`.
        tests: arguments of pytest.
        steps: of each training run.
        machine: set by the first measurement.
    """

    home: Path
    source: Path | None = None
    train: Sequence[str] = ("--tier", "1")
    tests: Sequence[str] = ("-rfE", "--tb=no")
    steps: int = 300
    machine: Machine | None = None

    def run(self, *command: str, codes: Sequence[int] = (0,), **environment: str) -> str:
        """Standard output of a command.

        Raises:
            RuntimeError: with the last line of its output, if it ends with another exit code.
        """
        with self.started(command, environment) as (process, output, errors):
            try:
                code = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"no result after {LIMIT / 60:.0f} minutes") from None
            out, err = output.read_text(errors="replace"), errors.read_text(errors="replace")
        if code not in codes:
            raise RuntimeError(f"exit code {code}: {last_line(err or out)}")
        return out

    @contextlib.contextmanager
    def started(
        self, command: Sequence[str], environment: dict[str, str]
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
        """A process in the checkout, with the files of its output and errors; it and all its
        children are killed at the end.
        """
        output, errors = self.home / "output", self.home / "errors"
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=ROOT,
                env={**os.environ, "MLXGPT_HOME": str(self.home), **environment},
                start_new_session=True,
            )
        try:
            yield process, output, errors
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def mlxgpt(self, *command: str) -> Any:
        """The JSON that a command of mlxgpt prints."""
        codes = (0, 1) if command[0] == "check" else (0,)
        return json.loads(self.run(*MLXGPT, *command, "--json", codes=codes))

    def training(self, name: str) -> list[str]:
        """Arguments that train the run `name` on the same text as the other runs."""
        source = ["--source", str(self.source)] if self.source else []
        save = str(max(1, self.steps // 4))
        intervals = ["--log-interval", "10", "--save-interval", save, "--eval-interval", save]
        steps = ["--max-steps", str(self.steps), *intervals]
        return ["train", *self.train, *source, "--run", name, *steps]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The records in a run's metrics.jsonl; an incomplete line is left out."""
        records = []
        with contextlib.suppress(OSError):
            for line in (self.home / "runs" / name / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
        return records

    def checkpoints(self, name: str) -> list[Path]:
        """A run's checkpoints, the newest last."""
        return sorted((self.home / "runs" / name / "checkpoints").glob("step-*"))

    def digest(self, name: str) -> str:
        """A hash of the weights and moments in a run's newest checkpoint."""
        digest = hashlib.sha256()
        for path in sorted(self.checkpoints(name)[-1].glob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def main(arguments: Sequence[str] | None = None, workspace: Workspace | None = None) -> int:
    """Write a report; the exit code."""
    parser = argparse.ArgumentParser(prog="report-machine", description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, metavar="FILE", help="a text to train on")
    parser.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "benchmarks/reports")
    parser.add_argument(
        "--skip", nargs="+", choices=PARTS, default=[], metavar="PART", help=", ".join(PARTS)
    )
    args = parser.parse_args(arguments)
    # All stop it as Ctrl-C does. A shell ignores SIGINT for background jobs, and the tests need it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        macos.check_apple_silicon()
        with macos.prevent_sleep(), tempfile.TemporaryDirectory(prefix="mlxgpt-") as folder:
            workspace = workspace or Workspace(Path(folder).resolve())
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()
            if args.source:  # a copy, whose name says nothing
                workspace.source = workspace.home / f"text{args.source.suffix}"
                shutil.copyfile(args.source, workspace.source)
            return write_report(workspace, args.out, [p for p in PARTS if p not in args.skip])
    except UserError as error:
        problem, remedy = error.problem, error.remedy
    except OSError as error:
        problem = f"cannot use {error.filename or args.out}: {error.strerror}"
        remedy = "choose another text or folder: --source FILE --out DIR"
    print(f"report-machine: {problem}\n  → {remedy}", file=sys.stderr)
    return 2


def write_report(workspace: Workspace, folder: Path, names: Sequence[str]) -> int:
    """Run the parts, and write the report after each; the exit code."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    results: dict[str, Result] = {}
    path: Path | None = None
    code = 0
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            results[name] = PARTS[name](workspace)
        except Exception as error:
            problem = error.problem if isinstance(error, UserError) else last_line(str(error))
            known = isinstance(error, UserError | RuntimeError)
            results[name] = (False, problem if known else f"{type(error).__name__}: {problem}", [])
        except KeyboardInterrupt:
            results[name], code = (False, "stopped", []), INTERRUPTED
        passed, line, _ = results[name]
        print(f"  {'passed' if passed else 'FAILED'}: {line}", file=sys.stderr, flush=True)
        path = path or folder / f"{report.find_unused_stem(folder, file_stem(workspace, date))}.md"
        files.write_atomically(path, private(render(workspace, date, results)))
        if code:
            break
    print(f"written to {path}", file=sys.stderr)
    return code or int(not all(passed for passed, _, _ in results.values()))


def file_stem(workspace: Workspace, date: str) -> str:
    """The report's name, as 2026-11-22-m1-max-machine."""
    machine = workspace.machine
    return f"{report.report_slug(Measurement(date, machine, ())) if machine else date[:10]}-machine"


def render(workspace: Workspace, date: str, results: dict[str, Result]) -> str:
    """The whole report as Markdown."""
    machine = workspace.machine
    lines = [f"# mlxgpt on {machine.chip if machine else 'this machine'}, {date[:10]}", ""]
    if machine and machine.backend == "cpu":
        lines += ["Measured on a CPU: no value here is about a GPU.", ""]
    lines += ["Written by `make report-machine`. Names and folders were removed; check that before"]
    lines += ["you add it to `benchmarks/reports/` in a pull request.", ""]
    for name, (passed, line, _) in results.items():
        lines.append(f"- {name}: {'passed' if passed else '**failed**'}: {line}")
    for name, (_, _, body) in results.items():
        lines += ["", f"## {name}", "", *body] if body else []
    return "\n".join(lines) + "\n"


def private(text: str) -> str:
    """A text without the folders, the user's name and the host's name of this machine."""
    paths = [("CHECKOUT", ROOT), ("TEMP", Path(tempfile.gettempdir())), ("HOME", Path.home())]
    words = [(str(p), word) for word, path in paths for p in (path.resolve(), path) if p.name]
    for host in (socket.gethostname(), os.uname().nodename):
        words += [(host, "HOST"), (host.partition(".")[0], "HOST")]
    with contextlib.suppress(KeyError):  # a container may have no name for its user
        words.append((pwd.getpwuid(os.getuid()).pw_name, "USER"))
    for secret, word in words:
        # Whole names only, since "jan" is in "January", and none that are common words.
        if len(secret) > 2 and secret.lower() not in ("root", "runner", "user", "mac", "localhost"):
            pattern = rf"(?<![^\W\d_]){re.escape(secret)}(?![^\W\d_])"
            text = re.sub(pattern, word, text, flags=re.I)
    return text


def self_check(workspace: Workspace) -> Result:
    """`mlxgpt check`."""
    checks = workspace.mlxgpt("check")
    failed = [check["name"] for check in checks if check["ok"] is False]
    words = {True: "passed", False: "FAILED", None: ""}
    rows = [[check["name"], words[check["ok"]], check["detail"]] for check in checks]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [["check", "", "found"], *rows]]
    line = f"failed: {', '.join(failed)}" if failed else f"{len(checks)} checks"
    return not failed, line, render_markdown_table(cells)


def measure(workspace: Workspace, number: int) -> Result:
    """`mlxgpt bench` of one tier, with the report that it writes."""
    out = ("--output", str(workspace.home / "bench"))
    answer = workspace.mlxgpt("bench", "--tier", str(number), *out)
    workspace.machine = Machine(**answer["machine"])
    tier, body = answer["tiers"][0], Path(answer["reports"][1]).read_text(encoding="utf-8")
    line = f"{format_number(tier['training']['tokens_per_second'])} tokens/s in training, "
    line += f"{format_number(tier['generation']['tokens_per_second']['median'])} in generation"
    return True, line, re.sub("^#", "###", body, flags=re.M).splitlines()


def train(workspace: Workspace) -> Result:
    """A short training run; passes if the loss falls."""
    ended = workspace.mlxgpt(*workspace.training("whole"))
    records = workspace.metrics("whole")
    first, last = (float(records[n]["loss"] or "nan") for n in (0, -1))
    memory = format_number(records[-1]["memory_bytes"] / 1e6)
    line = f"{ended['steps']:,} steps, loss {first:.3f} to {last:.3f}, {memory} MB"
    return last < first, line, []


def kill_and_resume(workspace: Workspace) -> Result:
    """Kill a training run, resume it, and compare its checkpoint with the uninterrupted run's. On a
    GPU they may differ in bits, if those of two uninterrupted runs do.
    """
    died = kill(workspace, workspace.training("killed"), workspace.steps * 6 // 10)
    kept = workspace.checkpoints("killed")[-1].name
    ended = workspace.mlxgpt(*workspace.training("killed"))
    line = f"killed after step {died:,}, resumed from {kept} to {ended['step']:,}: "
    if not ended["resumed"]:
        return False, line + "started again, not resumed", []
    if workspace.digest("whole") == workspace.digest("killed"):
        return True, line + "the same bits as the uninterrupted run", []
    workspace.mlxgpt(*workspace.training("again"))
    repeats = workspace.digest("whole") == workspace.digest("again")
    on_gpu = workspace.machine is not None and workspace.machine.backend != "cpu"
    line += "different bits from the uninterrupted run; two uninterrupted runs have "
    return on_gpu and not repeats, line + ("the same bits" if repeats else "different bits"), []


def kill(workspace: Workspace, command: Sequence[str], step: int) -> int:
    """Start the run `killed`, kill it after `step` and a checkpoint; the last step it logged."""

    def logged() -> int:
        records = workspace.metrics("killed")
        return int(records[-1]["step"]) if records else 0

    with workspace.started([*MLXGPT, *command], {}) as (process, _, errors):
        while not (logged() >= step and workspace.checkpoints("killed")):
            if process.poll() is not None:
                reason = last_line(errors.read_text(errors="replace"))
                raise RuntimeError(f"it ended before it was killed: {reason}")
            time.sleep(0.05)
    return logged()


def run_tests(workspace: Workspace) -> Result:
    """The checkout's tests."""
    command = (sys.executable, "-m", "pytest", *workspace.tests)
    lines = workspace.run(*command, codes=(0, 1), COLUMNS="400").splitlines()  # reasons uncut
    failed = [f"    {line}" for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return not failed, lines[-1].strip("= "), failed


def last_line(text: str) -> str:
    """The last line that is neither empty nor a remedy."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("  →")]
    return lines[-1].strip() if lines else "no output"


PARTS: dict[str, Callable[[Workspace], Result]] = {
    "check": self_check,
    "tier1": lambda workspace: measure(workspace, 1),
    "tier2": lambda workspace: measure(workspace, 2),
    "training": train,
    "resume": kill_and_resume,  # compared with the run of the part before
    "tests": run_tests,  # last: they take longest
}

if __name__ == "__main__":
    sys.exit(main())
