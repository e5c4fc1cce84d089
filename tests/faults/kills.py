"""Commands that are killed repeatedly, and pairs of concurrent commands: both must end like a
single uninterrupted command.

    python -m tests.faults.kills "train, classic" "export --to hf" --kills 70 --seed 1
    python -m tests.faults.kills --pairs 100 --seed 1

prints a table. Commands run in copies of one work folder, which is created once.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.data import hash_cache
from tests.faults.forked import CommandResult, ForkServer
from tests.faults.library import MODEL_FLAGS, WORK_FOLDERS, build_fault_library, fault_roots_env

LENGTH_FLAGS = "--max-steps 8 --eval-interval 2 --save-interval 1"
TRAIN_COMMAND = f"train --tier 1 --source source/my.txt {MODEL_FLAGS} {LENGTH_FLAGS}"
MODERN_TRAIN_COMMAND = f"{TRAIN_COMMAND} --recipe modern --position rope --norm rms --mlp swiglu"

KILL_COMMANDS = {
    "train, classic": f"{TRAIN_COMMAND} --run new",
    "train, modern": f"{MODERN_TRAIN_COMMAND} --run new",
    "train, resumed": f"{TRAIN_COMMAND} --run half",
    "prepare, characters": "prepare source/my.txt source/other.txt --name fresh",
    "prepare, BPE": "prepare source/my.txt --tokenizer bpe --vocab-size 280 --name pieces",
    "import of a folder": "import source/hf --run imported",
    "import of ckpt.pt": "import source/ckpt.pt --meta source/meta.pkl --run imported",
    "export --to hf": "export --run done --to hf --output export/out",
    "export --to gguf": "export --run done --to gguf --output export/out",
    "eval": "eval --run done --json",
    "generate": "generate The --run done --seed 1 --max-tokens 20 --json",
    "compare": f"""compare --tier 1 --source source/my.txt {MODEL_FLAGS}
        --vary learning_rate=1e-2,1e-3
        --budget 3steps --seeds 1 --eval-interval 1 --name mine""",
    "report": "report done --output export/page.html",
    "info": "info --run done --json",
    "runs": "runs --json",
}
# Commands that run concurrently. In the last pairs, the second reads what the first modifies.
COMMAND_PAIRS = {
    **{
        f"{name}, twice": (KILL_COMMANDS[name], KILL_COMMANDS[name])
        for name in (
            "train, classic",
            "train, resumed",
            "prepare, characters",
            "prepare, BPE",
            "import of a folder",
            "export --to hf",
            "export --to gguf",
            "compare",
        )
    },
    "train and eval": (KILL_COMMANDS["train, resumed"], "eval --run half --json"),
    "train and generate": (
        KILL_COMMANDS["train, resumed"],
        "generate The --run half --max-tokens 9",
    ),
    "train and export": (
        KILL_COMMANDS["train, resumed"],
        "export --run half --to hf --output export/out",
    ),
    "train and report": (KILL_COMMANDS["train, resumed"], "report half --output export/page.html"),
    "train and runs": (KILL_COMMANDS["train, resumed"], "runs --json"),
}
BUSY_MESSAGES = ("another process is", " exists")  # allowed errors of the second command
MODIFYING_OPERATIONS = (
    "create",
    "fsync",
    "truncate",
    "rename",
    "link",
    "unlink",
    "rmdir",
    "mkdir",
    "chmod",
)
DETERMINISTIC_KEYS = ("step", "loss", "lr", "grad_norm", "val_loss")
VOLATILE_KEYS = (
    "seconds",
    "time",
    "date",
    "tokens_per_second",
    "memory",
    "seal",
    "sha256",
    "forecast",
)


@dataclass
class KillResult:
    """Results of killing one command.

    Attributes:
        runs: how often it was run to completion.
        kills: how often it was killed.
        kills_by_operation: kills per operation; a killed write is half done.
        problems: what was lost, left behind, or different from an uninterrupted run.
    """

    runs: int = 0
    kills: int = 0
    kills_by_operation: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def format_row(self, name: str) -> str:
        """Format a row of the table."""
        writes = self.kills_by_operation["write"] + self.kills_by_operation["pwrite"]
        changes = sum(self.kills_by_operation[operation] for operation in MODIFYING_OPERATIONS)
        equal_runs = self.runs - len({problem.split(":")[0] for problem in self.problems})
        return f"| {name} | {self.runs} | {self.kills} | {writes} | {changes} | {equal_runs} |"


class Workspace:
    """A work folder with a finished run, an interrupted run and external models.

    Args:
        folder: for the original work folder, its copy and logs.
    """

    def __init__(self, folder: Path, servers: Sequence[ForkServer]) -> None:
        self.work = folder / "work"  # a fixed path, since some files contain it
        self._original, self.servers = folder / "original", servers
        self._log, self._counter = folder / "operations", folder / "count"
        self._references: dict[str, tuple[int, dict[str, Any]]] = {}
        self._create()

    def find_leftovers(self) -> set[str]:
        """New scratch files, except lock files, which a command killed at its end leaves behind."""
        leftovers = scratch_files(self.work) - scratch_files(self._original)
        # Python's tempfile tests its folder with a file of such a name; a kill may leave it there.
        tempfile_probe = re.compile(r"tmp/[a-z0-9_]{8}")
        return {
            name
            for name in leftovers
            if not name.endswith(".lock") and not tempfile_probe.fullmatch(name)
        }

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self._original, self.work)

    def run(self, line: str, env: Mapping[str, str] | None = None) -> CommandResult:
        return self.servers[0].run(shlex.split(line), self.work, self.make_env(env or {}))

    def reference_run(self, line: str) -> tuple[int, dict[str, Any]]:
        """Number of file operations of a command, and the state of the work folder after it."""
        if line not in self._references:
            self._references[line] = self._run_reference(line)
        return self._references[line]

    def _run_reference(self, line: str) -> tuple[int, dict[str, Any]]:
        self.reset()
        self._log.unlink(missing_ok=True)
        result = self.run(line, {**fault_roots_env(self.work), "FAULT_LOG": str(self._log)})
        assert result.code == 0, result.err
        state = read_state(self.work, result.out)
        assert not (leftovers := self.find_leftovers()), f"{leftovers} are left"
        return len(self._log.read_bytes().splitlines()), state

    def run_and_kill(self, line: str, operation_index: int) -> tuple[CommandResult, str]:
        """Run a command and kill it at an operation; return its result and that operation, which is
        empty if it was not killed.
        """
        self._counter.write_bytes(bytes(8))
        self._log.unlink(missing_ok=True)
        env = {
            "FAULT_MODE": "kill",
            "FAULT_AT": str(operation_index),
            "FAULT_COUNT": str(self._counter),
        }
        result = self.run(line, {**fault_roots_env(self.work), **env, "FAULT_LOG": str(self._log)})
        return result, self._log.read_text() if self._log.exists() else ""

    def run_both(self, lines: Sequence[str], delay: float) -> list[CommandResult]:
        """Run two commands, the second `delay` seconds after the first."""
        logs = [self.work / "log" / str(number) for number in range(len(lines))]
        for number, (server, line) in enumerate(zip(self.servers, lines, strict=True)):
            if number:
                time.sleep(delay)
            server.start(shlex.split(line), self.work, self.make_env({}), logs[number])
        codes = [server.wait() for server in self.servers]
        return [
            CommandResult(code, (log / "out").read_text(), (log / "err").read_text())
            for code, log in zip(codes, logs, strict=True)
        ]

    def make_env(self, env: Mapping[str, str]) -> Mapping[str, str]:
        return {"MLXGPT_HOME": str(self.work), "TMPDIR": str(self.work / "tmp"), **env}

    def _create(self) -> None:
        for name in WORK_FOLDERS:
            (self.work / name).mkdir(parents=True, exist_ok=True)
        words = ["The", "fox", "and", "a", "dog", "ran", "over", "there", "again."]
        rng = random.Random(7)
        for name in ("my.txt", "other.txt"):
            text = "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(300))
            (self.work / "source" / name).write_text(text)
        for line in (f"{TRAIN_COMMAND} --run done", "export --run done --to hf --output source/hf"):
            result = self.run(line)
            assert result.code == 0, result.err
        if find_spec("torch"):
            write_nanogpt(self.work / "source", "".join(sorted({*" \n", *"".join(words)})))
        self._save_original()
        operations, _ = self._run_reference(KILL_COMMANDS["train, resumed"])
        for share in (0.5, 0.6, 0.7, 0.8, 0.9):
            self.reset()
            self.run_and_kill(KILL_COMMANDS["train, resumed"], int(share * operations))
            if len([*self.work.glob("runs/half/checkpoints/step-*")]) >= 2:
                self._save_original()
                return
        raise AssertionError("the run was never killed with something to resume from")

    def _save_original(self) -> None:
        shutil.rmtree(self._original, ignore_errors=True)
        shutil.copytree(self.work, self._original)


def write_nanogpt(folder: Path, characters: str) -> None:
    """Write a character-level nanoGPT checkpoint with its meta.pkl."""
    import torch

    from mlxgpt.config import ModelConfig
    from tests.helpers.external_models import random_parameters

    model_args = {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 8,
        "block_size": 8,
        "bias": True,
        "dropout": 0.0,
    }
    model_args["vocab_size"] = len(characters)
    arrays = random_parameters(ModelConfig(**model_args))  # type: ignore[arg-type]
    model = {f"transformer.{name}": torch.tensor(np.array(value)) for name, value in arrays.items()}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    checkpoint = {
        "model": model,
        "model_args": model_args,
        "iter_num": 5,
        "config": {"dataset": "mine"},
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    ids = {character: id for id, character in enumerate(characters)}
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(characters)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def kill_repeatedly(world: Workspace, name: str, kills: int, rng: random.Random) -> KillResult:
    """Kill a command at random operations, at least `kills` times, over several complete runs."""
    result = KillResult()
    operations, reference = world.reference_run(KILL_COMMANDS[name])
    while result.kills < kills:
        world.reset()
        result.runs += 1
        result.problems += [
            f"{name}, run {result.runs}: {problem}"
            for problem in _kill_until_finished(
                world, KILL_COMMANDS[name], operations, reference, rng, result
            )
        ]
    return result


def _kill_until_finished(
    world: Workspace,
    line: str,
    operations: int,
    reference: Mapping[str, Any],
    rng: random.Random,
    result: KillResult,
) -> Iterator[str]:
    """Kill and rerun a command until it finishes; yield problems."""
    killed_operations, compiler_failed = [], False
    while True:
        before = read_progress(world.work)
        # Early operations are more likely, since a resumed command has fewer of them.
        operation_index = 1 + int(operations * rng.random() ** rng.choice([1, 4]))
        command_result, operation = world.run_and_kill(
            line, 0 if rng.random() < 0.1 else operation_index
        )
        killed_operations += [operation.strip()]
        compiler_failed |= "the C++ compiler failed" in command_result.err  # it was killed
        if losses := find_losses(before, read_progress(world.work)):
            yield f"{losses} are gone after {killed_operations}"
        if not operation:
            # A finished export or import refuses to run again.
            if command_result.code and " exists" not in command_result.err:
                yield f"{command_result.err} after {killed_operations}"
            break
        result.kills += 1
        result.kills_by_operation[operation.split(" ")[0]] += 1
        # Without SIGKILL, a subprocess of the command was killed.
        if command_result.code not in (0, 2, -signal.SIGKILL) or "Traceback" in command_result.err:
            yield f"{command_result.err} after {killed_operations}"
            break
        if command_result.code == 0:
            break
    if compiler_failed:  # without the CPU kernels the results differ by rounding
        return
    state = read_state(world.work, None if command_result.code else command_result.out)
    if changed_files := [
        name
        for name in find_differences(reference, state)
        if not is_old_checkpoint(name, reference)
    ]:
        yield f"{changed_files} after {killed_operations}"
    if leftovers := world.find_leftovers():
        yield f"{leftovers} are left after {killed_operations}"


def check_fault_mode(world: Workspace, name: str, mode: str) -> None:
    """Run a command with rare but legal behavior of all operations: see FAULT_MODE in inject.c."""
    _, reference = world.reference_run(KILL_COMMANDS[name])
    world.reset()
    result = world.run(KILL_COMMANDS[name], {**fault_roots_env(world.work), "FAULT_MODE": mode})
    assert result.code == 0, f"{name}, {mode}: {result.err}"
    changed_files = find_differences(reference, read_state(world.work, result.out))
    assert not changed_files, f"{name}, {mode}: {changed_files}"
    assert not (leftovers := world.find_leftovers()), f"{name}, {mode}: {leftovers} are left"


def run_concurrently(
    world: Workspace, name: str, repetitions: int, rng: random.Random
) -> Counter[str]:
    """Run two commands concurrently, `repetitions` times; count the outcomes."""
    lines, results = COMMAND_PAIRS[name], Counter[str]()
    _, reference = world.reference_run(lines[0])
    for _ in range(repetitions):
        world.reset()
        # Mostly (almost) simultaneously, otherwise while the first command is running.
        delay = rng.choice([0.0, 0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.4)])
        first, second = world.run_both(lines, delay)
        for result in (first, second):
            assert "Traceback" not in result.err, f"{name}: {result.err}"
            if result.code:
                *_, problem, remedy = result.err.splitlines()
                assert result.code == 2, f"{name}: {result}"
                assert problem.startswith("mlxgpt: "), f"{name}: {result}"
                assert remedy.startswith("  → "), f"{name}: {result}"
                assert any(message in problem for message in BUSY_MESSAGES), f"{name}: {result.err}"
        if lines[0] == lines[1]:
            assert 0 in (first.code, second.code), f"{name}: {first.err}{second.err}"
        else:
            assert first.code == second.code == 0, f"{name}: {first.err}{second.err}"
            shutil.rmtree(world.work / "export")
            (world.work / "export").mkdir()
        changed_files = find_differences(reference, read_state(world.work, None))
        assert not changed_files, f"{name}: {changed_files}"
        assert not (leftovers := world.find_leftovers()), f"{name}: {leftovers} are left"
        results["both" if first.code == second.code else "the other said so"] += 1
    return results


def read_state(work: Path, out: str | None) -> dict[str, Any]:
    """Files of a work folder and output of a command, without times and machine details."""
    state: dict[str, Any] = {}
    for path in list_files(work):
        name, content = str(path.relative_to(work)), path.read_bytes()
        if path.name in ("history.jsonl", "mine.md", hash_cache.CACHE_FILENAME):
            state[name] = None  # contains times or inodes
        elif path.name == "metrics.jsonl":
            records = [json.loads(line) for line in content.splitlines()]
            state[name] = [
                {key: record.get(key) for key in DETERMINISTIC_KEYS} for record in records
            ]
        elif path.suffix == ".json":
            state[name] = drop_volatile_keys(json.loads(content))
        else:
            state[name] = content
    if out is not None:
        state["stdout"] = drop_volatile_keys(json.loads(out)) if out.startswith(("{", "[")) else out
    return state


def drop_volatile_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        kept_items = {k: v for k, v in tree.items() if not any(word in k for word in VOLATILE_KEYS)}
        return {key: drop_volatile_keys(value) for key, value in kept_items.items()}
    return [drop_volatile_keys(item) for item in tree] if isinstance(tree, list) else tree


def find_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    names = sorted({*a, *b} - {"stdout"})
    changed = [name for name in names if name not in a or name not in b or a[name] != b[name]]
    if "stdout" in a and "stdout" in b and a["stdout"] != b["stdout"]:
        changed.append(f"stdout: {a['stdout']} and {b['stdout']}")
    return changed


def is_old_checkpoint(name: str, reference: Mapping[str, Any]) -> bool:
    """Whether a file belongs to an old checkpoint: a run keeps those if it is killed between its
    last save and pruning.
    """
    return name not in reference and "/checkpoints/step-" in name


def list_files(work: Path) -> list[Path]:
    """All files in a work folder except scratch files and logs."""
    paths = [
        path for name in ("runs", "data", "source", "export") for path in (work / name).rglob("*")
    ]
    return sorted(p for p in paths if p.is_file() and not is_scratch(p.relative_to(work)))


def is_scratch(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def scratch_files(work: Path) -> set[str]:
    names = ("runs", "data", "source", "export", "tmp")
    paths = [path.relative_to(work) for name in names for path in (work / name).rglob("*")]
    return {str(path) for path in paths if is_scratch(path) or path.parts[0] == "tmp"}


def read_progress(work: Path) -> dict[str, Any]:
    """What a killed command must not lose: files of other runs, data, sources and exports, the
    newest checkpoint of its run with metrics and samples up to it, and progress of preparation.
    """
    progress: dict[str, Any] = {}
    for path in list_files(work):
        name = path.relative_to(work)
        is_own_run = name.parts[0] == "runs" and name.parts[1] != "done"
        if not is_own_run and path.name != hash_cache.CACHE_FILENAME:
            progress[str(name)] = path.read_bytes()
    for identity in work.glob("runs/**/run.json"):
        run = identity.parent
        if is_scratch(run.relative_to(work)):
            continue
        newest = max((int(p.name[5:]) for p in run.glob("checkpoints/step-*")), default=0)
        progress[f"newest of {run.name}"] = newest
        for file, prefix in (("metrics.jsonl", '{"step": '), ("samples.txt", "--- step ")):
            lines = (run / file).read_text().splitlines() if (run / file).exists() else []
            step_lines = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
            steps = {int(line.split(",")[0]) for line in step_lines}
            progress[f"{file} of {run.name}"] = {step for step in steps if step <= newest}
    for progress_file in work.glob("data/.*.new/progress.json"):
        progress[f"chunks of {progress_file.parent.name[1:-4]}"] = json.loads(
            progress_file.read_text()
        )["chunks"]
    for meta in work.glob("data/.*.new/meta.json"):
        progress[f"chunks of {meta.parent.name[1:-4]}"] = sys.maxsize  # all
    return progress


def find_losses(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of items that are missing or smaller in `after`."""
    names = []
    for name, value in before.items():
        current = after.get(name, type(value)())
        if name.startswith("chunks of ") and f"data/{name[10:]}/meta.json" in after:
            continue
        if isinstance(value, int | set):
            if not current >= value:
                names.append(name)
        elif current != value:
            names.append(name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--kills", type=int, default=0, help="of each command")
    parser.add_argument("--pairs", type=int, default=0, help="of each two")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        library = build_fault_library(Path(folder))
        modules = ["tests.faults.quick", *(["torch"] if find_spec("torch") else [])]
        servers = [
            stack.enter_context(ForkServer(library, preloaded))
            for preloaded in (modules, modules[:1])
        ]
        workspace = Workspace(Path(folder), servers)
        for name in args.names or (KILL_COMMANDS if args.kills else COMMAND_PAIRS):
            start_time = time.monotonic()
            rng = random.Random(f"{args.seed} {name}")
            try:
                if args.kills:
                    result = kill_repeatedly(workspace, name, args.kills, rng)
                    print(result.format_row(name), *result.problems, sep="\n", end=" ")
                else:
                    print(name, dict(run_concurrently(workspace, name, args.pairs, rng)), end=" ")
            except AssertionError as error:
                print(f"FAILED {name}: {error}", end=" ")
            print(f"{time.monotonic() - start_time:.0f} s", flush=True)


if __name__ == "__main__":
    main()
