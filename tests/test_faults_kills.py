"""Kills, simultaneous commands, unusual file systems and wrong clocks must not change the result.
Linux only; `make torture` runs the long version.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.faults import kills
from tests.faults.forked import ForkServer
from tests.faults.kills import COMMAND_PAIRS, KILL_COMMANDS, Workspace, find_differences, read_state
from tests.faults.library import build_fault_library

YEAR = 31_557_600  # seconds
LONG = "a" * 255


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("world")
    library = build_fault_library(folder)
    slow = any(item.get_closest_marker("slow") for item in request.session.items)
    torch = ["torch"] if slow and find_spec("torch") else []
    quick = "tests.faults.quick"
    with ForkServer(library, [quick, *torch]) as first, ForkServer(library, [quick]) as second:
        yield Workspace(folder, [first, second])


def run_kills(world: Workspace, name: str, times: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    result = kills.kill_repeatedly(world, name, times, random.Random(seed))
    print(result.format_row(name))
    assert not result.problems


def run_pair(world: Workspace, name: str, times: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    print(name, dict(kills.run_concurrently(world, name, times, random.Random(seed))))


@pytest.mark.parametrize("name", ["train, resumed", "export --to hf"])
def test_killed_command_is_completed_by_rerunning_it(world: Workspace, name: str) -> None:
    run_kills(world, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILL_COMMANDS)
def test_a_thousand_kills(world: Workspace, name: str) -> None:
    if name == "import of ckpt.pt":
        pytest.importorskip("torch")
    run_kills(world, name, 67)


@pytest.mark.parametrize("name", ["export --to hf, twice", "train and generate"])
def test_two_simultaneous_commands(world: Workspace, name: str) -> None:
    run_pair(world, name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMAND_PAIRS)
def test_a_thousand_pairs_of_simultaneous_commands(world: Workspace, name: str) -> None:
    run_pair(world, name, 77)


@pytest.mark.parametrize("mode", ["short", "nodirsync"])
def test_unusual_file_operations(world: Workspace, mode: str) -> None:
    kills.check_fault_mode(world, "prepare, BPE" if mode == "short" else "train, resumed", mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["short", "eintr", "nodirsync"])
def test_unusual_file_operations_in_all_commands(world: Workspace, mode: str) -> None:
    names = [name for name in KILL_COMMANDS if name != "import of ckpt.pt" or find_spec("torch")]
    for name in names:
        kills.check_fault_mode(world, name, mode)


@pytest.mark.parametrize(
    "line",
    [
        f"{KILL_COMMANDS['train, classic']} --run {LONG}",
        f"prepare source/my.txt --name {LONG}",
        f"import source/hf --run {LONG}",
        f"export --run done --to hf --output export/{LONG}",
        f"report done --output export/{LONG}",
    ],
    ids=["train", "prepare", "import", "export", "report"],
)
def test_names_too_long_for_temporary_files(world: Workspace, line: str) -> None:
    world.reset()
    before = read_state(world.work, None)
    result = world.run(line)
    assert result.code == 2, result
    *_, problem, remedy = result.err.splitlines()
    assert "File name too long" in problem
    assert remedy == "  → use a shorter name."
    after = read_state(world.work, None)
    assert not [name for name in find_differences(before, after) if not name.startswith("data/")]
    assert not world.find_leftovers()


def test_source_with_a_name_of_255_bytes(world: Workspace) -> None:
    world.reset()
    long = f"{'a' * 251}.txt"
    shutil.copyfile(world.work / "source/my.txt", world.work / "source" / long)
    result = world.run(f"prepare source/{long}")
    assert result.code == 0, result.err


@pytest.mark.parametrize("years", [-3, 300])
def test_file_times_that_are_years_off(world: Workspace, years: int) -> None:
    """All files have timestamps from another clock; the run still resumes and is listed."""
    _, expected = world.reference_run(KILL_COMMANDS["train, resumed"])
    world.reset()
    timestamp = time.time() + years * YEAR
    for path in (*world.work.rglob("*"), world.work):
        os.utime(path, (timestamp, timestamp))
    result = world.run(KILL_COMMANDS["train, resumed"])
    assert result.code == 0, result.err
    assert not find_differences(expected, read_state(world.work, None))
    runs = json.loads(world.run("runs --json").out)
    assert {run["name"] for run in runs} == {"done", "half"}
    # The newest run is chosen by file times, not by the current clock.
    newest = json.loads(world.run("info --json").out)["name"]
    assert newest == ("done" if years > 0 else "half")


def test_suspended_training_ends_with_the_same_result(world: Workspace) -> None:
    _, expected = world.reference_run(KILL_COMMANDS["train, resumed"])
    world.reset()
    server = world.servers[0]
    pid = server.start(shlex.split(KILL_COMMANDS["train, resumed"]), world.work, world.make_env({}))
    stops = 0
    with contextlib.suppress(ProcessLookupError):  # it may end before the last pause
        for pause in (0.0, 0.05, 0.1):
            time.sleep(pause)
            os.kill(pid, signal.SIGSTOP)
            stops += 1
            time.sleep(0.5)
            os.kill(pid, signal.SIGCONT)
    assert stops
    assert server.wait() == 0
    assert not find_differences(expected, read_state(world.work, None))


def test_names_that_differ_only_in_case_share_a_folder(world: Workspace) -> None:
    """Simulate a case-insensitive file system: links stand in for the other spellings."""
    _, expected = world.reference_run(KILL_COMMANDS["train, resumed"])
    world.reset()
    names = ("runs/half", "runs/.half.lock", "data/my", "data/.my.lock", "source/my.txt")
    links = []
    for name in names:
        folder, base = name.split("/")
        links.append(world.work / folder / base.replace("half", "HALF").replace("my", "MY"))
        links[-1].symlink_to(base)
    settings = KILL_COMMANDS["train, resumed"].replace("my.txt", "MY.txt").replace(" half", " HALF")
    refused = world.run(f"{settings} --learning-rate 0.5")
    assert refused.code == 2
    assert "HALF exists with different settings" in refused.err
    result = world.run(settings)
    assert result.code == 0, result.err
    for link in links:
        link.unlink(missing_ok=True)
    # The config records the source as last typed.
    assert find_differences(expected, read_state(world.work, None)) == ["runs/half/config.toml"]
