"""Report of what mlxgpt does on this machine, as one Markdown file: for Macs and NVIDIA GPUs.

    make report-machine [SOURCE=my.txt] [ARGS="--out DIR --skip tests"]

In some twenty minutes: the machine, the self-check, the speed of both tiers, half a minute of
Tier 1, the same killed and resumed, a sample, and the tests. Every part runs in processes of its
own, and the file is written after each part: an error or Ctrl-C loses no other part. The report
contains generated text, so SOURCE should not be private. Exit code 1 if a part failed, 2 if the
report could not start, 130 if it was stopped.
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mlxgpt import files
from mlxgpt.errors import UserError
from mlxgpt.machine import mac
from mlxgpt.reports import report
from mlxgpt.reports.markdown import figure, table
from mlxgpt.reports.records import Machine, Measurement

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 3600.0  # seconds that one command may take
STEPS = 200  # of a training run whose speed is unknown
FEWEST_STEPS = 30  # that leave something to kill between two logged steps
INTERRUPTED = 130
DESCRIBE = (
    "import dataclasses, json; from mlxgpt.reports import bench; "
    "print(json.dumps(dataclasses.asdict(bench.describe_machine())))"
)
# What the system says about power and heat, each printed as it is.
QUESTIONS = (
    ("/usr/sbin/sysctl", "-n", "hw.model"),
    ("/usr/bin/pmset", "-g", "batt"),
    ("/usr/bin/pmset", "-g", "therm"),
    (
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,temperature.gpu,power.draw,clocks.sm",
        "--format=csv",
    ),
)

Result = tuple[bool, str, list[str]]  # passed, one line, lines of Markdown


@dataclass
class Lab:
    """A temporary folder with the report's data and runs.

    Attributes:
        home: the folder.
        source: the text to learn; None for Tier 1's own.
        train: arguments of every `mlxgpt train`.
        tests: arguments of pytest.
        minutes: of the first training run; the others have as many steps.
        machine, steps: found out by the first parts.
    """

    home: Path
    source: Path | None = None
    train: Sequence[str] = ("--tier", "1")
    tests: Sequence[str] = ("-rfE", "--tb=no")
    minutes: float = 0.5
    machine: Machine | None = None
    steps: int = STEPS

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
            printed, said = output.read_text(errors="replace"), errors.read_text(errors="replace")
        if code not in codes:
            raise RuntimeError(f"exit code {code}: {last_line(said or printed)}")
        return printed

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

    def mlxgpt(self, *line: str, **environment: str) -> Any:
        """What a command of mlxgpt prints as JSON."""
        codes = (0, 1) if line[0] == "check" else (0,)
        return json.loads(self.run(*MLXGPT, *line, "--json", codes=codes, **environment))

    def training(self, name: str, *more: str) -> list[str]:
        """Arguments that train the run `name` on the same text as the other runs."""
        source = ["--source", str(self.source)] if self.source else []
        return ["train", *self.train, *source, "--run", name, "--log-interval", "10", *more]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The records in a run's metrics.jsonl; a line that is not complete is left out."""
        records = []
        with contextlib.suppress(OSError):
            for line in (self.home / "runs" / name / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
        return records

    def logged(self, name: str) -> int:
        """The last step in a run's metrics."""
        return int(self.metrics(name)[-1]["step"]) if self.metrics(name) else 0

    def checkpoints(self, name: str) -> list[Path]:
        """A run's checkpoints, the newest last."""
        return sorted((self.home / "runs" / name / "checkpoints").glob("step-*"))

    def digest(self, name: str) -> str:
        """A hash of the weights and moments in a run's newest checkpoint."""
        digest = hashlib.sha256()
        for path in sorted(self.checkpoints(name)[-1].glob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


MLXGPT = (sys.executable, "-m", "mlxgpt")


def main(arguments: Sequence[str] | None = None, lab: Lab | None = None) -> int:
    """Write a report; the exit code."""
    parser = argparse.ArgumentParser(prog="report-machine", description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, metavar="FILE", help="a text to learn")
    parser.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "benchmarks/reports")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], metavar="PART", help=SKIP)
    args = parser.parse_args(arguments)
    # All stop it as Ctrl-C does. A shell ignores SIGINT for background jobs, and the tests need it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        mac.refuse_others()
        with mac.awake(), tempfile.TemporaryDirectory(prefix="mlxgpt-") as folder:
            lab = lab or Lab(Path(folder).resolve())
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()
            if args.source:  # a copy, whose name says nothing
                lab.source = lab.home / f"text{args.source.suffix}"
                shutil.copyfile(args.source, lab.source)
            return write_report(lab, args.out, [name for name in PARTS if name not in args.skip])
    except UserError as error:
        problem, remedy = error.problem, error.remedy
    except OSError as error:
        problem = f"cannot use {error.filename or args.out}: {error.strerror}"
        remedy = "choose another text or folder: --source FILE --out DIR"
    say(f"report-machine: {problem}\n  → {remedy}")
    return 2


def write_report(lab: Lab, folder: Path, names: Sequence[str]) -> int:
    """Run the parts, and write the report after each; the exit code."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    results: dict[str, Result] = {}
    path: Path | None = None
    code = 0
    for name in names:
        say(f"{name} …")
        try:
            results[name] = PARTS[name](lab)
        except Exception as error:
            problem = error.problem if isinstance(error, UserError) else last_line(str(error))
            known = isinstance(error, UserError | RuntimeError)
            results[name] = (False, problem if known else f"{type(error).__name__}: {problem}", [])
        except KeyboardInterrupt:
            results[name], code = (False, "stopped", []), INTERRUPTED
        passed, line, _ = results[name]
        say(f"  {'passed' if passed else 'FAILED'}: {line}")
        path = path or unused_path(lab, folder, date)
        files.write_atomically(path, private(render(lab, date, results)))
        if code:
            break
    say(f"written to {path}")
    return code or int(not all(passed for passed, _, _ in results.values()))


def unused_path(lab: Lab, folder: Path, date: str) -> Path:
    """A path such as 2026-11-22-m1-max-machine.md that does not exist."""
    stem = report.slug(Measurement(date, lab.machine, ())) if lab.machine else date[:10]
    path, number = folder / f"{stem}-machine.md", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-machine-{number}.md"
    return path


def render(lab: Lab, date: str, results: dict[str, Result]) -> str:
    """The whole report as Markdown."""
    chip = lab.machine.chip if lab.machine else "an unknown machine"
    lines = [f"# mlxgpt on {chip}, {date[:10]}", ""]
    if lab.machine and lab.machine.backend == "cpu":
        lines += ["Made on a CPU: no figure here is about a GPU.", ""]
    lines += ["Written by `make report-machine`. Names and folders were removed; look at it all"]
    lines += ["the same before you add it to `benchmarks/reports/` in a pull request.", ""]
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


def describe(lab: Lab) -> Result:
    """Hardware, software, power and heat."""
    lab.machine = m = Machine(**json.loads(lab.run(sys.executable, "-c", DESCRIBE)))
    wheel = ["MLX wheel", wheel_tag()]
    line = f"{m.chip}, {m.memory / 1e9:.1f} GB, MLX on {m.backend}"
    return True, line, [*escaped([*report.machine_rows(m), wheel]), "", *system_state()]


def wheel_tag() -> str:
    """For which system MLX's wheel was built, as py3-none-macosx_26_0_arm64."""
    for name in ("mlx-metal", "mlx-cuda-13", "mlx-cuda-12", "mlx"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            wheel = metadata.distribution(name).read_text("WHEEL") or ""
            if found := re.search("^Tag: (.+)$", wheel, re.M):
                return f"{name} {found[1]}"
    return "unknown"


def system_state() -> list[str]:
    """What the system prints about power and heat now, as a code block."""
    lines = []
    for question in QUESTIONS:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(
                question, capture_output=True, text=True, timeout=20, check=True
            )
            lines += answer.stdout.rstrip().splitlines()
    return code_block("\n".join(lines) or "power and heat: unknown")


def self_check(lab: Lab) -> Result:
    """`mlxgpt check`."""
    checks = lab.mlxgpt("check")
    failed = [check["name"] for check in checks if check["ok"] is False]
    words = {True: "passed", False: "FAILED", None: ""}
    rows = [[check["name"], words[check["ok"]], check["detail"]] for check in checks]
    line = f"failed: {', '.join(failed)}" if failed else f"{len(checks)} checks"
    return not failed, line, escaped([["check", "", "found"], *rows])


def measure(lab: Lab, number: int, **environment: str) -> Result:
    """`mlxgpt bench` of one tier, with the report that it writes."""
    out = ("--out", str(lab.home / "bench"))
    found = lab.mlxgpt("bench", "--tier", str(number), *out, **environment)
    tier, body = found["tiers"][0], Path(found["reports"][1]).read_text(encoding="utf-8")
    line = f"{figure(tier['training']['tokens_per_second'])} tokens/s in training, "
    line += f"{figure(tier['generation']['tokens_per_second']['median'])} in generation"
    return True, line, re.sub("^#", "###", body, flags=re.M).splitlines()


def more_ops_per_buffer(lab: Lab) -> Result:
    """Tier 1 with 200 operations in a command buffer, where MLX's default on Metal is 20 to 50.
    Never for large models, whose command buffers would run too long for the watchdog of macOS.
    """
    if lab.machine is None or lab.machine.backend != "metal":
        return True, "only on Metal", []
    passed, line, _ = measure(lab, 1, MLX_MAX_OPS_PER_BUFFER="200")
    return passed, line, []


def train(lab: Lab) -> Result:
    """A short training run; passes if the loss falls."""
    ended = lab.mlxgpt(*lab.training("first", "--max-minutes", str(lab.minutes)))
    records, lab.steps = lab.metrics("first"), max(FEWEST_STEPS, ended["steps"])
    first, last = (float(records[n]["loss"] or "nan") for n in (0, -1))
    fifth = max(1, len(records) // 5)
    rates = [
        figure(statistics.median(record["tokens_per_second"] for record in part))
        for part in (records[:fifth], records[-fifth:])
    ]
    memory = figure(records[-1]["memory_bytes"] / 1e6)
    line = (
        f"{ended['steps']:,} steps of {'SOURCE' if lab.source else Path(ended['data']).name}, loss "
    )
    line += f"{first:.3f} to {last:.3f}, {rates[0]} tokens/s in the first fifth, {rates[1]} in the "
    line += f"last, {memory} MB"
    return last < first, line, ["Power and heat after it:", "", *system_state()]


def kill_and_resume(lab: Lab) -> Result:
    """Kill a training run, resume it, and compare its checkpoint with an uninterrupted run's.
    Off the CPU a difference passes if two uninterrupted runs differ as well.
    """
    save = str(max(1, lab.steps // 4))
    more = ("--max-steps", str(lab.steps), "--save-interval", save, "--eval-interval", save)
    lab.mlxgpt(*lab.training("whole", *more))
    died = kill(lab, lab.training("killed", *more), lab.steps * 6 // 10)
    kept = lab.checkpoints("killed")[-1].name
    ended = lab.mlxgpt(*lab.training("killed", *more))
    line = f"killed after step {died:,}, resumed from {kept} to {ended['step']:,}: "
    if not ended["resumed"]:
        return False, line + "started again, not resumed", []
    if lab.digest("whole") == lab.digest("killed"):
        return True, line + "the same bits as without an interruption", []
    lab.mlxgpt(*lab.training("twin", *more))
    repeats = lab.digest("whole") == lab.digest("twin")
    line += "other bits than without an interruption; two uninterrupted runs have "
    on_gpu = lab.machine is not None and lab.machine.backend != "cpu"
    return on_gpu and not repeats, line + ("the same bits" if repeats else "different bits"), []


def kill(lab: Lab, line: Sequence[str], step: int) -> int:
    """Start the run `killed`, kill it after `step` and a checkpoint; the last step it logged."""
    with lab.started([*MLXGPT, *line], {}) as (process, _, errors):
        while not (lab.logged("killed") >= step and lab.checkpoints("killed")):
            if process.poll() is not None:
                said = last_line(errors.read_text(errors="replace"))
                raise RuntimeError(f"it ended before it was killed: {said}")
            time.sleep(0.05)
    return lab.logged("killed")


def generate(lab: Lab) -> Result:
    """A sample from the first run; passes if the same seed gives the same text twice."""
    line = ("generate", "--run", "first", "--seed", "1", "--max-tokens", "200")
    samples = [lab.mlxgpt(*line) for _ in range(2)]
    texts = [sample["texts"][0] for sample in samples]
    rates = " and ".join(figure(sample["tokens_per_second"]) for sample in samples)
    same = texts[0] == texts[1]
    body = [line for text in dict.fromkeys(texts) for line in (*code_block(text), "")]
    return same, f"{rates} tokens/s, {'the same text' if same else 'two texts of one seed'}", body


def run_tests(lab: Lab) -> Result:
    """The checkout's tests."""
    command = (sys.executable, "-m", "pytest", *lab.tests)
    lines = lab.run(*command, codes=(0, 1), COLUMNS="400").splitlines()  # else reasons are cut
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return not failed, lines[-1].strip("= "), code_block("\n".join(failed)) if failed else []


def last_line(text: str) -> str:
    """The last line that is neither empty nor a remedy."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("  →")]
    return lines[-1].strip() if lines else "no output"


def escaped(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table of any cells."""
    return table([[cell.replace("|", "\\|") for cell in row] for row in rows])


def code_block(text: str) -> list[str]:
    """A text in which nothing is read as Markdown."""
    return [f"    {line}".rstrip() for line in text.splitlines()]


def say(line: str) -> None:
    """Show progress."""
    print(line, file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[Lab], Result]] = {
    "machine": describe,
    "check": self_check,
    "tier1": lambda lab: measure(lab, 1),
    "tier2": lambda lab: measure(lab, 2),
    "ops-per-buffer": more_ops_per_buffer,
    "training": train,
    "resume": kill_and_resume,
    "generation": generate,
    "tests": run_tests,  # last: they take longest
}
SKIP = f"leave parts out: {', '.join(PARTS)}"

if __name__ == "__main__":
    sys.exit(main())
