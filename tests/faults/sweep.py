"""Make each file operation of a command fail once, and check the outcome.

    python -m tests.faults.sweep train resume --part 1/2 --results found.jsonl

runs every second case of these commands (default: all commands), except those that are already in
the results file. A case is a site (operation, path class, innermost lines of mlxgpt), one of its
occurrences (first, middle or last) and an error.
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
from tests.faults.forked import CommandResult, ForkServer
from tests.faults.library import MODEL_FLAGS, WORK_FOLDERS, build_fault_library, fault_roots_env

TRAIN_COMMAND = (
    f"train --tier 1 --source source/my.txt {MODEL_FLAGS} --max-steps 6 --eval-interval 2 --run"
)
SHORT_TRAIN_COMMAND = (
    f"train --tier 1 --source source/my.txt {MODEL_FLAGS} --max-steps 2 --eval-interval 2 --run"
)
COMPARE_COMMAND = f"""compare --tier 1 --source source/my.txt {MODEL_FLAGS}
    --vary learning_rate=1e-2,1e-3
    --budget 2steps --seeds 1 --eval-interval 1 --name mine"""

# All commands start from copies of the same work folder, which is created once.
COMMANDS = {
    "train": f"{TRAIN_COMMAND} new",
    "resume": f"{TRAIN_COMMAND} half",
    "prepare": "prepare source/my.txt source/other.txt --name fresh",
    "prepare-bpe": "prepare source/my.txt --tokenizer bpe --vocab-size 280 --name pieces",
    "prepare-resumed": "prepare source/other.txt source/my.txt --name begun",
    "import": "import source/hf --run imported",
    "export": "export --run done --to hf --output export/hf",
    "export-gguf": "export --run done --to gguf --output export/gguf",
    "eval": "eval --run done --json",
    "eval-source": "eval --run done --source source/short.txt --json",
    "generate": "generate The --run done --seed 1 --max-tokens 20 --json",
    "compare": COMPARE_COMMAND,
    "report": "report done --output export/page.html",
    "runs": "runs --json",
    "info": "info --run done --json",
}
WORLD_COMMANDS = (f"{TRAIN_COMMAND} done", "export --run done --to hf --output source/hf")
INTERRUPTED_COMMANDS = {"half": "resume", "begun": "prepare-resumed"}

WRITE_OPERATIONS = {
    "create",
    "write",
    "pwrite",
    "writev",
    "fsync",
    "fdatasync",
    "close",
    "rename",
    "mkdir",
}
REMEDY_WORDS = {
    errno.EIO: "disk",
    errno.ENOSPC: "space",
    errno.EMFILE: "open files",
    errno.EACCES: "permissions",
    errno.ENOMEM: "memory",
}
OTHER_REMEDIES = (
    "free some space",
    "permission",
    "open files",
    "prepare the",
    "train it",
    "copy it again",
)
# Files with times and caches.
VOLATILE_FILES = {"history.jsonl", hash_cache.CACHE_FILENAME, "ledger.jsonl", "mine.md"}
DETERMINISTIC_KEYS = ("step", "loss", "lr", "grad_norm", "val_loss")


@dataclass(frozen=True)
class Case:
    """A fault: occurrence `at` of the operation at `site` fails with `errno`."""

    command: str
    site: str
    at: int
    errno: int
    mode: str = "once"


@dataclass(frozen=True)
class Result:
    """Outcome of a case. `same`, `warned` and `stopped` are correct, `missed` is a site that was
    not reached, everything else is a defect.
    """

    case: Case
    verdict: str
    detail: str = ""


ACCEPTED_VERDICTS = ("same", "warned", "stopped", "missed")


def errnos_for(operation: str) -> tuple[int, int]:
    """The two errnos to test an operation with."""
    if operation in WRITE_OPERATIONS:
        return errno.EIO, errno.ENOSPC
    if operation == "open":
        return errno.EIO, errno.EMFILE
    return errno.EIO, errno.ENOMEM if operation == "mmap" else errno.EACCES


class Sweep:
    """Runs cases in copies of one work folder.

    Args:
        server: runs the commands.
        folder: for the original work folder, its copy and logs.
    """

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._world = folder / "world"
        self._work = folder / "work"  # a fixed path, since some files contain it
        self._counter = folder / "count"
        self._references: dict[str, tuple[CommandResult, dict[str, str]]] = {}
        self._create_world()

    def cases(self, command: str) -> list[Case]:
        """All cases of a command: the first, middle and last occurrence of each site with two
        errors, and permanent errors at every eighth site. Also runs the command without faults.
        """
        log = self._folder / "operations"
        log.unlink(missing_ok=True)
        self._reset_work()
        result = self._run(command, {**fault_roots_env(self._work), "FAULT_LOG": str(log)})
        assert result.code == 0, result.err
        self._references[command] = result, hash_files(self._work)
        sites = Counter(
            " ".join(line.split(" ")[:3]) for line in log.read_text(errors="replace").splitlines()
        )
        cases = []
        for site, count in sorted(sites.items()):
            for errno_code in errnos_for(site.split(" ")[0]):
                for occurrence in sorted({1, (count + 1) // 2, count}):
                    cases.append(Case(command, site, occurrence, errno_code))
                if hashlib.sha256(site.encode()).digest()[0] % 8 == 0:
                    cases.append(Case(command, site, 1, errno_code, "always"))
        return cases

    def run(self, case: Case) -> Result:
        """Run one case and check the outcome."""
        self._reset_work()
        before = read_progress(self._work)
        result = self._run(
            case.command,
            {
                **fault_roots_env(self._work),
                "FAULT_SITE": case.site,
                "FAULT_AT": str(case.at),
                "FAULT_ERRNO": str(case.errno),
                "FAULT_MODE": case.mode,
                "FAULT_COUNT": str(self._counter),
            },
        )
        verdict, detail = self._judge(case, result, before)
        return Result(case, verdict, detail)

    def _judge(
        self, case: Case, result: CommandResult, before: Mapping[str, Any]
    ) -> tuple[str, str]:
        if int.from_bytes(self._counter.read_bytes(), "little") < case.at:
            return "missed", ""  # nothing failed, since threads ran in a different order
        reference, expected_hashes = self._references[case.command]
        path_class = case.site.split(" ")[1]
        lines = result.err.strip().splitlines()
        if result.code is None:
            return "hangs", result.err[-500:]
        if "Traceback" in result.err:
            return "traceback", result.err[-1500:]
        if result.code not in (0, 2):
            return "aborts", f"exit {result.code}: {result.err[-500:]}"
        if loss := find_loss(before, read_progress(self._work)):
            return "loses", f"{loss}; {result.err[-500:]}"
        if result.code == 0:
            actual_hashes = hash_files(self._work)
            changed_files = find_differences(actual_hashes, expected_hashes)
            same_output = path_class == "log" or _parse_output(result.out) == _parse_output(
                reference.out
            )
            if not changed_files and same_output:
                return "same", ""
            is_warned = os.strerror(case.errno) in result.err
            if is_warned and all("/snapshots/" in name for name in changed_files):
                return "warned", result.err[-300:]
            return "another result", f"{changed_files[:5]} {result.out[-200:]} {result.err[-300:]}"
        if path_class != "log" and (problem := find_message_defect(case, lines)):
            return problem, "\n".join(lines[-3:])
        rerun = self._run(case.command, {})
        if (
            path_class == "log"
            and " exists" in rerun.err
            and not find_differences(hash_files(self._work), expected_hashes)
        ):
            return "stopped", result.err[-300:]  # only printing the result failed
        if rerun.code != 0:
            return "cannot be repeated", f"{lines[-2:]} then {rerun.err[-500:]}"
        actual_hashes = hash_files(self._work)
        if changed_files := find_differences(actual_hashes, expected_hashes):
            return "ends differently", f"{changed_files[:5]} {lines[-2:]}"
        if _parse_output(rerun.out) != _parse_output(reference.out):
            return "answers differently", f"{rerun.out[-300:]}"
        return "stopped", result.err[-300:]

    def _run(self, command: str, env: Mapping[str, str]) -> CommandResult:
        self._counter.write_bytes(bytes(8))
        return self._server.run(shlex.split(COMMANDS[command]), self._work, self._make_env(env))

    def _make_env(self, env: Mapping[str, str]) -> Mapping[str, str]:
        # TMPDIR, so that faults also cover Python's temporary files.
        return {"MLXGPT_HOME": str(self._work), "TMPDIR": str(self._work / "tmp"), **env}

    def _reset_work(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._world, self._work, symlinks=True)

    def _create_world(self) -> None:
        shutil.rmtree(self._world, ignore_errors=True)
        for name in WORK_FOLDERS:
            (self._world / name).mkdir(parents=True)
        rng = random.Random(7)
        words = ["The", "fox", "and", "a", "dog", "ran", "over", "there", "again."]
        for name in ("my.txt", "other.txt"):
            text = "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(700))
            (self._world / "source" / name).write_text(text)
        (self._world / "source" / "short.txt").write_text("The dog ran over there again.")
        self._work.mkdir(exist_ok=True)
        self._reset_work()
        for line in WORLD_COMMANDS:
            result = self._server.run(shlex.split(line), self._work, self._make_env({}))
            assert result.code == 0, result.err
        self._save_world()
        for name, command in INTERRUPTED_COMMANDS.items():
            self._interrupt(name, command)

    def _save_world(self) -> None:
        shutil.rmtree(self._world)
        shutil.copytree(self._work, self._world, symlinks=True)

    def _interrupt(self, name: str, command: str) -> None:
        """Kill a command at a point where it leaves something to resume from."""
        log = self._folder / "operations"
        log.unlink(missing_ok=True)
        self._run(command, {**fault_roots_env(self._work), "FAULT_LOG": str(log)})
        count = len(log.read_bytes().splitlines())
        for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
            self._reset_work()
            kill_env = {"FAULT_MODE": "kill", "FAULT_AT": str(int(share * count))}
            self._run(
                command,
                {**fault_roots_env(self._work), **kill_env, "FAULT_COUNT": str(self._counter)},
            )
            checkpoints = list((self._work / "runs" / name).glob("checkpoints/step-*"))
            if len(checkpoints) >= 2 or (self._work / f"data/.{name}.new/progress.json").exists():
                self._save_world()
                return
        raise AssertionError(f"{command} was never killed with something to continue from")


def find_message_defect(case: Case, lines: list[str]) -> str:
    """What is wrong with the two-line error of a stopped command; empty if nothing."""
    if len(lines) < 2 or not lines[-1].startswith("  → "):
        return "unclear message"
    problem, remedy = lines[-2], lines[-1].removeprefix("  → ")
    if not problem.startswith("mlxgpt: ") or os.strerror(case.errno) not in problem:
        return "unclear message"
    if not re.search(rf"\b({'|'.join(WORK_FOLDERS)})\b", problem):
        return "names no file"
    expected_word = REMEDY_WORDS[case.errno]
    wrong_remedies = [
        word for word in OTHER_REMEDIES if expected_word not in word and word not in expected_word
    ]
    if expected_word not in remedy or any(word in remedy for word in wrong_remedies):
        return "wrong remedy"
    return ""


def find_differences(actual: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Names of files that differ, except old checkpoints that could not be deleted."""
    names = {name for name in actual if "/checkpoints/step-" not in name} | {*expected}
    return sorted(name for name in names if actual.get(name) != expected.get(name))


def hash_files(work: Path) -> dict[str, str]:
    """Hash of each file in a work folder by name, without hidden files, logs and times."""
    hashes = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if is_hidden or not path.is_file() or name.parts[0] in ("log", "tmp"):
            continue
        if path.name in VOLATILE_FILES:
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            records = map(json.loads, content.splitlines())
            content = repr(
                [{key: record.get(key) for key in DETERMINISTIC_KEYS} for record in records]
            ).encode()
        elif path.suffix == ".json":
            content = repr(_drop_volatile_keys(json.loads(content))).encode()
        elif path.suffix == ".html":
            content = b"a page"
        hashes[str(name)] = hashlib.sha256(content).hexdigest()
    return hashes


def read_progress(work: Path) -> dict[str, Any]:
    """What a command must not lose: sources, data, exports, and each run's checkpoints and steps in
    its metrics, samples and history.
    """
    progress: dict[str, Any] = {
        name: content
        for name, content in hash_files(work).items()
        if name.startswith(("source/", "data/", "export/"))
    }
    for name in ("progress.json", "meta.json"):
        for path_in_progress in work.glob(f"data/.*.new/{name}"):
            progress[str(path_in_progress.relative_to(work))] = True
    for run in work.glob("runs/**/run.json"):
        name = str(run.parent.relative_to(work))
        steps = [
            int(checkpoint_folder.name[5:])
            for checkpoint_folder in (run.parent / "checkpoints").glob("step-*")
        ]
        newest = max(steps, default=0)
        progress[f"{name} newest"] = newest
        for log_name in ("metrics.jsonl", "history.jsonl"):
            path = run.parent / log_name
            lines = path.read_text().splitlines() if path.exists() else []
            records = [json.loads(line)["step"] for line in lines if line.endswith("}")]
            progress[f"{name} {log_name}"] = {step for step in records if step <= newest}
        path = run.parent / "samples.txt"
        text = path.read_text(errors="replace") if path.exists() else ""
        sample_steps = [int(line[9:]) for line in text.splitlines() if line.startswith("--- step ")]
        progress[f"{name} samples"] = {step for step in sample_steps if step <= newest}
        if (best := run.parent / "best.json").exists():
            progress[f"{name} best"] = json.loads(best.read_text())["val_loss"]
    return progress


def find_loss(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first item of `before` that is lost in `after`; empty if nothing is lost."""
    for name, value in before.items():
        if name.startswith("data/.") and name not in after:
            scratch, finished = (
                name.rsplit("/", 1)[0],
                name.removeprefix("data/.").split(".new/")[0],
            )
            if f"{scratch}/meta.json" in after:  # complete except for the final rename
                continue
            if any(other_name.startswith(f"data/{finished}/") for other_name in after):
                continue
        if name not in after:
            return f"{name} is gone"
        current = after[name]
        if isinstance(value, set):
            if value - current:
                return f"{name}: {sorted(value - current)} are gone"
        elif isinstance(value, int) and not isinstance(value, bool):
            if current < value:
                return f"{name}: {current} instead of {value}"
        elif isinstance(value, float):
            if current > value:
                return f"{name}: {current} instead of {value}"
        elif current != value:
            return f"{name} has changed"
    return ""


VOLATILE_KEYS = (
    "seconds",
    "time",
    "date",
    "tokens_per_second",
    "created",
    "memory",
    "share",
    "folder",
)


def _drop_volatile_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        kept_items = {
            key: value
            for key, value in tree.items()
            if not any(word in key for word in VOLATILE_KEYS)
        }
        return {
            key: _drop_volatile_keys(value)
            for key, value in kept_items.items()
            if key not in ("seal", "sha256")
        }
    return [_drop_volatile_keys(item) for item in tree] if isinstance(tree, list) else tree


def _parse_output(text: str) -> Any:
    try:
        return _drop_volatile_keys(json.loads(text))
    except ValueError:
        return text


def run_sweep(commands: list[str], part: str, results: Path) -> Iterator[Result]:
    """Run the cases of some commands that are not in the results file yet."""
    first, stride = map(int, part.split("/"))
    result_lines = results.read_text().splitlines() if results.exists() else []
    finished_cases = {json.dumps(json.loads(line)["case"], sort_keys=True) for line in result_lines}
    with tempfile.TemporaryDirectory() as temp_folder:
        folder = Path(temp_folder)
        with ForkServer(build_fault_library(folder)) as server:
            runner = Sweep(server, folder)
            for command in commands:
                cases = runner.cases(command)
                sites = len({case.site for case in cases})
                print(f"{command}: {sites} sites, {len(cases)} cases", flush=True)
                for case in cases[first - 1 :: stride]:
                    if json.dumps(asdict(case), sort_keys=True) in finished_cases:
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
    args = parser.parse_args()
    for result in run_sweep(args.commands, args.part, args.results):
        if result.verdict not in ACCEPTED_VERDICTS:
            print(result.verdict, asdict(result.case), result.detail, sep="\n  ", flush=True)
    for command in args.commands:
        rows = [json.loads(line) for line in args.results.read_text().splitlines()]
        rows = [row for row in rows if row["case"]["command"] == command]
        sites = len({row["case"]["site"] for row in rows})
        print(command, f"{sites} sites", dict(Counter(row["verdict"] for row in rows)), sep=", ")


if __name__ == "__main__":
    main()
