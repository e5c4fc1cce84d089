"""Install the wheel into an empty environment, then train and generate in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.fake_hub import Hub, make_shakespeare_repos, run_servers

ROOT = Path(__file__).parents[1]


def run_command(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLXGPT"))}
    environment |= variables
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def mlxgpt_command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `mlxgpt` command of an environment with the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run_command(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("mlxgpt-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    run_command(*pip, "--python", python, "install", "--quiet", wheel, cwd=folder)
    return folder / "env" / "bin" / "mlxgpt"


def test_the_wheel_trains_and_generates(
    mlxgpt_command: Path, text_file: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    small = ["--n-layer", "1", "--n-embd", "16", "--block-size", "16", "--max-steps", "6"]
    run_command(mlxgpt_command, "train", "--tier", "1", "--source", text_file, *small, cwd=empty)
    assert {path.name for path in empty.iterdir()} == {"data", "runs"}
    text = run_command(mlxgpt_command, "generate", "to be", "--max-tokens", "20", cwd=empty)
    assert text.startswith("to be")
    assert len(text) == len("to be") + 20 + 1


def test_the_wheel_fetches_shakespeare_and_trains(
    mlxgpt_command: Path, real_texts: Path, tmp_path: Path
) -> None:
    """From the download on the hub to a run, with the real dataset."""
    text = (real_texts / "shakespeare" / "input.txt").read_bytes().decode()
    hub = Hub(make_shakespeare_repos(text))
    with run_servers(hub):
        variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
        small = ["--n-layer", "1", "--n-embd", "16", "--block-size", "16", "--max-steps", "6"]
        fast = ["--sample-tokens", "0", "--batch-size", "128", "--warmup-steps", "0"]
        run_command(
            mlxgpt_command, "train", "--tier", "1", *small, *fast, cwd=tmp_path, **variables
        )
    assert (tmp_path / "runs" / "tier1-shakespeare" / "best.json").exists()


def test_the_wheel_contains_the_synthetic_stories(mlxgpt_command: Path, tmp_path: Path) -> None:
    stdout = run_command(
        mlxgpt_command, "prepare", "synthetic", "--megabytes", "0.05", cwd=tmp_path
    )
    assert stdout.startswith("data/synthetic: 50,")


def test_the_wheel_contains_the_configs_and_no_tests(mlxgpt_command: Path) -> None:
    (package,) = mlxgpt_command.parents[1].glob("lib/python*/site-packages/mlxgpt")
    assert {p.name for p in (package / "configs").iterdir()} == {
        p.name for p in (ROOT / "configs").iterdir()
    }
    assert not (package.parent / "tests").exists()


def test_the_wheel_contains_the_playground_page(mlxgpt_command: Path) -> None:
    """Including d3's license."""
    (package,) = mlxgpt_command.parents[1].glob("lib/python*/site-packages/mlxgpt")
    source_folder, installed_folder = (
        p / "playground" / "static" for p in (ROOT / "mlxgpt", package)
    )
    assert {p.name for p in installed_folder.iterdir()} == {p.name for p in source_folder.iterdir()}
    assert "Bostock" in (installed_folder / "d3-LICENSE.txt").read_text()
