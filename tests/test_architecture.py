"""Imports run one way: down the house, never up, never across, never in a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT

# From the top down. A room, or a room of a wing, imports only what stands below it, or its own
# wing's rooms.
FRONT = (
    "__main__",
    "cli",
    "standings",
    "display",
    "results",
    "api",
    "overview",
    "benchmarking",
    "comparison",
    "reporting",
    "playing",
    "playground",
    "conversation",
    "loaded_model",
    "requests",
    "chart",
    "console",
    "arguments",
    "parser",
    "flags",
    "streams",
)
WINGS = (
    "pages",
    "reports",
    "study",
    "training",
    "evaluation",
    "inference",
    "interchange",
    "storage",
    "model",
    "corpus",
    "distributed",
    "backend",
    "machine",
)
GROUND = ("config_files", "config", "settings", "files", "seeds", "errors")
HOUSE = (*FRONT, *WINGS, *GROUND)

PACKAGE = ROOT / "mlxgpt"


def rooms() -> dict[str, Path]:
    """Every module but the package itself, by its name without `mlxgpt.`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found[".".join(parts)] = path
    return found


def imported(source: str, known: set[str]) -> Iterator[str]:
    """The rooms that a module imports, wherever in it; those of the package itself (its version)
    are left out, since Python has it before any room.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "mlxgpt":
                continue
            room = name.removeprefix("mlxgpt").removeprefix(".")
            while room and room not in known and f"{room}.__init__" not in known:
                room = room.rpartition(".")[0]
            if room:
                yield room if room in known else f"{room}.__init__"


def graph() -> dict[str, set[str]]:
    known = rooms()
    return {name: set(imported(p.read_text(), set(known))) for name, p in known.items()}


def against_the_order(graph: dict[str, set[str]]) -> list[str]:
    """The imports that do not run down."""
    wrong = []
    for room, others in graph.items():
        wing = room.split(".")[0]
        for other in others:
            theirs = other.split(".")[0]
            if wing != theirs and HOUSE.index(wing) >= HOUSE.index(theirs):
                wrong.append(f"{room} imports {other}")
    return wrong


def test_imports_run_down() -> None:
    assert {room.split(".")[0] for room in rooms()} == set(HOUSE), "the list is the house"
    assert against_the_order(graph()) == []


def test_imports_run_in_no_circle() -> None:
    graphlib.TopologicalSorter(graph()).prepare()


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("machine.device", "from mlxgpt.model.gpt import count_parameters"),
        ("corpus.tokens", "import mlxgpt.training.step"),
        ("model.gpt", "def f():\n    from mlxgpt import api"),
        ("inference.sampling", "from mlxgpt.evaluation import loss"),
        ("errors", "from mlxgpt import seeds"),
    ],
)
def test_an_import_that_runs_up_is_found(room: str, line: str) -> None:
    known = set(rooms())
    (wrong,) = against_the_order({room: set(imported(line, known))})
    assert wrong.startswith(f"{room} imports ")


# Packages that compute as this device does, and must not know which one it is.
DEVICE_NEUTRAL = ("training", "evaluation", "inference", "model")


def past_the_seam(graph: dict[str, set[str]]) -> list[str]:
    """The imports of `backend.cpu` outside of `backend`. The package itself, which is not in the
    graph, loads BLAS before MLX.
    """
    return [
        f"{room} imports {other}"
        for room, others in graph.items()
        for other in others
        if other.startswith("backend.cpu") and not room.startswith("backend.")
    ]


def test_only_backend_knows_the_cpu() -> None:
    assert past_the_seam(graph()) == []


@pytest.mark.parametrize("package", DEVICE_NEUTRAL)
@pytest.mark.parametrize(
    "line",
    [
        "from mlxgpt.backend.cpu import blas",
        "def f():\n    import mlxgpt.backend.cpu.parallel",
        "from mlxgpt.backend import cpu",
    ],
)
def test_an_import_of_the_cpus_is_found(package: str, line: str) -> None:
    known = set(rooms())
    (room, *_) = sorted(name for name in known if name.startswith(f"{package}."))
    (wrong,) = past_the_seam({room: set(imported(line, known))})
    assert wrong.startswith(f"{room} imports backend.cpu")


def test_a_circle_is_found() -> None:
    lines = {"corpus.bpe": "from mlxgpt.corpus import tokens", "corpus.tokens": ""}
    circle = lines | {"corpus.tokens": "from mlxgpt.corpus.bpe import gpt2"}
    for sources, error in ((lines, None), (circle, graphlib.CycleError)):
        sorter = graphlib.TopologicalSorter(
            {room: set(imported(source, set(rooms()))) for room, source in sources.items()}
        )
        if error:
            with pytest.raises(error):
                sorter.prepare()
        else:
            sorter.prepare()


def test_only_the_front_draws() -> None:
    for name, path in rooms().items():
        if name.split(".")[0] not in FRONT:
            source = path.read_text()
            assert "import rich" not in source, name
            assert "from rich" not in source, name


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_says_what_lives_in_it(wing: str) -> None:
    tree = ast.parse((PACKAGE / wing / "__init__.py").read_text())
    said = ast.get_docstring(tree)
    assert said
    assert len(said) > 60
    assert len(tree.body) == 1, "and exports nothing"


def test_tests_mirror_the_house() -> None:
    """A room's tests lie in its wing's folder, under its name."""
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(WINGS) <= folders
    known = set(rooms())
    # Of several modules.
    others = {
        "contract",
        "damage",
        "deleted",
        "formats",
        "interrupted",
        "long_haul",
        "ranks",
        "resume",
    }
    for wing in WINGS:
        for path in (ROOT / "tests" / wing).glob("test_*.py"):
            words = path.stem.removeprefix("test_").split("_")
            names = {"_".join(words[: n + 1]) for n in range(len(words))}  # or a part of its tests
            assert names & others or {f"{wing}.{name}" for name in names} & known, path.name


# These answer "no" or "nothing" where a path cannot be read; files.py has others, which raise.
NEVER_RAISING = (
    "exists",
    "lexists",
    "is_file",
    "isfile",
    "is_dir",
    "isdir",
    "glob",
    "rglob",
    "iglob",
)


def test_what_cannot_be_read_is_never_taken_for_missing() -> None:
    for name, path in rooms().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            attribute, owner = node.func.attr, ast.unparse(node.func.value)
            assert attribute not in NEVER_RAISING or owner == "files", f"{name}:{node.lineno}"
            if (owner, attribute) == ("os", "walk"):
                assert "onerror" in {keyword.arg for keyword in node.keywords}, name
