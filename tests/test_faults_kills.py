"""Commands that are killed, two at one instant, and file systems and clocks as rarely seen: in the
end all is as if nothing had happened. Linux only; the long form is in `make torture`.
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
from tests.faults.forked import Server
from tests.faults.kills import KILLED, PAIRS, World, differences, state_of
from tests.faults.library import build

YEAR = 31_557_600  # seconds
LONG = "a" * 255


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    library = build(folder)
    slow = any(item.get_closest_marker("slow") for item in request.session.items)
    torch = ["torch"] if slow and find_spec("torch") else []
    quick = "tests.faults.quick"
    with Server(library, [quick, *torch]) as first, Server(library, [quick]) as second:
        yield World(folder, [first, second])


def kill(world: World, name: str, times: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    result = kills.torture(world, name, times, random.Random(seed))
    print(result.row(name))
    assert not result.wrong


def pair(world: World, name: str, times: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    print(name, dict(kills.together(world, name, times, random.Random(seed))))


@pytest.mark.parametrize("name", ["train, resumed", "export --to hf"])
def test_a_killed_command_ends_as_one_left_alone(world: World, name: str) -> None:
    kill(world, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_a_thousand_kills(world: World, name: str) -> None:
    if name == "import of ckpt.pt":
        pytest.importorskip("torch")
    kill(world, name, 67)


@pytest.mark.parametrize("name", ["export --to hf, twice", "train and generate"])
def test_two_commands_at_one_instant(world: World, name: str) -> None:
    pair(world, name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_a_thousand_pairs(world: World, name: str) -> None:
    pair(world, name, 77)


@pytest.mark.parametrize("mode", ["short", "nodirsync"])
def test_unusual_file_operations(world: World, mode: str) -> None:
    kills.in_mode(world, "prepare, BPE" if mode == "short" else "train, resumed", mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["short", "eintr", "nodirsync"])
def test_unusual_file_operations_in_all_commands(world: World, mode: str) -> None:
    names = [name for name in KILLED if name != "import of ckpt.pt" or find_spec("torch")]
    for name in names:
        kills.in_mode(world, name, mode)


@pytest.mark.parametrize(
    "line",
    [
        f"{KILLED['train, classic']} --run {LONG}",
        f"prepare source/my.txt --name {LONG}",
        f"import source/hf --run {LONG}",
        f"export --run done --to hf --out export/{LONG}",
        f"report done --output export/{LONG}",
    ],
    ids=["train", "prepare", "import", "export", "report"],
)
def test_names_too_long_for_the_names_of_scratch_files(world: World, line: str) -> None:
    world.fresh()
    before = state_of(world.work, None)
    ended = world.run(line)
    assert ended.code == 2, ended
    *_, problem, remedy = ended.err.splitlines()
    assert "File name too long" in problem
    assert remedy == "  → use a shorter name."
    after = state_of(world.work, None)
    assert not [name for name in differences(before, after) if not name.startswith("data/")]
    assert not world.left()


def test_a_source_with_a_name_of_255_bytes(world: World) -> None:
    world.fresh()
    long = f"{'a' * 251}.txt"
    shutil.copyfile(world.work / "source/my.txt", world.work / "source" / long)
    ended = world.run(f"prepare source/{long}")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("years", [-3, 300])
def test_a_clock_that_was_wrong_by_years(world: World, years: int) -> None:
    """All that exists was written with another clock: the run resumes, and is listed."""
    _, whole = world.undisturbed(KILLED["train, resumed"])
    world.fresh()
    moment = time.time() + years * YEAR
    for path in (*world.work.rglob("*"), world.work):
        os.utime(path, (moment, moment))
    ended = world.run(KILLED["train, resumed"])
    assert ended.code == 0, ended.err
    assert not differences(whole, state_of(world.work, None))
    listed = json.loads(world.run("runs --json").out)
    assert {run["name"] for run in listed} == {"done", "half"}
    # The newest by the time of its files, whatever the clock says now.
    newest = json.loads(world.run("info --json").out)["name"]
    assert newest == ("done" if years > 0 else "half")


def test_stopped_for_a_while_a_training_ends_the_same(world: World) -> None:
    _, whole = world.undisturbed(KILLED["train, resumed"])
    world.fresh()
    server = world.servers[0]
    pid = server.start(shlex.split(KILLED["train, resumed"]), world.work, world.env({}))
    stops = 0
    with contextlib.suppress(ProcessLookupError):  # it may end before the last one
        for pause in (0.0, 0.05, 0.1):
            time.sleep(pause)
            os.kill(pid, signal.SIGSTOP)
            stops += 1
            time.sleep(0.5)
            os.kill(pid, signal.SIGCONT)
    assert stops
    assert server.wait() == 0
    assert not differences(whole, state_of(world.work, None))


def test_names_that_differ_in_case_name_one_folder(world: World) -> None:
    """As in a case-insensitive folder: links stand in for the other names of a run and its data."""
    _, whole = world.undisturbed(KILLED["train, resumed"])
    world.fresh()
    names = ("runs/half", "runs/.half.lock", "data/my", "data/.my.lock", "source/my.txt")
    links = []
    for name in names:
        folder, base = name.split("/")
        links.append(world.work / folder / base.replace("half", "HALF").replace("my", "MY"))
        links[-1].symlink_to(base)
    settings = KILLED["train, resumed"].replace("my.txt", "MY.txt").replace(" half", " HALF")
    refused = world.run(f"{settings} --learning-rate 0.5")
    assert refused.code == 2
    assert "HALF exists with other settings" in refused.err
    ended = world.run(settings)
    assert ended.code == 0, ended.err
    for link in links:
        link.unlink(missing_ok=True)
    # Which has the source as it was typed last.
    assert differences(whole, state_of(world.work, None)) == ["runs/half/config.toml"]
