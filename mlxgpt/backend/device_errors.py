"""GPU errors: recognize the errors that MLX raises, and convert them to user errors.

MLX raises all of them as RuntimeError, so they are recognized by their messages, those of MLX 0.32.
Standard library only, since the command line imports it before MLX is needed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlxgpt.utils.errors import UserError

# Kernel compilation failed: MLX's backend/cpu/compiled.cpp and backend/metal/device.cpp.
CPU_COMPILE_FAILURE = "[Compile::eval_cpu]"
METAL_COMPILE_FAILURES = (
    "Unable to build metal library",
    "Must use > 512 sized block",
    "[compile] Too many inputs/outputs",
)


@dataclass(frozen=True)
class DeviceError:
    """A GPU failure, and whether the process can recover from it.

    Attributes:
        reason: the system's message, one line.
        remedy: what the user can do.
        out_of_memory: whether smaller batches may help.
        recoverable: whether this process can continue to use the GPU. After a CUDA error other than
            out of memory, every later call fails.
    """

    reason: str
    remedy: str
    out_of_memory: bool
    recoverable: bool

    def to_user_error(self, outcome: str = "") -> UserError:
        """Two-line error for the user; `outcome` is appended to the first line."""
        problem = "the GPU is out of memory" if self.out_of_memory else "the GPU failed"
        return UserError(f"{problem}: {self.reason}{outcome}", self.remedy)


# A failed Metal command buffer (MLX's backend/metal/device.cpp), followed by the system's reason.
METAL_PREFIX = "[METAL] Command buffer execution failed: "
ALLOCATION_FAILURES = ("[malloc] Unable to allocate", "[metal::malloc]")
# A failed CUDA call, as in MLX's backend/cuda/utils.cpp, cublas_utils.cpp and cudnn_utils.cpp.
CUDA_FAILURE = re.compile(r"(?:cu|cuda|cublas|cublasLt|cudnn)[A-Z]\w*\(.*\) failed")
OUT_OF_MEMORY = (
    "insufficient memory",
    "outofmemory",
    "out of memory",
    *map(str.lower, ALLOCATION_FAILURES),
)

SLEEP_DISPLAY_REMEDY = (
    "let the display sleep (pmset displaysleepnow) and run the same command again; if that does "
    "not help, set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 (it slows the display, and does not help "
    "everyone)."
)
LESS_MEMORY_REMEDY = "close other programs, or use a smaller --batch-size, --block-size or model."
RUN_AGAIN_REMEDY = "run the same command again; if it fails again, update the GPU's driver and MLX."


def classify_device_error(error: BaseException) -> DeviceError | None:
    """Convert an exception to a DeviceError; None if it does not report a GPU failure."""
    text = str(error)
    lines = text.removeprefix(METAL_PREFIX).strip().splitlines()
    reason = lines[0].rstrip(".")[:300] if lines else ""
    if any(words in text for words in METAL_COMPILE_FAILURES):  # even with mx.compile disabled
        return DeviceError(reason, RUN_AGAIN_REMEDY, out_of_memory=False, recoverable=False)
    is_metal = METAL_PREFIX in text
    if not (is_metal or text.startswith(ALLOCATION_FAILURES) or CUDA_FAILURE.match(text)):
        return None
    if any(words in text.lower() for words in OUT_OF_MEMORY):
        return DeviceError(reason, LESS_MEMORY_REMEDY, out_of_memory=True, recoverable=True)
    remedy = SLEEP_DISPLAY_REMEDY if is_metal else RUN_AGAIN_REMEDY
    return DeviceError(reason, remedy, out_of_memory=False, recoverable=is_metal)


def is_compile_failure(error: BaseException) -> bool:
    """Whether an exception means that MLX could not compile a kernel at run time."""
    texts = (CPU_COMPILE_FAILURE, *METAL_COMPILE_FAILURES)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextlib.contextmanager
def convert_device_errors(outcome: str = "") -> Iterator[None]:
    """Context that converts GPU failures to user errors.

    Raises:
        UserError: for a GPU failure.
    """
    try:
        yield
    except RuntimeError as error:
        if failure := classify_device_error(error):
            raise failure.to_user_error(outcome) from error
        raise
