"""GPU errors: recognizes what MLX raises where it waits for a GPU, and words it for the user.

MLX reports all of them as RuntimeError, and only their text tells them apart. The texts are those
of MLX 0.32. Standard library only, since the command line imports it before MLX is needed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlxgpt.utils.errors import UserError

# A kernel that MLX cannot compile: backend/cpu/compiled.cpp, backend/metal/device.cpp.
CPU_COMPILE_FAILURE = "[Compile::eval_cpu]"
METAL_COMPILE_FAILURES = (
    "Unable to build metal library",
    "Must use > 512 sized block",
    "[compile] Too many inputs/outputs",
)


@dataclass(frozen=True)
class DeviceError:
    """A failure of the GPU, and whether it can be recovered from.

    Attributes:
        reason: what the system reported, one line.
        remedy: what the user can do.
        out_of_memory: whether less work at a time may help.
        recoverable: whether this process can use the GPU again. Not after other errors of CUDA,
            which fail every later call of the process.
    """

    reason: str
    remedy: str
    out_of_memory: bool
    recoverable: bool

    def to_user_error(self, outcome: str = "") -> UserError:
        """The two lines for the user; `outcome` ends the first one."""
        problem = "the GPU is out of memory" if self.out_of_memory else "the GPU failed"
        return UserError(f"{problem}: {self.reason}{outcome}", self.remedy)


# A failed command buffer of Metal (backend/metal/device.cpp); the system's reason follows it.
METAL_PREFIX = "[METAL] Command buffer execution failed: "
ALLOCATION_FAILURES = ("[malloc] Unable to allocate", "[metal::malloc]")
# A failed call of CUDA, as backend/cuda/utils.cpp, cublas_utils.cpp and cudnn_utils.cpp word it.
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
    """The GPU's failure that an exception reports; None for any other exception."""
    text = str(error)
    lines = text.removeprefix(METAL_PREFIX).strip().splitlines()
    reason = lines[0].rstrip(".")[:300] if lines else ""
    if any(words in text for words in METAL_COMPILE_FAILURES):  # also with compilation disabled
        return DeviceError(reason, RUN_AGAIN_REMEDY, out_of_memory=False, recoverable=False)
    is_metal = METAL_PREFIX in text
    if not (is_metal or text.startswith(ALLOCATION_FAILURES) or CUDA_FAILURE.match(text)):
        return None
    if any(words in text.lower() for words in OUT_OF_MEMORY):
        return DeviceError(reason, LESS_MEMORY_REMEDY, out_of_memory=True, recoverable=True)
    remedy = SLEEP_DISPLAY_REMEDY if is_metal else RUN_AGAIN_REMEDY
    return DeviceError(reason, remedy, out_of_memory=False, recoverable=is_metal)


def is_compile_failure(error: BaseException) -> bool:
    """Whether MLX could not compile one of its kernels while running."""
    texts = (CPU_COMPILE_FAILURE, *METAL_COMPILE_FAILURES)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextlib.contextmanager
def convert_device_errors(outcome: str = "") -> Iterator[None]:
    """Turn the GPU's failures into the two lines for the user.

    Raises:
        UserError: for a failure of the GPU.
    """
    try:
        yield
    except RuntimeError as error:
        if failure := classify_device_error(error):
            raise failure.to_user_error(outcome) from error
        raise
