"""mlxgpt: train a small GPT from scratch with MLX, inspect it, and generate text.

Public functions, each also a command of `mlxgpt` (in parentheses where the names differ):

    prepare, train, compare, import_model (import), export, generate, evaluate,
    appraise (eval --quality), hellaswag (eval --hellaswag), check, info, runs, report, play,
    benchmark (bench)

Also `stream`, which yields generated text piece by piece, and `load`, which returns a model.

Functions are imported on first use, so that `import mlxgpt` and `mlxgpt --help` are fast.
`mlxgpt.train` is the function, `mlxgpt.training` its package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxgpt.backend.cpu import blas
from mlxgpt.utils.errors import UserError

if TYPE_CHECKING:
    from mlxgpt.api import (
        appraise,
        benchmark,
        check,
        compare,
        evaluate,
        export,
        generate,
        hellaswag,
        import_model,
        info,
        load,
        play,
        prepare,
        report,
        runs,
        scale,
        stream,
        train,
    )
    from mlxgpt.config import Config

__version__ = "0.1.0"
__all__ = [
    "Config",
    "UserError",
    "appraise",
    "benchmark",
    "check",
    "compare",
    "evaluate",
    "export",
    "generate",
    "hellaswag",
    "import_model",
    "info",
    "load",
    "play",
    "prepare",
    "report",
    "runs",
    "scale",
    "stream",
    "train",
]

blas.preload_openblas()  # before anything imports mlx.core


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("mlxgpt.config" if name == "Config" else "mlxgpt.api"), name)
    raise AttributeError(f"module 'mlxgpt' has no attribute {name!r}")
