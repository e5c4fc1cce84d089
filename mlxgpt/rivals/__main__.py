"""One contender at one task, in a process of its own. The task is JSON, in the only argument, and
its result too, in the last line that is printed.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module

from mlxgpt.errors import UserError
from mlxgpt.rivals.timing import Task, peak_memory

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # other people's
    task = Task(**json.loads(sys.argv[1]))
    contender = import_module(f"mlxgpt.rivals.{task.module}")
    try:
        result = getattr(contender, task.what)(task)
    except UserError as error:
        sys.exit(error.problem)
    print("\n" + json.dumps({"peak_memory": peak_memory()} | result))
