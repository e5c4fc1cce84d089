"""Check that retired phrases, names and modules do not return."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

# Pattern: (example that it matches, example that it must not match).
PHRASES = {
    r"\bwhoever\b": ("whoever reads the log", "who reads the log"),
    r"\bhangs? on\b": ("what the bits hang on", "it hangs in a collective"),
    r"\banew\b": ("begun anew", "begun with a new seed"),
    r"\bmend(s|ed)?\b": ("mend that line", "we recommend it"),
    r"\bwhat came of\b": ("what came of it", "the error came from MLX"),
    r"\bto and fro\b": ("weights to and fro", "to and from the hub"),
    r"\bby itself\b": ("it ends by itself", "each process itself"),
    r"\btells? of\b": ("config.toml tells of 12 layers", "it tells them apart"),
    r"\bthe world's\b": ("the world's files", "hello, world"),
    r"\bwings?\b": ("a wing of the package", "swing"),
    r"\bcannot be had\b": ("if it cannot be had", "it cannot be downloaded"),
    r"\bat the most\b": ("at the most 20 seeds", "at most 20 seeds"),
    r"\bgoes on\b": ("the run goes on", "the run continues"),
    r"\bis told\b": ("the user is told", "the total is shown"),
    r"\bso many\b": ("after so many steps", "after many steps"),
    r"\bbeside\b": ("beside the other run", "besides, it is slow"),
    r"(?<!there )\bis no (?!longer|more|less|better|other)[a-z]": (
        "it is no GPT-2",
        "there is no run",
    ),
}
# Retired name: a similar name that is allowed.
NAMES = {
    "asked": "is_asked",
    "begun": "begin",
    "brought": "broadcast",
    "found": "find_run",
    "given": "given_name",
    "hung_on": "weight_affecting",
    "made": "make",
    "mine": "min",
    "must_be_like": "check_shapes",
    "one": "one_hot",
    "ours": "hours",
    "said": "raised",
    "seen": "seen_mask",
    "told": "total",
    "wanted": "expected",
    "whole": "is_complete",
    "with_room": "pad_cache",
    "worth": "width",
}
# Retired module or package: a similar one that is allowed.
MODULES = {
    "mlxgpt.arguments": "mlxgpt.cli.parser",
    "mlxgpt.benchmarking": "mlxgpt.bench.benchmark",
    "mlxgpt.chart": "mlxgpt.cli.loss_plot",
    "mlxgpt.comparison": "mlxgpt.experiments.compare",
    "mlxgpt.config_files": "mlxgpt.config.toml",
    "mlxgpt.conversation": "mlxgpt.cli.repl",
    "mlxgpt.corpus": "mlxgpt.data",
    "mlxgpt.display": "mlxgpt.cli.progress",
    "mlxgpt.errors": "mlxgpt.utils.errors",
    "mlxgpt.files": "mlxgpt.utils.files",
    "mlxgpt.flags": "mlxgpt.cli.config_flags",
    "mlxgpt.interchange": "mlxgpt.convert",
    "mlxgpt.machine": "mlxgpt.backend",
    "mlxgpt.overview": "mlxgpt.storage.info",
    "mlxgpt.pages": "mlxgpt.html_report",
    "mlxgpt.playing": "mlxgpt.playground.play",
    "mlxgpt.reporting": "mlxgpt.html_report.report",
    "mlxgpt.reports": "mlxgpt.bench",
    "mlxgpt.requests": "mlxgpt.config.resolve",
    "mlxgpt.results": "mlxgpt.cli.tables",
    "mlxgpt.rivals": "benchmarks.baselines",
    "mlxgpt.seeds": "mlxgpt.utils.seeds",
    "mlxgpt.settings": "mlxgpt.config.fields",
    "mlxgpt.standings": "mlxgpt.cli.study_view",
    "mlxgpt.streams": "mlxgpt.cli.streams",
    "mlxgpt.study": "mlxgpt.experiments",
}
SOURCES = sorted((ROOT / "mlxgpt").rglob("*.py"))
DOCUMENTS = [
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "data/*.md",
        "configs/*.toml",
        "benchmarks/*.md",
        "benchmarks/notes/*.md",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.name not in ("CHANGELOG.md", "README.pt-BR.md")  # former names; Portuguese
]


def prose(source: str) -> str:
    """Return the docstrings, strings and comments of a module."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*strings, *comments])


def defined_names(source: str) -> Iterator[str]:
    """Yield the functions, classes, parameters and variables that a module defines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def names_module(text: str, module: str) -> bool:
    """Return whether a text mentions the module or its file."""
    path = module.replace(".", "/")
    dotted = rf"(?<![\w.]){re.escape(module)}(?!\w)"
    return bool(re.search(rf"{dotted}|(?<![\w/]){path}(?:\.py|/)", text))


@pytest.mark.parametrize("pattern", PHRASES)
def test_retired_phrase_is_not_used(pattern: str) -> None:
    example, allowed = PHRASES[pattern]
    find = re.compile(pattern, re.IGNORECASE)
    assert find.search(example)
    assert not find.search(allowed)
    texts = {path: path.read_text(encoding="utf-8") for path in (*SOURCES, *DOCUMENTS)}
    for path, text in texts.items():
        for line in (prose(text) if path.suffix == ".py" else text).splitlines():
            assert not find.search(line), f"{path.relative_to(ROOT)}: {line}"


def test_no_retired_name_is_defined() -> None:
    for path in SOURCES:
        retired = {name for name in defined_names(path.read_text()) if name.strip("_") in NAMES}
        assert not retired, path.relative_to(ROOT)


@pytest.mark.parametrize(
    "line", ["{} = 1", "def {}(): ...", "def f({}): ...", "for {} in x: ...", "x._{} = 1"]
)
@pytest.mark.parametrize("name", NAMES)
def test_retired_name_is_detected(line: str, name: str) -> None:
    assert name in {found.strip("_") for found in defined_names(line.format(name))}
    assert name not in set(defined_names(line.format(NAMES[name])))


def test_public_names_are_unique() -> None:
    """Except for the functions that every command has."""
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT / "mlxgpt")))
    for name, paths in where.items():
        is_command = all(path.startswith("cli/commands/") for path in paths)
        assert len(paths) == 1 or is_command, (name, paths)


@pytest.mark.parametrize("module", MODULES)
def test_retired_module_is_not_mentioned(module: str) -> None:
    path = ROOT / module.replace(".", "/")
    assert not path.exists()
    assert not path.with_suffix(".py").exists()
    assert names_module(f"from {module} import x", module)
    assert names_module(f"see {module.replace('.', '/')}.py", module)
    assert not names_module(f"from {MODULES[module]} import x", module)
    tests = [p for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__)]
    for source in (*SOURCES, *DOCUMENTS, *tests, *(ROOT / "benchmarks").rglob("*.py")):
        assert not names_module(source.read_text(encoding="utf-8"), module), source
