"""Linux only, where memory is limited: the command in a child process, and its crash explained.

MLX's CPU allocator writes to what malloc returned without a check, OpenBLAS ends the process where
it gets no memory, and a container's kernel kills: a process cannot report any of these itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

from mlxgpt.backend import memory_limits

SUPERVISED = "MLXGPT_SUPERVISED"
REGULAR = 64  # added to the exit code of a child that ended as it meant to
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)


def begin_as_child() -> bool:
    """Whether another process waits to explain how this one ends. This one then ends with it."""
    if os.environ.pop(SUPERVISED, None) is None:
        return False
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FORWARDED, signal.SIGCHLD})
    return True


def run_again() -> int:
    """Run this process's own command line as a child; its exit code.

    Raises:
        UserError: if it crashed.
    """
    assert sys.platform == "linux"
    awaited = {*FORWARDED, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # the child unblocks them when it is ready
    command = [sys.executable, *sys.orig_argv[1:]]
    child = subprocess.Popen(command, env={**os.environ, SUPERVISED: "1"})
    while child.poll() is None:
        received = signal.sigwaitinfo(awaited)
        # What the terminal sends, both get: the kernel's code is above 0.
        if received.si_signo in FORWARDED and received.si_code <= 0:
            child.send_signal(received.si_signo)
    code = child.returncode
    if code >= REGULAR:
        return code - REGULAR
    if -code in CRASHES or code > 0:  # OpenBLAS ends with 1
        ended = signal.Signals(-code).name if code < 0 else f"code {code}"
        raise memory_limits.crash(ended)
    return 128 - code
