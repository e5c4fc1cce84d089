"""Make every file operation of a command fail once, and judge the outcome.

    python -m tests.faults.sweep train resume --part 1/2 --results found.jsonl

runs all cases of these commands (default: all commands), every second one, and skips those that the
file of results has already. A case is a site (operation, class of path, innermost lines of mlxgpt),
one of its occurrences (first, middle, last) and an error.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxgpt.data import hash_cache
from tests.faults.forked import Ended, Server
from tests.faults.library import CLASSES, SHAPE, build, roots

TRAIN = f"train --tier 1 --source source/my.txt {SHAPE} --max-steps 6 --eval-interval 2 --run"
SHORT = f"train --tier 1 --source source/my.txt {SHAPE} --max-steps 2 --eval-interval 2 --run"
COMPARE = f"""compare --tier 1 --source source/my.txt {SHAPE} --vary learning_rate=1e-2,1e-3
    --budget 2steps --seeds 1 --eval-interval 1 --name mine"""

# What each command starts from is the same world: made once, and copied.
COMMANDS = {
    "train": f"{TRAIN} new",
    "resume": f"{TRAIN} half",
    "prepare": "prepare source/my.txt source/other.txt --name fresh",
    "prepare-bpe": "prepare source/my.txt --tokenizer bpe --vocab-size 280 --name pieces",
    "prepare-resumed": "prepare source/other.txt source/my.txt --name begun",
    "import": "import source/hf --run imported",
    "export": "export --run done --to hf --out export/hf",
    "export-gguf": "export --run done --to gguf --out export/gguf",
    "eval": "eval --run done --json",
    "eval-source": "eval --run done --source source/short.txt --json",
    "generate": "generate The --run done --seed 1 --max-tokens 20 --json",
    "compare": COMPARE,
    "report": "report done --output export/page.html",
    "runs": "runs --json",
    "info": "info --run done --json",
}
WORLD = (f"{TRAIN} done", "export --run done --to hf --out source/hf")
INTERRUPTED = {"half": "resume", "begun": "prepare-resumed"}

WRITING = {"create", "write", "pwrite", "writev", "fsync", "fdatasync", "close", "rename", "mkdir"}
WORDS = {
    errno.EIO: "disk",
    errno.ENOSPC: "space",
    errno.EMFILE: "open files",
    errno.EACCES: "permissions",
    errno.ENOMEM: "memory",
}
WRONG = ("free some space", "permission", "open files", "prepare the", "train it", "copy it again")
# Times, and what is only remembered.
VOLATILE = {"history.jsonl", hash_cache.CACHE_FILENAME, "ledger.jsonl", "mine.md"}
STEADY = ("step", "loss", "lr", "grad_norm", "val_loss")


@dataclass(frozen=True)
class Case:
    """A fault: the operation of this number at this site fails with this errno."""

    command: str
    site: str
    at: int
    errno: int
    mode: str = "once"


@dataclass(frozen=True)
class Result:
    """The outcome of a case: `same`, `warned` and `stopped` are right, `missed` is a
    site that was not reached, all else is a defect.
    """

    case: Case
    verdict: str
    detail: str = ""


GOOD = ("same", "warned", "stopped", "missed")


def errors_of(operation: str) -> tuple[int, int]:
    """The two errnos that an operation is tried with."""
    if operation in WRITING:
        return errno.EIO, errno.ENOSPC
    if operation == "open":
        return errno.EIO, errno.EMFILE
    return errno.EIO, errno.ENOMEM if operation == "mmap" else errno.EACCES


class Sweep:
    """Runs cases in copies of one world.

    Args:
        server: runs the commands.
        folder: of the world, its copies and logs.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._world = folder / "world"
        self._work = folder / "work"  # always the same, as its name is in some files
        self._counter = folder / "count"
        self._wholes: dict[str, tuple[Ended, dict[str, str]]] = {}
        self._make_world()

    def cases(self, command: str) -> list[Case]:
        """All cases of a command: each site's first, middle and last occurrence, two errors each,
        and every eighth site for good. Also runs it undisturbed.
        """
        log = self._folder / "operations"
        log.unlink(missing_ok=True)
        self._fresh()
        ended = self._run(command, {**roots(self._work), "FAULT_LOG": str(log)})
        assert ended.code == 0, ended.err
        self._wholes[command] = ended, state(self._work)
        sites = Counter(
            " ".join(line.split(" ")[:3]) for line in log.read_text(errors="replace").splitlines()
        )
        found = []
        for site, count in sorted(sites.items()):
            for number in errors_of(site.split(" ")[0]):
                for at in sorted({1, (count + 1) // 2, count}):
                    found.append(Case(command, site, at, number))
                if hashlib.sha256(site.encode()).digest()[0] % 8 == 0:
                    found.append(Case(command, site, 1, number, "always"))
        return found

    def run(self, case: Case) -> Result:
        """Run one case and judge it."""
        self._fresh()
        before = kept(self._work)
        ended = self._run(
            case.command,
            {
                **roots(self._work),
                "FAULT_SITE": case.site,
                "FAULT_AT": str(case.at),
                "FAULT_ERRNO": str(case.errno),
                "FAULT_MODE": case.mode,
                "FAULT_COUNT": str(self._counter),
            },
        )
        verdict, detail = self._judge(case, ended, before)
        return Result(case, verdict, detail)

    def _judge(self, case: Case, ended: Ended, before: Mapping[str, Any]) -> tuple[str, str]:
        if int.from_bytes(self._counter.read_bytes(), "little") < case.at:
            return "missed", ""  # another order of threads; nothing failed
        whole, wanted = self._wholes[case.command]
        kind = case.site.split(" ")[1]
        lines = ended.err.strip().splitlines()
        if ended.code is None:
            return "hangs", ended.err[-500:]
        if "Traceback" in ended.err:
            return "traceback", ended.err[-1500:]
        if ended.code not in (0, 2):
            return "aborts", f"exit {ended.code}: {ended.err[-500:]}"
        if lost := missing(before, kept(self._work)):
            return "loses", f"{lost}; {ended.err[-500:]}"
        if ended.code == 0:
            now = state(self._work)
            different = differing(now, wanted)
            same_output = kind == "log" or _steady_output(ended.out) == _steady_output(whole.out)
            if not different and same_output:
                return "same", ""
            warned = os.strerror(case.errno) in ended.err
            if warned and all("/snapshots/" in name for name in different):
                return "warned", ended.err[-300:]
            return "another result", f"{different[:5]} {ended.out[-200:]} {ended.err[-300:]}"
        if kind != "log" and (problem := unclear(case, lines)):
            return problem, "\n".join(lines[-3:])
        again = self._run(case.command, {})
        if kind == "log" and " exists" in again.err and not differing(state(self._work), wanted):
            return "stopped", ended.err[-300:]  # only the result was not printed
        if again.code != 0:
            return "cannot be repeated", f"{lines[-2:]} then {again.err[-500:]}"
        now = state(self._work)
        if different := differing(now, wanted):
            return "ends differently", f"{different[:5]} {lines[-2:]}"
        if _steady_output(again.out) != _steady_output(whole.out):
            return "answers differently", f"{again.out[-300:]}"
        return "stopped", ended.err[-300:]

    def _run(self, command: str, env: Mapping[str, str]) -> Ended:
        self._counter.write_bytes(bytes(8))
        return self._server.run(shlex.split(COMMANDS[command]), self._work, self._env(env))

    def _env(self, env: Mapping[str, str]) -> Mapping[str, str]:
        # Python's own temporary folder; and numbers of the same length wherever it is.
        return {"MLXGPT_HOME": str(self._work), "TMPDIR": str(self._work / "tmp"), **env}

    def _fresh(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._world, self._work, symlinks=True)

    def _make_world(self) -> None:
        shutil.rmtree(self._world, ignore_errors=True)
        for name in CLASSES:
            (self._world / name).mkdir(parents=True)
        draw = random.Random(7)
        words = ["The", "fox", "and", "a", "dog", "ran", "over", "there", "again."]
        for name in ("my.txt", "other.txt"):
            text = "\n".join(" ".join(draw.choices(words, k=12)) for _ in range(700))
            (self._world / "source" / name).write_text(text)
        (self._world / "source" / "short.txt").write_text("The dog ran over there again.")
        self._work.mkdir(exist_ok=True)
        self._fresh()
        for line in WORLD:
            ended = self._server.run(shlex.split(line), self._work, self._env({}))
            assert ended.code == 0, ended.err
        self._keep()
        for name, command in INTERRUPTED.items():
            self._interrupt(name, command)

    def _keep(self) -> None:
        shutil.rmtree(self._world)
        shutil.copytree(self._work, self._world, symlinks=True)

    def _interrupt(self, name: str, command: str) -> None:
        """Kill a command where there is something to continue from."""
        log = self._folder / "operations"
        log.unlink(missing_ok=True)
        self._run(command, {**roots(self._work), "FAULT_LOG": str(log)})
        count = len(log.read_bytes().splitlines())
        for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
            self._fresh()
            kill = {"FAULT_MODE": "kill", "FAULT_AT": str(int(share * count))}
            self._run(command, {**roots(self._work), **kill, "FAULT_COUNT": str(self._counter)})
            checkpoints = list((self._work / "runs" / name).glob("checkpoints/step-*"))
            if len(checkpoints) >= 2 or (self._work / f"data/.{name}.new/progress.json").exists():
                self._keep()
                return
        raise AssertionError(f"{command} was never killed with something to continue from")


def unclear(case: Case, lines: list[str]) -> str:
    """What is wrong with the two lines that a stopped command ended with; empty if nothing."""
    if len(lines) < 2 or not lines[-1].startswith("  → "):
        return "unclear message"
    problem, remedy = lines[-2], lines[-1].removeprefix("  → ")
    if not problem.startswith("mlxgpt: ") or os.strerror(case.errno) not in problem:
        return "unclear message"
    if not re.search(rf"\b({'|'.join(CLASSES)})\b", problem):
        return "names no file"
    right = WORDS[case.errno]
    wrong = [word for word in WRONG if right not in word and word not in right]
    if right not in remedy or any(word in remedy for word in wrong):
        return "wrong remedy"
    return ""


def differing(now: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Names of files that differ. An old checkpoint that could not be deleted does not count."""
    names = {name for name in now if "/checkpoints/step-" not in name} | {*wanted}
    return sorted(name for name in names if now.get(name) != wanted.get(name))


def state(work: Path) -> dict[str, str]:
    """The hash of each file in a work folder, by name, but for hidden ones, logs, and times."""
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or name.parts[0] in ("log", "tmp"):
            continue
        if path.name in VOLATILE:
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            records = map(json.loads, content.splitlines())
            content = repr([{k: r.get(k) for k in STEADY} for r in records]).encode()
        elif path.suffix == ".json":
            content = repr(_without_times(json.loads(content))).encode()
        elif path.suffix == ".html":
            content = b"a page"
        found[str(name)] = hashlib.sha256(content).hexdigest()
    return found


def kept(work: Path) -> dict[str, Any]:
    """What a command may not lose: sources, data, exports; of each run its metrics' steps, samples
    and history, and its checkpoints.
    """
    found: dict[str, Any] = {
        name: content
        for name, content in state(work).items()
        if name.startswith(("source/", "data/", "export/"))
    }
    for name in ("progress.json", "meta.json"):
        for begun in work.glob(f"data/.*.new/{name}"):
            found[str(begun.relative_to(work))] = True
    for run in work.glob("runs/**/run.json"):
        name = str(run.parent.relative_to(work))
        steps = [int(p.name[5:]) for p in (run.parent / "checkpoints").glob("step-*")]
        newest = max(steps, default=0)
        found[f"{name} newest"] = newest
        for notes in ("metrics.jsonl", "history.jsonl"):
            path = run.parent / notes
            lines = path.read_text().splitlines() if path.exists() else []
            records = [json.loads(line)["step"] for line in lines if line.endswith("}")]
            found[f"{name} {notes}"] = {step for step in records if step <= newest}
        path = run.parent / "samples.txt"
        text = path.read_text(errors="replace") if path.exists() else ""
        heads = [int(line[9:]) for line in text.splitlines() if line.startswith("--- step ")]
        found[f"{name} samples"] = {step for step in heads if step <= newest}
        if (best := run.parent / "best.json").exists():
            found[f"{name} best"] = json.loads(best.read_text())["val_loss"]
    return found


def missing(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first thing that was kept before and is lost after; empty if nothing is."""
    for name, value in before.items():
        if name.startswith("data/.") and name not in after:
            scratch, finished = (
                name.rsplit("/", 1)[0],
                name.removeprefix("data/.").split(".new/")[0],
            )
            if f"{scratch}/meta.json" in after:  # only its name is still missing
                continue
            if any(other.startswith(f"data/{finished}/") for other in after):
                continue
        if name not in after:
            return f"{name} is gone"
        now = after[name]
        if isinstance(value, set):
            if value - now:
                return f"{name}: {sorted(value - now)} are gone"
        elif isinstance(value, int) and not isinstance(value, bool):
            if now < value:
                return f"{name}: {now} instead of {value}"
        elif isinstance(value, float):
            if now > value:
                return f"{name}: {now} instead of {value}"
        elif now != value:
            return f"{name} has changed"
    return ""


TIMES = ("seconds", "time", "date", "tokens_per_second", "created", "memory", "share", "folder")


def _without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        kept = {k: v for k, v in tree.items() if not any(word in k for word in TIMES)}
        return {k: _without_times(v) for k, v in kept.items() if k not in ("seal", "sha256")}
    return [_without_times(item) for item in tree] if isinstance(tree, list) else tree


def _steady_output(text: str) -> Any:
    try:
        return _without_times(json.loads(text))
    except ValueError:
        return text


def sweep(commands: list[str], part: str, results: Path) -> Iterator[Result]:
    """Run the cases of some commands that the file of results does not have yet."""
    first, every = map(int, part.split("/"))
    known = results.read_text().splitlines() if results.exists() else []
    done = {json.dumps(json.loads(line)["case"], sort_keys=True) for line in known}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Server(build(folder)) as server:
            runner = Sweep(server, folder)
            for command in commands:
                cases = runner.cases(command)
                sites = len({case.site for case in cases})
                print(f"{command}: {sites} sites, {len(cases)} cases", flush=True)
                for case in cases[first - 1 :: every]:
                    if json.dumps(asdict(case), sort_keys=True) in done:
                        continue
                    result = runner.run(case)
                    with results.open("a") as file:
                        file.write(json.dumps(asdict(result)) + "\n")
                    yield result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    for result in sweep(given.commands, given.part, given.results):
        if result.verdict not in GOOD:
            print(result.verdict, asdict(result.case), result.detail, sep="\n  ", flush=True)
    for command in given.commands:
        rows = [json.loads(line) for line in given.results.read_text().splitlines()]
        rows = [row for row in rows if row["case"]["command"] == command]
        sites = len({row["case"]["site"] for row in rows})
        print(command, f"{sites} sites", dict(Counter(row["verdict"] for row in rows)), sep=", ")


if __name__ == "__main__":
    main()
