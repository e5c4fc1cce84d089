"""Runs the command in a child process and explains its crash: on Linux, if memory is limited.

MLX's CPU allocator writes to what malloc returned without a check, OpenBLAS ends the process where
it gets no memory, and the kernel kills it in a container: no process can report these itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

from mlxgpt.backend import memory_limits

SUPERVISED_ENV = "MLXGPT_SUPERVISED"
FORWARDED_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def enter_supervised_child() -> bool:
    """Whether a supervisor runs this process, which then is killed when the supervisor ends."""
    if os.environ.pop(SUPERVISED_ENV, None) is None:
        return False
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FORWARDED_SIGNALS, signal.SIGCHLD})
    return True


CLEAN_EXIT_OFFSET = 64  # added to the exit code of a child that did not crash
CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)


def run_supervised() -> int:
    """Run this process's own command line as a child, and return its exit code.

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
        # What the terminal sends, with a code above 0, reaches both processes.
        if signal_info.si_signo in FORWARDED_SIGNALS and signal_info.si_code <= 0:
            child.send_signal(signal_info.si_signo)
    code = child.returncode
    if code >= CLEAN_EXIT_OFFSET:
        return code - CLEAN_EXIT_OFFSET
    if -code in CRASH_SIGNALS or code > 0:  # OpenBLAS ends with 1
        exit_reason = signal.Signals(-code).name if code < 0 else f"code {code}"
        raise memory_limits.crash_error(exit_reason)
    return 128 - code
