"""macOS-specific code: check for Apple silicon, sleep prevention, sysctl.

Standard library only, since MLX does not load on Intel Macs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from mlxgpt.utils.errors import UserError


def check_apple_silicon() -> None:
    """Check that a Mac has Apple silicon and a native Python.

    Raises:
        UserError: on an Intel Mac, and for an Intel build of Python under Rosetta.
    """
    if sys.platform != "darwin" or os.uname().machine == "arm64":
        return
    if _is_rosetta():
        raise UserError(
            f"this Python ({sys.executable}) is an Intel build under Rosetta, where MLX cannot run",
            "open a terminal without Rosetta and create a new environment with a Python for Apple "
            "silicon (from python.org, Homebrew or uv).",
        )
    raise UserError(
        "this Mac has an Intel processor, but MLX needs Apple silicon",
        "use a Mac with an M1 or later, or Linux.",
    )


@contextlib.contextmanager
def prevent_sleep() -> Iterator[None]:
    """Context that keeps a Mac from going to sleep; does nothing on other systems."""
    if sys.platform != "darwin":
        yield
        return
    process = None
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            # -i: no idle sleep; -w: until this process ends, even if it is killed.
            ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not reach it while we finish a step
        )
    try:
        yield
    finally:
        if process:
            process.terminate()
            process.wait()


def sysctl(name: str) -> str:
    """A value of macOS's `sysctl`; empty if it does not exist."""
    with contextlib.suppress(OSError):
        command = ["/usr/sbin/sysctl", "-n", name]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def is_xcode_stub(program: str) -> bool:
    """Whether a program, such as /usr/bin/git, is a stub that opens the installer of Apple's
    developer tools, because they are missing.
    """
    if sys.platform != "darwin" or not program.startswith("/usr/bin/"):
        return False
    command = ["/usr/bin/xcode-select", "-p"]  # fails if the tools are not installed
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def _is_rosetta() -> bool:
    """Whether Rosetta translates this process."""
    return sysctl("sysctl.proc_translated") == "1"
