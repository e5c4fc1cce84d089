from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxgpt.backend import execution
from mlxgpt.backend.cpu import jit
from mlxgpt.backend.device import on_cpu

pytestmark = pytest.mark.skipif(not on_cpu(), reason="a matter of the CPU")

# A kernel of each process's own, so that it is compiled, whatever is kept from before.
PRINT_STATUS = """
import os
from mlxgpt.backend import execution
import mlx.core as mx
print(execution.compile_failure())
own = float(os.getpid())
f = execution.compile_function(lambda x: mx.exp(x) * own + x)
print(f(mx.zeros(3)).tolist() == [own] * 3, os.environ.get("TMPDIR"))
"""


def run_python(**environment: str) -> tuple[str, str, str]:
    """What a new process finds: its status, whether it computes rightly, and where TMPDIR is."""
    result = subprocess.run(
        [sys.executable, "-c", PRINT_STATUS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    status, output = result.stdout.splitlines()
    correct, _, folder = output.partition(" ")
    return status, correct, folder


def make_bin_folder(folder: Path, *names: str, gxx: str = "") -> str:
    """A PATH with some of this machine's commands, and a g++ made up."""
    folder.mkdir()
    for name in names:
        executable = shutil.which(name)
        assert executable
        (folder / name).symlink_to(executable)
    if gxx:
        (folder / "g++").write_text(f"#!/bin/sh\n{gxx}\n")
        (folder / "g++").chmod(0o755)
    return str(folder)


@pytest.mark.usefixtures("compiler")
def test_kernels_are_compiled_into_the_users_own_folder(tmp_path: Path) -> None:
    cache, shared = tmp_path / "cache", tmp_path / "tmp"
    shared.mkdir()
    result = run_python(XDG_CACHE_HOME=str(cache), TMPDIR=str(shared))
    assert result == ("None", "True", str(cache / "mlxgpt"))
    assert len(list(cache.rglob("mlx/*/cpu/*.so"))) == 2, "a trial's and its own"
    assert list(shared.iterdir()) == [], "which other users share"
    assert [p.name for p in (cache / "mlxgpt" / jit.SCRIPT_FOLDER).iterdir()] == ["g++"]


def test_without_a_compiler_it_computes_all_the_same(tmp_path: Path) -> None:
    status, correct, _ = run_python(PATH=make_bin_folder(tmp_path / "bin", "sh"))
    assert status.startswith("no C++ compiler (g++): kernel fusion is off")
    assert "install" in status
    assert correct == "True"


@pytest.mark.parametrize(
    ("gxx", "problem"),
    [
        ("echo internal error >&2; exit 1", "internal error"),
        ("true", "trial.so"),  # which it did not make
        ("for name; do :; done; echo rubbish > $name", "trial.so"),
    ],
)
def test_a_compiler_that_fails_ends_nothing(tmp_path: Path, gxx: str, problem: str) -> None:
    gxx = f"""case $1 in --version) exit;; esac; {gxx}"""
    path = make_bin_folder(tmp_path / "bin", "sh", "mv", gxx=gxx)
    status, correct, _ = run_python(PATH=path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert status.startswith("the C++ compiler failed (")
    assert problem in status
    assert correct == "True"


def test_compilation_that_was_disabled_by_the_user_is_named() -> None:
    status, correct, _ = run_python(MLX_DISABLE_COMPILE="1")
    assert status.startswith("MLX_DISABLE_COMPILE is set: kernel fusion is off")
    assert correct == "True"


@pytest.mark.usefixtures("compiler")
def test_a_compiler_that_does_not_answer_once_is_told(tmp_path: Path) -> None:
    gxx = f"""case $1 in --version) kill -9 $$;; esac; PATH={os.environ["PATH"]}
exec {jit.find_gxx()} "$@" """
    status, correct, _ = run_python(PATH=make_bin_folder(tmp_path / "bin", "sh", "mv", gxx=gxx))
    assert status.startswith("the C++ compiler failed (it does not respond to MLX): kernel fusion")
    assert correct == "True"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("good", [1, 2, 3])
def test_a_compiler_that_fails_later_ends_no_training(
    tmp_path: Path, text_file: Path, good: int
) -> None:
    """After so many good calls: the disk fills up, or memory does."""
    compiler = jit.find_gxx()
    count_calls = (
        f"echo x >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) -le {good} ] || exit 1"
    )
    answer_version = "case $1 in --version) exit;; esac"
    gxx = f'{answer_version}; {count_calls}; PATH={os.environ["PATH"]} exec {compiler} "$@"'
    path = make_bin_folder(tmp_path / "bin", "sh", "mv", "wc", gxx=gxx)
    shape = "--n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2 --max-steps 4"
    line = f"train --tier 1 --source {text_file} {shape} --sample-tokens 0 --warmup-steps 0"
    result = subprocess.run(
        [sys.executable, "-m", "mlxgpt", *line.split()],
        env={**os.environ, "PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "the C++ compiler failed (it cannot compile MLX's kernels)" in result.stderr
    assert "4 of 4 steps" in result.stderr
    assert "11 checks passed" in result.stderr


def test_another_error_is_not_the_compilers() -> None:
    assert execution.disable_compilation_on_error(RuntimeError("something else")) is None
    assert execution.compile_failure() is None or "g++" in str(execution.compile_failure())


@pytest.mark.usefixtures("compiler")
def test_where_the_users_folder_cannot_be_written_one_is_made_that_goes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shared = tmp_path / "tmp"
    shared.mkdir()
    blocked = str(tmp_path / "file" / "cache")
    status, correct, folder = run_python(XDG_CACHE_HOME=blocked, TMPDIR=str(shared))
    assert (status, correct) == ("None", "True")
    assert folder.startswith(f"{shared}/mlxgpt-")
    assert list(shared.iterdir()) == []


def test_a_folder_without_room_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(1 << 30, 1 << 30, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="is full"):
        jit._try_compiler(tmp_path, "g++")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("training", [True, False])
def test_what_the_compiler_makes_appears_whole_whenever_ctrl_c_comes(
    tmp_path: Path, training: bool
) -> None:
    """As MLX calls it: a shell, in the terminal's foreground with everything else."""
    started_file, resume_file = tmp_path / "begun", tmp_path / "may-end"
    gxx = (
        f'for last; do :; done; echo half > "$last"; echo > {started_file}; '
        f'until [ -e {resume_file} ]; do sleep 0.1; done; exec {jit.find_gxx()} "$@"'
    )
    path = make_bin_folder(tmp_path / "bin", "sh", "mv", "sleep", gxx=gxx)
    (tmp_path / "script").write_text(jit.SCRIPT)
    (tmp_path / "script").chmod(0o755)
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text(jit.TRIAL_SOURCE)
    flags = " ".join(jit.GXX_FLAGS)
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'"{tmp_path}/script" {flags} "{source}" -o "{library}" 2>&1'],
        env={
            "PATH": f"{path}:/usr/bin:/bin",
            jit.GXX_ENV: f"{path}/g++",
            jit.IGNORE_SIGINT_ENV: "yes" if training else "",
        },
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not started_file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert not library.exists()
    os.killpg(process.pid, signal.SIGINT)
    resume_file.touch()
    output, _ = process.communicate()
    assert output == ""
    assert library.exists() == training
    assert not training or library.stat().st_size > 1000


def test_a_training_is_not_disturbed() -> None:
    with execution.shield_from_sigint():
        assert os.environ[jit.IGNORE_SIGINT_ENV]
    assert jit.IGNORE_SIGINT_ENV not in os.environ


@pytest.mark.usefixtures("compiler")
def test_mlx_calls_the_script_and_it_calls_the_compiler() -> None:
    """In a child process too, whose PATH has the script already."""
    assert execution.compile_failure() is None
    executable = shutil.which("g++")
    assert executable
    assert Path(executable).read_text() == jit.SCRIPT
    assert jit.find_gxx() == os.environ[jit.GXX_ENV] != executable
    assert run_python()[:2] == ("None", "True")


def test_what_is_no_library_is_left_to_the_compiler_as_it_was_asked(tmp_path: Path) -> None:
    """PyTorch, in the same process, has headers preprocessed by the first g++ in PATH."""
    folder = make_bin_folder(tmp_path / "bin", gxx='echo "$@"')
    (tmp_path / "script").write_text(jit.SCRIPT)
    command = ["/bin/sh", str(tmp_path / "script"), "a.hpp", "-E", "-P", "-o", "a.i"]
    environment = {jit.GXX_ENV: f"{folder}/g++"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "a.hpp -E -P -o a.i\n"


def test_others_get_an_environment_without_it() -> None:
    assert execution.compile_failure() is None or "g++" in str(execution.compile_failure())
    cleaned = jit.remove_script_from_environment(os.environ)
    assert jit.GXX_ENV not in cleaned
    assert "TMPDIR" not in cleaned or jit.GXX_ENV not in os.environ
    executable = shutil.which("g++", path=cleaned["PATH"])
    assert executable is None or not jit._is_script(Path(executable))
    unchanged = {"PATH": "/bin", "TMPDIR": "/somewhere"}
    assert jit.remove_script_from_environment(unchanged) == unchanged


def test_a_stub_that_opens_apples_installer_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "is_xcode_stub", lambda program: True)
    assert jit.find_gxx() is None


def test_the_script_of_another_version_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would call itself, without end."""
    script = "# Calls g++ for MLX; see another file.\nexec $MLXGPT_GXX"
    monkeypatch.setenv("PATH", make_bin_folder(tmp_path / "bin", gxx=script))
    assert jit.find_gxx() is None


def test_a_compiler_that_cannot_be_read_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs need not be readable to run; root reads all the same, so both are made up."""
    monkeypatch.setenv("PATH", path := make_bin_folder(tmp_path / "bin", gxx="exit"))
    original_access = os.access

    def access(path: str | Path, mode: int) -> bool:
        return mode != os.R_OK and original_access(path, mode)

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(Path, "open", refuse)
    assert jit.find_gxx() == f"{path}/g++"
