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

SUPERVISED_ENV = "MLXGPT_SUPERVISED"
CLEAN_EXIT_OFFSET = 64  # added to the exit code of a child that ended as it meant to
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
FORWARDED_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)


def enter_supervised_child() -> bool:
    """Whether another process waits to explain how this one ends. This one then ends with it."""
    if os.environ.pop(SUPERVISED_ENV, None) is None:
        return False
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FORWARDED_SIGNALS, signal.SIGCHLD})
    return True


def run_supervised() -> int:
    """Run this process's own command line as a child; its exit code.

    Raises:
        UserError: if it crashed.
    """
    assert sys.platform == "linux"
    signals = {*FORWARDED_SIGNALS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the child unblocks them when it is ready
    command = [sys.executable, *sys.orig_argv[1:]]
    child = subprocess.Popen(command, env={**os.environ, SUPERVISED_ENV: "1"})
    while child.poll() is None:
        signal_info = signal.sigwaitinfo(signals)
        # What the terminal sends, both get: the kernel's code is above 0.
        if signal_info.si_signo in FORWARDED_SIGNALS and signal_info.si_code <= 0:
            child.send_signal(signal_info.si_signo)
    code = child.returncode
    if code >= CLEAN_EXIT_OFFSET:
        return code - CLEAN_EXIT_OFFSET
    if -code in CRASH_SIGNALS or code > 0:  # OpenBLAS ends with 1
        exit_reason = signal.Signals(-code).name if code < 0 else f"code {code}"
        raise memory_limits.crash_error(exit_reason)
    return 128 - code
