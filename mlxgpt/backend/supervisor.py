"""Run the command in a child process and explain its crash; used on Linux if memory is limited.

A process cannot report these crashes itself: MLX's CPU allocator does not check the result of
malloc, OpenBLAS exits if it gets no memory, and in a container the kernel kills the process.
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
    """Return whether a supervisor runs this process; it is then killed when the supervisor ends."""
    if os.environ.pop(SUPERVISED_ENV, None) is None:
        return False
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FORWARDED_SIGNALS, signal.SIGCHLD})
    return True


CLEAN_EXIT_OFFSET = 64  # added to the exit code of a child that did not crash
CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)


def run_supervised() -> int:
    """Run this process's command line in a child process, and return its exit code.

    Raises:
        UserError: if the child crashed.
    """
    assert sys.platform == "linux"
    signals = {*FORWARDED_SIGNALS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the child unblocks them when it is ready
    command = [sys.executable, *sys.orig_argv[1:]]
    child = subprocess.Popen(command, env={**os.environ, SUPERVISED_ENV: "1"})
    while child.poll() is None:
        signal_info = signal.sigwaitinfo(signals)
        # Signals from the terminal have a code above 0 and reach the child directly.
        if signal_info.si_signo in FORWARDED_SIGNALS and signal_info.si_code <= 0:
            child.send_signal(signal_info.si_signo)
    code = child.returncode
    if code >= CLEAN_EXIT_OFFSET:
        return code - CLEAN_EXIT_OFFSET
    if -code in CRASH_SIGNALS or code > 0:  # OpenBLAS exits with 1
        exit_reason = signal.Signals(-code).name if code < 0 else f"code {code}"
        raise memory_limits.crash_error(exit_reason)
    return 128 - code
