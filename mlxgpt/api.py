"""Public API: one function per command; `mlxgpt.train` is `mlxgpt.api.train`.

Each function is defined in the package it belongs to, and raises UserError for problems that the
user can fix. Folder arguments are resolved by config/resolve.py.
"""

from mlxgpt.bench.benchmark import benchmark, benchmark_distributed
from mlxgpt.convert.exporting import ExportResult, export
from mlxgpt.convert.html import export_html
from mlxgpt.convert.importing import import_model
from mlxgpt.data.prepare import prepare
from mlxgpt.evaluation.evaluate import appraise, evaluate, hellaswag
from mlxgpt.experiments.compare import compare
from mlxgpt.experiments.scaling import scale
from mlxgpt.html_report.report import report
from mlxgpt.loaded_model import LoadedModel, generate, load, stream
from mlxgpt.playground.play import play
from mlxgpt.storage.info import ConfigInfo, RunSummary, info, runs
from mlxgpt.training.callbacks import Callback, TrainingSummary
from mlxgpt.training.selfcheck import CheckResult, check
from mlxgpt.training.train import train

__all__ = [
    "Callback",
    "CheckResult",
    "ConfigInfo",
    "ExportResult",
    "LoadedModel",
    "RunSummary",
    "TrainingSummary",
    "appraise",
    "benchmark",
    "benchmark_distributed",
    "check",
    "compare",
    "evaluate",
    "export",
    "export_html",
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
