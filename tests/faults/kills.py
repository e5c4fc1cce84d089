"""Commands that are killed again and again, and two at one instant: both end as one undisturbed.

    python -m tests.faults.kills train-classic export-hf --kills 70 --seed 1
    python -m tests.faults.kills --pairs 100 --seed 1

prints a table. Everything happens in copies of one work folder, which is made once.
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
from tests.faults.forked import Ended, Server
from tests.faults.library import CLASSES, SHAPE, build, roots

LENGTH = "--max-steps 8 --eval-interval 2 --save-interval 1"
TRAIN = f"train --tier 1 --source source/my.txt {SHAPE} {LENGTH}"
MODERN = f"{TRAIN} --recipe modern --position rope --norm rms --mlp swiglu"

KILLED = {
    "train, classic": f"{TRAIN} --run new",
    "train, modern": f"{MODERN} --run new",
    "train, resumed": f"{TRAIN} --run half",
    "prepare, characters": "prepare source/my.txt source/other.txt --name fresh",
    "prepare, BPE": "prepare source/my.txt --tokenizer bpe --vocab-size 280 --name pieces",
    "import of a folder": "import source/hf --run imported",
    "import of ckpt.pt": "import source/ckpt.pt --meta source/meta.pkl --run imported",
    "export --to hf": "export --run done --to hf --out export/out",
    "export --to gguf": "export --run done --to gguf --out export/out",
    "eval": "eval --run done --json",
    "generate": "generate The --run done --seed 1 --max-tokens 20 --json",
    "compare": f"""compare --tier 1 --source source/my.txt {SHAPE} --vary learning_rate=1e-2,1e-3
        --budget 3steps --seeds 1 --eval-interval 1 --name mine""",
    "report": "report done --output export/page.html",
    "info": "info --run done --json",
    "runs": "runs --json",
}
# Each two at one instant. Of the last ones, the first works on what the second reads.
PAIRS = {
    **{
        f"{name}, twice": (KILLED[name], KILLED[name])
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
    "train and eval": (KILLED["train, resumed"], "eval --run half --json"),
    "train and generate": (KILLED["train, resumed"], "generate The --run half --max-tokens 9"),
    "train and export": (KILLED["train, resumed"], "export --run half --to hf --out export/out"),
    "train and report": (KILLED["train, resumed"], "report half --output export/page.html"),
    "train and runs": (KILLED["train, resumed"], "runs --json"),
}
BUSY = ("another process is", " exists")  # what the second may say
CHANGING = ("create", "fsync", "truncate", "rename", "link", "unlink", "rmdir", "mkdir", "chmod")
STEADY = ("step", "loss", "lr", "grad_norm", "val_loss")
TIMES = ("seconds", "time", "date", "tokens_per_second", "memory", "seal", "sha256", "forecast")


@dataclass
class Killed:
    """The results of killing one command.

    Attributes:
        runs: how often it was brought to its end.
        kills: how often it was killed.
        at: how often at which operation; at a write, half of it was done.
        wrong: what was lost, left behind, or not as in an undisturbed run.
    """

    runs: int = 0
    kills: int = 0
    at: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def row(self, name: str) -> str:
        """A row of the table."""
        writes = self.at["write"] + self.at["pwrite"]
        changes = sum(self.at[operation] for operation in CHANGING)
        equal = self.runs - len({problem.split(":")[0] for problem in self.wrong})
        return f"| {name} | {self.runs} | {self.kills} | {writes} | {changes} | {equal} |"


class World:
    """A work folder with a run that is done, one that is half done, and models from elsewhere.

    Args:
        folder: of the original, its copy, and what is noted.
    """

    def __init__(self, folder: Path, servers: Sequence[Server]) -> None:
        self.work = folder / "work"  # always the same, as its name is in some files
        self._original, self.servers = folder / "original", servers
        self._log, self._counter = folder / "operations", folder / "count"
        self._known: dict[str, tuple[int, dict[str, Any]]] = {}
        self._make()

    def left(self) -> set[str]:
        """Scratch files that were not there at first; but for the empty lock of a command that was
        killed when all was done.
        """
        left = scratch_files(self.work) - scratch_files(self._original)
        # Python tries a temporary folder with a file of such a name, which a kill may leave there.
        trial = re.compile(r"tmp/[a-z0-9_]{8}")
        return {name for name in left if not name.endswith(".lock") and not trial.fullmatch(name)}

    def fresh(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self._original, self.work)

    def run(self, line: str, env: Mapping[str, str] | None = None) -> Ended:
        return self.servers[0].run(shlex.split(line), self.work, self.env(env or {}))

    def undisturbed(self, line: str) -> tuple[int, dict[str, Any]]:
        """The number of a command's file operations, and the work folder after it."""
        if line not in self._known:
            self._known[line] = self._undisturbed(line)
        return self._known[line]

    def _undisturbed(self, line: str) -> tuple[int, dict[str, Any]]:
        self.fresh()
        self._log.unlink(missing_ok=True)
        ended = self.run(line, {**roots(self.work), "FAULT_LOG": str(self._log)})
        assert ended.code == 0, ended.err
        state = state_of(self.work, ended.out)
        assert not (left := self.left()), f"{left} are left"
        return len(self._log.read_bytes().splitlines()), state

    def kill(self, line: str, at: int) -> tuple[Ended, str]:
        """Run a command that dies at an operation; and which one that was, empty if it did not."""
        self._counter.write_bytes(bytes(8))
        self._log.unlink(missing_ok=True)
        env = {"FAULT_MODE": "kill", "FAULT_AT": str(at), "FAULT_COUNT": str(self._counter)}
        ended = self.run(line, {**roots(self.work), **env, "FAULT_LOG": str(self._log)})
        return ended, self._log.read_text() if self._log.exists() else ""

    def both(self, lines: Sequence[str], later: float) -> list[Ended]:
        """Run two commands, the second `later` seconds after the first."""
        logs = [self.work / "log" / str(number) for number in range(len(lines))]
        for number, (server, line) in enumerate(zip(self.servers, lines, strict=True)):
            if number:
                time.sleep(later)
            server.start(shlex.split(line), self.work, self.env({}), logs[number])
        codes = [server.wait() for server in self.servers]
        return [
            Ended(code, (log / "out").read_text(), (log / "err").read_text())
            for code, log in zip(codes, logs, strict=True)
        ]

    def env(self, env: Mapping[str, str]) -> Mapping[str, str]:
        return {"MLXGPT_HOME": str(self.work), "TMPDIR": str(self.work / "tmp"), **env}

    def _make(self) -> None:
        for name in CLASSES:
            (self.work / name).mkdir(parents=True, exist_ok=True)
        words = ["The", "fox", "and", "a", "dog", "ran", "over", "there", "again."]
        draw = random.Random(7)
        for name in ("my.txt", "other.txt"):
            text = "\n".join(" ".join(draw.choices(words, k=12)) for _ in range(300))
            (self.work / "source" / name).write_text(text)
        for line in (f"{TRAIN} --run done", "export --run done --to hf --out source/hf"):
            ended = self.run(line)
            assert ended.code == 0, ended.err
        if find_spec("torch"):
            write_nanogpt(self.work / "source", "".join(sorted({*" \n", *"".join(words)})))
        self._keep()
        operations, _ = self._undisturbed(KILLED["train, resumed"])
        for share in (0.5, 0.6, 0.7, 0.8, 0.9):
            self.fresh()
            self.kill(KILLED["train, resumed"], int(share * operations))
            if len([*self.work.glob("runs/half/checkpoints/step-*")]) >= 2:
                self._keep()
                return
        raise AssertionError("the run was never killed with something to resume from")

    def _keep(self) -> None:
        shutil.rmtree(self._original, ignore_errors=True)
        shutil.copytree(self.work, self._original)


def write_nanogpt(folder: Path, characters: str) -> None:
    """A model of characters as nanoGPT keeps it."""
    import torch

    from mlxgpt.config import ModelConfig
    from tests.helpers.external_models import parameters_of

    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "bias": True, "dropout": 0.0}
    shape["vocab_size"] = len(characters)
    arrays = parameters_of(ModelConfig(**shape))  # type: ignore[arg-type]
    model = {f"transformer.{name}": torch.tensor(np.array(v)) for name, v in arrays.items()}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    saved = {"model": model, "model_args": shape, "iter_num": 5, "config": {"dataset": "mine"}}
    torch.save(saved, folder / "ckpt.pt")
    ids = {character: id for id, character in enumerate(characters)}
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(characters)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def torture(world: World, name: str, kills: int, draw: random.Random) -> Killed:
    """Kill a command at random operations, at least `kills` times; it ends between them."""
    result = Killed()
    operations, whole = world.undisturbed(KILLED[name])
    while result.kills < kills:
        world.fresh()
        result.runs += 1
        result.wrong += [
            f"{name}, run {result.runs}: {problem}"
            for problem in _until_it_ends(world, KILLED[name], operations, whole, draw, result)
        ]
    return result


def _until_it_ends(
    world: World,
    line: str,
    operations: int,
    whole: Mapping[str, Any],
    draw: random.Random,
    result: Killed,
) -> Iterator[str]:
    """Kill a command again and again; yields what is wrong."""
    died, uncompiled = [], False
    while True:
        before = progress(world.work)
        # Often an early one: a command that resumes has fewer left.
        at = 1 + int(operations * draw.random() ** draw.choice([1, 4]))
        ended, operation = world.kill(line, 0 if draw.random() < 0.1 else at)
        died += [operation.strip()]
        uncompiled |= "the C++ compiler fails" in ended.err  # it was what was killed
        if gone := lost(before, progress(world.work)):
            yield f"{gone} are gone after {died}"
        if not operation:
            # As after any export or import that is done.
            if ended.code and " exists" not in ended.err:
                yield f"{ended.err} after {died}"
            break
        result.kills += 1
        result.at[operation.split(" ")[0]] += 1
        # Where it was not killed, a process that it had started was.
        if ended.code not in (0, 2, -signal.SIGKILL) or "Traceback" in ended.err:
            yield f"{ended.err} after {died}"
            break
        if ended.code == 0:
            break
    if uncompiled:  # it says so, and computes with other bits
        return
    after = state_of(world.work, None if ended.code else ended.out)
    if different := [n for n in differences(whole, after) if not is_old_checkpoint(n, whole)]:
        yield f"{different} after {died}"
    if left := world.left():
        yield f"{left} are left after {died}"


def in_mode(world: World, name: str, mode: str) -> None:
    """Run a command where all operations behave as rarely seen: see FAULT_MODE of inject.c."""
    _, whole = world.undisturbed(KILLED[name])
    world.fresh()
    ended = world.run(KILLED[name], {**roots(world.work), "FAULT_MODE": mode})
    assert ended.code == 0, f"{name}, {mode}: {ended.err}"
    different = differences(whole, state_of(world.work, ended.out))
    assert not different, f"{name}, {mode}: {different}"
    assert not (left := world.left()), f"{name}, {mode}: {left} are left"


def together(world: World, name: str, times: int, draw: random.Random) -> Counter[str]:
    """Run two commands at one instant, `times` times; how they ended."""
    lines, results = PAIRS[name], Counter[str]()
    _, whole = world.undisturbed(lines[0])
    for _ in range(times):
        world.fresh()
        # Mostly at once, else when the first one is at work.
        later = draw.choice([0.0, 0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.4)])
        first, second = world.both(lines, later)
        for ended in (first, second):
            assert "Traceback" not in ended.err, f"{name}: {ended.err}"
            if ended.code:
                *_, problem, remedy = ended.err.splitlines()
                assert ended.code == 2, f"{name}: {ended}"
                assert problem.startswith("mlxgpt: "), f"{name}: {ended}"
                assert remedy.startswith("  → "), f"{name}: {ended}"
                assert any(words in problem for words in BUSY), f"{name}: {ended.err}"
        if lines[0] == lines[1]:
            assert 0 in (first.code, second.code), f"{name}: {first.err}{second.err}"
        else:
            assert first.code == second.code == 0, f"{name}: {first.err}{second.err}"
            shutil.rmtree(world.work / "export")
            (world.work / "export").mkdir()
        different = differences(whole, state_of(world.work, None))
        assert not different, f"{name}: {different}"
        assert not (left := world.left()), f"{name}: {left} are left"
        results["both" if first.code == second.code else "the other said so"] += 1
    return results


def state_of(work: Path, out: str | None) -> dict[str, Any]:
    """The files of a work folder, and what a command printed, but for times and the machine."""
    state: dict[str, Any] = {}
    for path in files_in(work):
        name, content = str(path.relative_to(work)), path.read_bytes()
        if path.name in ("history.jsonl", "mine.md", hash_cache.CACHE_FILENAME):
            state[name] = None  # times, and inodes
        elif path.name == "metrics.jsonl":
            records = [json.loads(line) for line in content.splitlines()]
            state[name] = [{key: record.get(key) for key in STEADY} for record in records]
        elif path.suffix == ".json":
            state[name] = without_times(json.loads(content))
        else:
            state[name] = content
    if out is not None:
        state["stdout"] = without_times(json.loads(out)) if out.startswith(("{", "[")) else out
    return state


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        steady = {k: v for k, v in tree.items() if not any(word in k for word in TIMES)}
        return {key: without_times(value) for key, value in steady.items()}
    return [without_times(item) for item in tree] if isinstance(tree, list) else tree


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    names = sorted({*a, *b} - {"stdout"})
    different = [name for name in names if name not in a or name not in b or a[name] != b[name]]
    if "stdout" in a and "stdout" in b and a["stdout"] != b["stdout"]:
        different.append(f"stdout: {a['stdout']} and {b['stdout']}")
    return different


def is_old_checkpoint(name: str, whole: Mapping[str, Any]) -> bool:
    """Whether a file is of a checkpoint that an undisturbed run would have deleted: killed between
    its last checkpoint and that, a run keeps older ones.
    """
    return name not in whole and "/checkpoints/step-" in name


def files_in(work: Path) -> list[Path]:
    """Those of a command, but for scratch files."""
    found = [
        path for name in ("runs", "data", "source", "export") for path in (work / name).rglob("*")
    ]
    return sorted(p for p in found if p.is_file() and not is_scratch(p.relative_to(work)))


def is_scratch(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def scratch_files(work: Path) -> set[str]:
    names = ("runs", "data", "source", "export", "tmp")
    found = [path.relative_to(work) for name in names for path in (work / name).rglob("*")]
    return {str(path) for path in found if is_scratch(path) or path.parts[0] == "tmp"}


def progress(work: Path) -> dict[str, Any]:
    """What a killed command must not lose: files of other runs, data, sources, exports; of its own
    run the newest checkpoint, and the metrics and samples until then; how far data are prepared.
    """
    found: dict[str, Any] = {}
    for path in files_in(work):
        name = path.relative_to(work)
        own = name.parts[0] == "runs" and name.parts[1] != "done"
        if not own and path.name != hash_cache.CACHE_FILENAME:
            found[str(name)] = path.read_bytes()
    for identity in work.glob("runs/**/run.json"):
        run = identity.parent
        if is_scratch(run.relative_to(work)):
            continue
        newest = max((int(p.name[5:]) for p in run.glob("checkpoints/step-*")), default=0)
        found[f"newest of {run.name}"] = newest
        for file, head in (("metrics.jsonl", '{"step": '), ("samples.txt", "--- step ")):
            lines = (run / file).read_text().splitlines() if (run / file).exists() else []
            heads = [line.removeprefix(head) for line in lines if line.startswith(head)]
            steps = {int(line.split(",")[0]) for line in heads}
            found[f"{file} of {run.name}"] = {step for step in steps if step <= newest}
    for state in work.glob("data/.*.new/progress.json"):
        found[f"chunks of {state.parent.name[1:-4]}"] = json.loads(state.read_text())["chunks"]
    for meta in work.glob("data/.*.new/meta.json"):
        found[f"chunks of {meta.parent.name[1:-4]}"] = sys.maxsize  # all
    return found


def lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of what was there before, and is not or is less."""
    names = []
    for name, value in before.items():
        now = after.get(name, type(value)())
        if name.startswith("chunks of ") and f"data/{name[10:]}/meta.json" in after:
            continue
        if isinstance(value, int | set):
            if not now >= value:
                names.append(name)
        elif now != value:
            names.append(name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--kills", type=int, default=0, help="of each command")
    parser.add_argument("--pairs", type=int, default=0, help="of each two")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        library = build(Path(folder))
        modules = ["tests.faults.quick", *(["torch"] if find_spec("torch") else [])]
        servers = [stack.enter_context(Server(library, m)) for m in (modules, modules[:1])]
        world = World(Path(folder), servers)
        for name in given.names or (KILLED if given.kills else PAIRS):
            began = time.monotonic()
            draw = random.Random(f"{given.seed} {name}")
            try:
                if given.kills:
                    result = torture(world, name, given.kills, draw)
                    print(result.row(name), *result.wrong, sep="\n", end=" ")
                else:
                    print(name, dict(together(world, name, given.pairs, draw)), end=" ")
            except AssertionError as error:
                print(f"FAILED {name}: {error}", end=" ")
            print(f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
