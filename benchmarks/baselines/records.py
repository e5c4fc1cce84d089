"""Results of a comparison with other libraries as dataclasses, and their JSON format."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from mlxgpt.bench.records import Machine

MLXGPT = "mlxgpt"  # mlxgpt's name among the frameworks


@dataclass(frozen=True)
class TaskResult:
    """Results of all rounds of one task.

    Attributes:
        config: name of the model's config.
        task: training, generate, learning or preparation.
        texts: batch size of generation; 0 in other tasks.
        rounds: measured values of each round, by framework.
        made_with: versions, device, threads, BLAS and compiler of each framework.
        failed: frameworks that failed, and why.
    """

    config: str
    task: str
    texts: int = 0
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    made_with: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Results of all tasks on one machine; `date` is in UTC."""

    date: str
    machine: Machine
    results: tuple[TaskResult, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Parse the output of `to_json`, or a report that `mlxgpt bench` wrote until November 2026,
        which had the same results.
        """
        tree = json.loads(text)
        results = (
            tree["results"] if "results" in tree else map(_convert_bench_result, tree["contests"])
        )
        machine = Machine(**tree["machine"])
        return cls(tree["date"], machine, tuple(TaskResult(**result) for result in results))


def _convert_bench_result(result: dict[str, Any]) -> dict[str, Any]:
    return {("task" if name == "what" else name): value for name, value in result.items()}
