"""Imported by a server of tests.faults.forked where a command runs a thousand times: tries the C++
compiler once, and ends processes without tidying their memory.
"""

from __future__ import annotations

import atexit
import gc
import os

from mlxgpt import files
from mlxgpt.machine import compiler

if gxx := compiler.real():
    compiler._try(next(files.own_folders()), gxx)
    compiler._try = lambda folder, gxx: None
gc.freeze()
atexit.register(os._exit, 0)  # other exit codes take another way
