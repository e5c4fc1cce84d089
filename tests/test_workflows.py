"""GitHub's workflows and issue forms: they parse, and the commands they name exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # a dependency of huggingface-hub

from mlxgpt.cli.parser import COMMANDS
from tests.helpers.commands import ROOT

WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*_report.yml"))

MAKEFILE_TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKE_CALL = re.compile(r"\bmake ([a-z0-9-]+)")
MLXGPT_CALL = re.compile(r"\bmlxgpt ([a-z]+)")
SCRIPT = re.compile(r"[\w./-]+\.(?:py|sh)\b|\.ci/run\b|docs/[\w./-]+\.md\b|\b[A-Z]+\.md\b")


def load_jobs(path: Path) -> dict[str, dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    assert isinstance(jobs, dict)
    return jobs


def find_missing(text: str) -> list[str]:
    """Targets of the Makefile, commands of mlxgpt, scripts and pages that a text names in vain."""
    missing = [f"make {name}" for name in MAKE_CALL.findall(text) if name not in MAKEFILE_TARGETS]
    missing += [f"mlxgpt {name}" for name in MLXGPT_CALL.findall(text) if name not in COMMANDS]
    text = text.replace("mlxgpt-report/", "")  # the folder of an unpacked sdist
    return missing + [name for name in SCRIPT.findall(text) if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", [*WORKFLOWS, *FORMS], ids=lambda path: path.name)
def test_what_a_workflow_or_form_names_exists(path: Path) -> None:
    text = "\n".join(collect_strings(yaml.safe_load(path.read_text())))
    assert find_missing(text) == []


def collect_strings(tree: Any) -> list[str]:
    if isinstance(tree, dict | list):
        values = tree.values() if isinstance(tree, dict) else tree
        return [text for value in values for text in collect_strings(value)]
    return [tree] if isinstance(tree, str) else []


def test_missing_targets_commands_and_scripts_are_found() -> None:
    text = "make tset && .venv/bin/mlxgpt doktor && python benchmarks/missing.py && make test"
    assert find_missing(text) == ["make tset", "mlxgpt doktor", "benchmarks/missing.py"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs(path: Path) -> None:
    """Every job calls an existing workflow, or has a time limit, actions of a pinned version, and
    an environment of the Python that it names: make would prefer another one.
    """
    for name, job in load_jobs(path).items():
        if "uses" in job:
            assert (ROOT / job["uses"]).exists(), name
            continue
        assert job["timeout-minutes"] <= 90, name
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions), actions
        commands = [step["run"] for step in job["steps"] if "run" in step]
        if any(MAKE_CALL.search(command) for command in commands):
            assert commands[0] == "python -m venv .venv", name


def test_python_versions() -> None:
    """ci.yml has the oldest supported Python and a newer one, and all others are between them."""
    minimum = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    matrix = load_jobs(ROOT / ".github/workflows/ci.yml")["test"]["strategy"]["matrix"]
    oldest, newest = matrix["python"]
    assert oldest == minimum
    for path in WORKFLOWS:
        # All are quoted: 3.10 without quotes would be the number 3.1.
        versions = re.findall(
            r"python-version: (?!\$)\"?(\S+?)(\"?)(?: |$)", path.read_text(), re.M
        )
        for version, quote in versions:
            assert quote, version
            assert parse_version(oldest) <= parse_version(version) <= parse_version(newest)


def parse_version(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_weekly_run_installs_existing_extras() -> None:
    matrix = load_jobs(ROOT / ".github/workflows/weekly.yml")["newest"]["strategy"]["matrix"]
    known_extras = PYPROJECT["project"]["optional-dependencies"].keys()
    assert all(set(entry["extras"].split(",")) <= known_extras for entry in matrix["include"])


def test_only_the_metal_job_may_fail() -> None:
    """And it is the only one without MLXGPT_DEVICE=cpu that runs the tests."""
    for path in WORKFLOWS:
        for name, job in load_jobs(path).items():
            runs_tests = any(step.get("run") == "make test" for step in job.get("steps", []))
            on_cpu = job.get("env", {}).get("MLXGPT_DEVICE") == "cpu"
            assert job.get("continue-on-error", False) == (name == "metal")
            assert (runs_tests and not on_cpu) == (name == "metal")


def test_only_the_release_may_write() -> None:
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
        for name, job in load_jobs(path).items():
            writes = {"contents": "write"} if name == "release" else None
            assert job.get("permissions") == writes


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms(path: Path) -> None:
    """The keys that GitHub requires, and what the form is for."""
    form = yaml.safe_load(path.read_text())
    assert form.keys() <= {"name", "description", "title", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    needed = {"bug_report.yml": "doctor", "machine_report.yml": "report"}[path.name]
    (field,) = (field for field in fields if field["id"] == needed)
    assert field["validations"] == {"required": True}
