"""Describe this machine, check it, and describe the newest run, for an issue: `mlxgpt doctor`.

Each part runs in a process of its own, since MLX aborts the process where it finds no Metal device
(ml-explore/mlx#3148), and a GPU may hang. Nothing heavy is imported outside the parts, so that one
with a broken library does not affect the others.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxgpt import __version__
from mlxgpt.backend import memory_limits
from mlxgpt.config import SECTION_BY_FIELD
from mlxgpt.config.resolve import resolve_config, resolve_folder
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.redact import redact

if TYPE_CHECKING:
    from mlxgpt.storage.logs import RunLogs

PACKAGE_ROOT = Path(__file__).parents[2]  # folder of the package: a checkout or site-packages
CHILD_CODE = (
    "import sys; sys.path.append(sys.argv[1]); from mlxgpt.bench import doctor; "
    "doctor.print_part(sys.argv[2])"
)
PART_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is None if it only informs."""

    name: str
    ok: bool | None
    detail: str


def run_part(part: str) -> list[Finding]:
    """Run a part in a child process. Never raises for a failure, which is its last finding."""
    # -P: modules in the current folder, such as a user's random.py, are not imported.
    command = [sys.executable, "-P", "-c", CHILD_CODE, str(PACKAGE_ROOT), part]
    failure = ""
    stdout = stderr = b""
    try:
        child = subprocess.run(command, capture_output=True, timeout=PART_TIMEOUT, check=False)
        stdout, stderr = child.stdout, child.stderr
        if code := child.returncode:
            reason = signal.Signals(-code).name if code < 0 else f"code {code}"
            last_lines = stderr.decode(errors="replace").strip().splitlines()[-1:]
            failure = ": ".join([f"the process ended with {reason}", *last_lines])
    except subprocess.TimeoutExpired as error:
        stdout, failure = error.stdout or b"", f"no result after {PART_TIMEOUT:.0f} s"
    except OSError as error:
        failure = _describe_error(error)
    findings = []
    for line in stdout.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a library may print, too
            findings.append(Finding(**json.loads(line)))
    if failure:
        findings.append(Finding("error", False, failure))
    return [replace(finding, detail=_remove_private(finding.detail)) for finding in findings]


def print_part(part: str) -> None:
    """Print a part's findings as JSON lines, the last one for an error. Runs in the child."""
    try:
        for finding in PARTS[part]():
            print(json.dumps(asdict(finding)), flush=True)
    except Exception as error:
        print(json.dumps(asdict(Finding("error", False, _describe_error(error)))))


def render_findings(report: Mapping[str, Sequence[Finding]]) -> str:
    """Render the report as a fenced block of Markdown."""
    marks = {None: "", True: "ok: ", False: "FAILED: "}
    lines = []
    for part, findings in report.items():
        width = max((len(finding.name) for finding in findings), default=0)
        lines += ["", part]
        lines += [f"  {f.name:{width}}  {marks[f.ok]}{f.detail}" for f in findings]
    text = "\n".join(lines[1:]).replace("```", "'''")
    return f"```text\n{text}\n```"


def _describe_error(error: Exception) -> str:
    """One line for an error, without the name of a file."""
    if isinstance(error, UserError):
        return error.problem
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ": ".join([type(error).__name__, *message.strip().splitlines()[:1]])


# An absolute path, one that starts with . or ~, or one in a folder that `redact` has replaced.
PATH_PATTERN = re.compile(
    r"(?<![\w/])(?:[.~]{0,2}|CHECKOUT|CURRENT|TEMP|HOME)(?:/[^\s/'\"`:;,]+)+/?"
)


def _remove_private(text: str) -> str:
    """Replace user and host names, and paths; control characters become spaces."""
    folders = {"CHECKOUT": PACKAGE_ROOT}
    with contextlib.suppress(OSError):  # it may be gone
        folders["CURRENT"] = Path.cwd()
    text = PATH_PATTERN.sub("PATH", redact(text, folders))
    return re.sub(r"[\0-\x1f\x7f-\x9f]+", " ", text)


LIBRARIES = ("mlx", "numpy", "datasets", "tokenizers")


def _find_software() -> Iterator[Finding]:
    yield Finding("mlxgpt", None, __version__)
    yield Finding("Python", None, f"{platform.python_version()}, {platform.machine()}")
    for name in LIBRARIES:
        try:
            yield Finding(name, None, version(name))
        except PackageNotFoundError:
            yield Finding(name, False, "not installed")
    yield Finding("system", None, platform.platform())


def _find_limits() -> Iterator[Finding]:
    for limit in memory_limits.memory_limits():
        detail = f"{limit.total / 1e9:,.1f} GB, {limit.free / 1e9:,.1f} GB of them free"
        yield Finding(limit.name, None, detail)
    for kind in ("runs", "data"):
        folder = resolve_folder(kind).absolute()
        while not files.exists(folder):
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        yield Finding(f"free disk at {kind}/", None, f"{free / 1e9:,.1f} GB")


def _describe_device() -> Iterator[Finding]:
    from mlxgpt.backend import device, environment
    from mlxgpt.bench import report, speed

    for name, value in environment.describe_environment().items():
        if name not in ("mlxgpt", "mlx", "ranks"):
            yield Finding(name, None, value)
    yield Finding("free memory", None, f"{device.free_memory_bytes() / 1e9:,.1f} GB")
    machine = replace(speed.describe_machine(), versions={})
    for name, value in report.format_machine_rows(machine)[1:]:
        if name not in ("chip", "system", "MLX device", "BLAS"):
            yield Finding(name, None, value)


def _run_self_check() -> Iterator[Finding]:
    from mlxgpt.training import selfcheck

    for result in selfcheck.run_self_check(resolve_config(1)[1]):
        yield Finding(result.name, result.ok, result.detail)


MAX_EVENTS, MAX_RECORDS = 10, 5  # lines of the logs


def _describe_newest_run() -> Iterator[Finding]:
    from mlxgpt.storage import info, run
    from mlxgpt.storage.logs import RunLogs

    folders = run.list_run_folders(resolve_folder("runs"), skip_unreadable=True)
    if not folders:
        yield Finding("newest run", None, "there is no run in runs/")
        return
    folder = folders[0]
    try:
        summary = info.summarize_run(run.open_run(folder))
        is_finished = "finished" if summary.step >= summary.steps else "not finished"
        plan = f"{summary.step:,} of {summary.steps:,}, {is_finished}"
        yield Finding("saved step", None, plan if summary.steps else "imported, not trained")
        best = "none yet" if summary.val_loss is None else f"{summary.val_loss:.4f}"
        yield Finding("best validation loss", None, best)
        yield Finding("parameters", None, f"{summary.parameters:,}")
    except Exception as error:  # the logs may be intact
        detail = _describe_error(error).replace(str(folder), "RUN")
        # What is quoted comes from the files.
        detail = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", detail)
        yield Finding("error", False, detail)
    yield from _describe_logs(RunLogs(folder))


def _describe_logs(logs: RunLogs) -> Iterator[Finding]:
    """The last events of the history, and the first and the last records of the metrics."""
    from mlxgpt.backend.environment import environment_changes

    events: deque[Finding] = deque(maxlen=MAX_EVENTS)
    before: dict[str, str] = {}
    for record in logs.history():
        event = f"step {record['step']:,}, {str(record.get('time', ''))[:25]}: "
        if "spiked" in record:
            event += f"rolled back after a loss spike at step {record['spiked']}"
        else:
            now = {str(k): str(v)[:100] for k, v in _as_dict(record.get("on")).items()}
            settings = [n for n in _as_dict(record.get("changed")) if n in SECTION_BY_FIELD]
            changes = environment_changes(before, now) if before else []
            changes += [f"{name} changed" for name in settings]
            first = ", ".join(f"{name} {value}" for name, value in now.items())
            event += f"resumed; {', '.join(changes) or 'same environment'}" if before else first
            before = now
        events.append(Finding("event", None, event))
    yield from events
    records = list(logs.metrics())
    for record in records[:-MAX_RECORDS][:1] + records[-MAX_RECORDS:]:
        values = [f"{name} {_format_value(v)}" for name, v in record.items() if name != "step"]
        yield Finding(f"step {record['step']:,}", None, ", ".join(values))
    if not records:
        yield Finding("metrics", None, "none")


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _format_value(value: Any) -> str:
    """A number with six digits; metrics have null for NaN and infinity."""
    return f"{value:.6g}" if isinstance(value, int | float) else "not finite"


PARTS: dict[str, Callable[[], Iterator[Finding]]] = {
    "software": _find_software,
    "memory limits and disk": _find_limits,
    "device": _describe_device,
    "self-check": _run_self_check,
    "newest run": _describe_newest_run,
}
