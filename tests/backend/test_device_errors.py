"""GPU errors, classified by the messages of MLX 0.32."""

from __future__ import annotations

import pytest

from mlxgpt.backend import device_errors
from mlxgpt.backend.device_errors import METAL_PREFIX, classify_device_error
from mlxgpt.utils.errors import UserError

CODE = "kIOGPUCommandBufferCallbackError"


@pytest.mark.parametrize(
    ("text", "out_of_memory", "recoverable", "remedy"),
    [
        (
            f"{METAL_PREFIX}Impacting Interactivity (0000000e:{CODE}ImpactingInteractivity).",
            0,
            1,
            "pmset",
        ),
        (f"{METAL_PREFIX}Caused GPU Timeout Error (00000002:{CODE}Timeout).", 0, 1, "pmset"),
        (f"{METAL_PREFIX}Caused GPU Hang Error (00000003:{CODE}Hang).", 0, 1, "pmset"),
        (f"{METAL_PREFIX}Insufficient Memory (00000008:{CODE}OutOfMemory).", 1, 1, "--batch-size"),
        ("[malloc] Unable to allocate 17 bytes.", 1, 1, "--batch-size"),
        ("[metal::malloc] Attempting to allocate 9 bytes which is greater", 1, 1, "--batch-size"),
        ("[metal::malloc] Resource limit (499000) exceeded.", 1, 1, "--batch-size"),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", 1, 1, "--batch-size"),
        ("cudaGraphLaunch(graph_exec, stream()) failed: unspecified launch", 0, 0, "driver"),
        ("cublasLtMatmul( handle, a) failed with code: 14.", 0, 0, "driver"),
        ("[metal::Device] Unable to build metal library from source\nx: error", 0, 0, "MLX"),
    ],
)
def test_each_gpu_error_has_a_remedy(
    text: str, out_of_memory: int, recoverable: int, remedy: str
) -> None:
    failure = classify_device_error(RuntimeError(text))
    assert failure
    assert (failure.out_of_memory, failure.recoverable) == (bool(out_of_memory), bool(recoverable))
    assert remedy in failure.remedy
    assert METAL_PREFIX not in failure.reason
    assert "\n" not in failure.reason
    problem = failure.to_user_error("; stopped").problem
    assert problem.startswith("the GPU is out of memory: " if out_of_memory else "the GPU failed: ")
    assert problem.endswith("; stopped")
    with pytest.raises(UserError), device_errors.convert_device_errors():
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[Compile::eval_cpu] Failed to compile function",
        "std::bad_alloc",
        "cu",
        "custom() failed",
    ],
)
def test_other_errors_are_not_classified_as_gpu_errors(text: str) -> None:
    assert classify_device_error(RuntimeError(text)) is None
    with pytest.raises(RuntimeError), device_errors.convert_device_errors():
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "text",
    [
        "[Compile::eval_cpu] Failed to compile function",
        "[metal::Device] Unable to build metal library from source\n",
        "[Metal::compiled] Must use > 512 sized block",
        "[compile] Too many inputs/outputs fused in the Metal Compiled primitive",
    ],
)
def test_compile_failures_are_recognized(text: str) -> None:
    assert device_errors.is_compile_failure(RuntimeError(text))
    assert not device_errors.is_compile_failure(ValueError(text))
    assert not device_errors.is_compile_failure(RuntimeError("[Metal::copy] Must use 1024"))
