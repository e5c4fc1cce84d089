"""Check the package structure: import direction, cycles, test layout and file references."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

# Layers from top to bottom. A module imports only from layers below it and from its own package.
ORDER = (
    "__main__",
    "cli",
    "api",
    "learn",
    "playground",
    "html_report",
    "bench",
    "experiments",
    "loaded_model",
    "training",
    "convert",
    "evaluation",
    "inference",
    "storage",
    "model",
    "distributed",
    "backend",
    "data",
    "config",
    "utils",
)
MODULES = ("__main__", "api", "loaded_model")
PACKAGES = tuple(name for name in ORDER if name not in MODULES)

SOURCES = ROOT / "mlxgpt"


def find_modules() -> dict[str, Path]:
    """Map each module's name, without `mlxgpt.`, to its path; the package itself is left out."""
    paths = {}
    for path in SOURCES.rglob("*.py"):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        if parts != ("__init__",):
            paths[".".join(parts)] = path
    return paths


def iter_imports(source: str, module_names: set[str]) -> Iterator[str]:
    """Yield the mlxgpt modules that a module imports anywhere, except `mlxgpt` itself."""
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
            module = name.removeprefix("mlxgpt").removeprefix(".")
            while (
                module and module not in module_names and f"{module}.__init__" not in module_names
            ):
                module = module.rpartition(".")[0]
            if module:
                yield module if module in module_names else f"{module}.__init__"


def import_graph() -> dict[str, set[str]]:
    paths = find_modules()
    return {name: set(iter_imports(p.read_text(), set(paths))) for name, p in paths.items()}


def find_upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports from a lower layer to a higher one."""
    violations = []
    for module, imports in graph.items():
        package = module.split(".")[0]
        for target in imports:
            target_package = target.split(".")[0]
            if package != target_package and ORDER.index(package) >= ORDER.index(target_package):
                violations.append(f"{module} imports {target}")
    return violations


def test_no_layer_imports_from_a_higher_layer() -> None:
    assert {module.split(".")[0] for module in find_modules()} == set(ORDER), (
        "every module is listed"
    )
    assert find_upward_imports(import_graph()) == []


def test_no_circular_imports() -> None:
    graphlib.TopologicalSorter(import_graph()).prepare()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("backend.device", "from mlxgpt.model.gpt import count_parameters"),
        ("data.token_array", "import mlxgpt.training.step"),
        ("model.gpt", "def f():\n    from mlxgpt import api"),
        ("inference.sampling", "from mlxgpt.evaluation import loss"),
        ("utils.errors", "from mlxgpt import config"),
    ],
)
def test_upward_import_is_detected(module: str, line: str) -> None:
    module_names = set(find_modules())
    (violation,) = find_upward_imports({module: set(iter_imports(line, module_names))})
    assert violation.startswith(f"{module} imports ")


# Packages whose code must not depend on the device.
DEVICE_NEUTRAL = ("training", "evaluation", "inference", "model")


def find_cpu_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return imports of `backend.cpu` outside `backend`. mlxgpt/__init__.py, which loads BLAS
    before MLX, is not in the graph.
    """
    return [
        f"{module} imports {target}"
        for module, imports in graph.items()
        for target in imports
        if target.startswith("backend.cpu") and not module.startswith("backend.")
    ]


def test_only_backend_imports_backend_cpu() -> None:
    assert find_cpu_imports(import_graph()) == []


@pytest.mark.parametrize("package", DEVICE_NEUTRAL)
@pytest.mark.parametrize(
    "line",
    [
        "from mlxgpt.backend.cpu import blas",
        "def f():\n    import mlxgpt.backend.cpu.parallel",
        "from mlxgpt.backend import cpu",
    ],
)
def test_import_of_backend_cpu_is_detected(package: str, line: str) -> None:
    module_names = set(find_modules())
    (module, *_) = sorted(name for name in module_names if name.startswith(f"{package}."))
    (violation,) = find_cpu_imports({module: set(iter_imports(line, module_names))})
    assert violation.startswith(f"{module} imports backend.cpu")


def test_circular_import_is_detected() -> None:
    lines = {"data.tokenizers.bpe": "from mlxgpt.data import token_array", "data.token_array": ""}
    circle = lines | {"data.token_array": "from mlxgpt.data.tokenizers.bpe import gpt2"}
    for sources, error in ((lines, None), (circle, graphlib.CycleError)):
        sorter = graphlib.TopologicalSorter(
            {
                module: set(iter_imports(source, set(find_modules())))
                for module, source in sources.items()
            }
        )
        if error:
            with pytest.raises(error):
                sorter.prepare()
        else:
            sorter.prepare()


# Packages whose distribution name differs.
DISTRIBUTIONS = {"harper": "harper_py", "markdown_it": "markdown_it_py", "tiktoken_ext": "tiktoken"}


def test_imported_packages_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras for line in extras[name])]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for path in find_modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    third_party = imported - set(sys.stdlib_module_names) - {"mlxgpt"}
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} <= declared


def test_suggested_installations_are_those_of_an_extra() -> None:
    """In a remedy, `pip install 'a>=1,<2' 'b>=3,<4'` has the packages and versions of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [set(requirements) for requirements in project["optional-dependencies"].values()]
    command = re.compile(r"pip install(( '[^']*')+)")
    suggested = [
        set(re.findall("'([^']*)'", match[1]))
        for path in find_modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for match in command.finditer(node.value)
    ]
    assert len(suggested) >= 7
    assert all(requirements in extras for requirements in suggested), suggested


def test_only_cli_imports_rich() -> None:
    for name, path in find_modules().items():
        if name.split(".")[0] != "cli":
            source = path.read_text()
            assert "import rich" not in source, name
            assert "from rich" not in source, name


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_have_a_docstring_and_no_exports(package: str) -> None:
    tree = ast.parse((SOURCES / package / "__init__.py").read_text())
    docstring = ast.get_docstring(tree)
    assert docstring
    assert len(docstring) > 60
    assert len(tree.body) == 1 or package == "config", (
        "and exports nothing; config has its dataclasses"
    )


def test_tests_mirror_the_packages() -> None:
    """A module's tests are in the folder of its package and named after it."""
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(PACKAGES) <= folders
    module_names = set(find_modules())
    # Tests that cover several modules.
    exceptions = {
        "contract",
        "damage",
        "deleted",
        "formats",
        "interrupted",
        "long_haul",
        "ranks",
        "resume",
    }
    for package in PACKAGES:
        for path in (ROOT / "tests" / package).glob("test_*.py"):
            words = path.stem.removeprefix("test_").split("_")
            names = {"_".join(words[: n + 1]) for n in range(len(words))}  # NAME or NAME_TOPIC
            assert names & exceptions or {f"{package}.{name}" for name in names} & module_names, (
                path.name
            )


def test_referenced_files_exist() -> None:
    """Check paths in the documents, and files after "see" in the modules."""
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")]
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    mentions = [
        (path, name)
        for path in documents
        if path.name != "CHANGELOG.md"  # it names files that no longer exist
        for name in re.findall(r"(?:mlxgpt|tests|benchmarks)/[\w/]+\.py", path.read_text())
    ]
    for path in find_modules().values():
        mentions += [(path, name) for name in re.findall(r"see ([\w/]+\.py)", path.read_text())]
    assert mentions
    for path, name in mentions:
        assert any(file.endswith(f"/{name}") or file == name for file in files), (path, name)


def test_module_docstrings_contain_no_imports() -> None:
    for name, path in find_modules().items():
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert not re.search(r"^import \w+$", text, re.MULTILINE), name


# These treat an unreadable path as missing; their replacements in files.py raise instead.
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


def test_unreadable_paths_are_never_treated_as_missing() -> None:
    for name, path in find_modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            attribute, owner = node.func.attr, ast.unparse(node.func.value)
            assert attribute not in NEVER_RAISING or owner == "files", f"{name}:{node.lineno}"
            if (owner, attribute) == ("os", "walk"):
                assert "onerror" in {keyword.arg for keyword in node.keywords}, name
