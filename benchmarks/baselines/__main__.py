"""Run one task of one framework: takes the task as JSON in its only argument, and prints the result
as JSON on the last line of standard output.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module

from baselines.tasks import Task, peak_rss_bytes
from mlxgpt.utils.errors import UserError

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # from the other libraries
    task = Task(**json.loads(sys.argv[1]))
    module = import_module(f"baselines.{task.module}")
    try:
        result = getattr(module, task.task)(task)
    except UserError as error:
        sys.exit(error.problem)
    print("\n" + json.dumps({"peak_memory": peak_rss_bytes()} | result))
