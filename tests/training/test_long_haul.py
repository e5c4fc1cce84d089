"""100,000 steps with evaluations, samples and checkpoints: neither memory nor the number of open
files grows, and the metrics can be read at any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

SCRIPT = """
import json, os, sys
from mlxgpt import api
from mlxgpt.backend import device
from mlxgpt.training import selfcheck
from mlxgpt.config import config_from_tree
from tests.conftest import TINY
from tests.helpers.training_runs import Recorder

selfcheck.run_self_check = lambda config: iter([])
STEPS = int(sys.argv[1])
tree = {
    "model": {**TINY["model"], "n_layer": 1, "n_embd": 8},
    "optim": TINY["optim"],
    "train": {
        **TINY["train"],
        "batch_size": 2,
        "max_steps": STEPS,
        "log_interval": 50,
        "eval_interval": STEPS // 40,
        "save_interval": STEPS // 100,
        "on_spike": "skip",
    },
}

class Watching(Recorder):
    def on_log(self, record):
        if "val_loss" not in record:
            return
        lines = open("runs/a/metrics.jsonl").read().splitlines()
        assert [json.loads(line)["step"] for line in lines][-1] == record["step"]
        seen = [record["step"], device.resident_bytes(), len(os.listdir("/proc/self/fd"))]
        print(json.dumps(seen), flush=True)

    def on_sample(self, step, text):
        pass

api.train(config=config_from_tree(tree), source="words.txt", run="a", callbacks=[Watching()])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux")
def test_memory_and_open_files_do_not_grow_in_100_000_steps(home: Path, text_file: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, "100000"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    samples = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(samples) == 40
    print(
        "step, resident bytes, open files:",
        samples[0],
        samples[1],
        samples[len(samples) // 2],
        samples[-1],
    )
    _, first_resident, _ = samples[1]  # the first evaluation comes before all libraries are loaded
    assert all(abs(resident / first_resident - 1) < 0.05 for _, resident, _ in samples[1:])
    counts = [count for *_, count in samples]
    assert max(counts) <= min(counts) + 1, "one more where a checkpoint is still being written"
