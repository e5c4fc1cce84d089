"""macOS only: the check for Apple silicon, no sleep while training, sysctl.

Standard library only, since MLX does not even load on other Macs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from mlxgpt.utils.errors import UserError


def check_apple_silicon() -> None:
    """Refuse a Mac where Python does not run natively on Apple silicon.

    Raises:
        UserError: on an Intel Mac, and for an Intel Python under Rosetta.
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
    """Keep a Mac from going to sleep: a Mac asleep trains nothing."""
    if sys.platform != "darwin":
        yield
        return
    process = None
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            # -i: while idle; -w: no longer than this process lives, however it ends.
            ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us, and there is a step to finish
        )
    try:
        yield
    finally:
        if process:
            process.terminate()
            process.wait()


def sysctl(name: str) -> str:
    """A value of macOS's `sysctl`; empty where there is none."""
    with contextlib.suppress(OSError):
        command = ["/usr/sbin/sysctl", "-n", name]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def is_xcode_stub(program: str) -> bool:
    """Whether a program, such as /usr/bin/git, would open the installer of Apple's developer tools
    instead of doing its work, since these are missing.
    """
    if sys.platform != "darwin" or not program.startswith("/usr/bin/"):
        return False
    command = ["/usr/bin/xcode-select", "-p"]  # prints their folder, fails where there is none
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def _is_rosetta() -> bool:
    """Whether Rosetta translates this process."""
    return sysctl("sysctl.proc_translated") == "1"
