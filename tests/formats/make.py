"""Write one file of every current format into a new folder, to be committed when a format changes:

    python -m tests.formats.make tests/formats/VERSION

The runs `chars` and `tales` and their data; `chat`, adapters of `tales` for conversations, and
`pairs`, for preferences; a comparison, a scaling study, its law, and a benchmark result.

Folders 1, 2 and 3 were written by the versions that introduced run format N. `records` has results
of earlier formats: benchmarks of formats 1 and 2 (shortened), and a comparison and a scaling study
from before these had a version.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxgpt import api
from mlxgpt.config import config_from_tree
from mlxgpt.experiments.results import record_to_json
from mlxgpt.training import selfcheck
from mlxgpt.training.scaling_law import write_scaling_law
from tests.conftest import TINY
from tests.helpers import bench_measurement
from tests.helpers.comparisons import LAW, make_scaling_record, run_comparison
from tests.helpers.example_rows import write_rows

WORDS = ["to be", "or not", "the rain", "in Spain", "falls,", "mainly.\n", "ÄÖÜ", "plain"]
MODEL = {**TINY["model"], "n_layer": 1, "n_embd": 8, "block_size": 32}
TUNING: dict[str, Any] = {
    "init_from": "tales",
    "lora_rank": 1,
    "decay_steps": 12,
    "eval_interval": 4,
    "batch_size": 2,
}


def main(folder: Path) -> None:
    folder = folder.absolute()
    folder.mkdir(parents=True)
    os.chdir(folder)
    selfcheck.run_self_check = lambda config: iter([])
    rng = random.Random(0)
    text = " ".join(WORDS) + " " + " ".join(rng.choices(WORDS, k=400))
    tales = [" ".join(rng.choices(WORDS, k=12)) for _ in range(60)]
    Path("words.txt").write_text(text[:2000], encoding="utf-8")
    Path("tales.txt").write_text("<|endoftext|>".join(tales), encoding="utf-8")
    for name, source, data, size in (
        ("chars", "words.txt", {}, 0),
        ("tales", "tales.txt", {"tokenizer": "bpe"}, 270),
    ):
        tree = {
            "model": {**MODEL, "vocab_size": size},
            "data": data,
            "optim": {**TINY["optim"], "decay_steps": 12},
            "train": {**TINY["train"], "max_steps": 8},
        }
        config = config_from_tree(tree)
        api.train(config=config, source=source, run=name)
    names = [f"{word} {n}" for n in range(3) for word in ("rain", "Spain", "plain")]
    pairs = [{"prompt": name, "chosen": " falls", "rejected": " is"} for name in names]
    write_rows(Path("pairs.jsonl"), *pairs)
    talks = [[("user", name), ("assistant", "mainly")] for name in names]
    rows = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks]
    write_rows(Path("chat.jsonl"), *rows)
    for name in ("chat", "pairs"):
        api.train(source=f"{name}.jsonl", run=name, max_steps=8, **TUNING)
    api.appraise(run="tales")
    write_studies()
    for path in Path("data").glob("*/verified.json"):
        if str(folder) in path.read_text(encoding="utf-8"):
            path.unlink()  # it has absolute paths of this machine


def write_studies() -> None:
    """Write a comparison, whose runs are deleted, a scaling study, a law and a benchmark result."""
    studies = Path("runs/compare")
    run_comparison(config_from_tree(TINY), seeds=2, budget="4steps")
    shutil.rmtree(studies / "trainings")
    record = make_scaling_record()
    assert record.fit
    record.fit = replace(record.fit, resampled=record.fit.resampled[:4])  # 1,000 take 70 KB
    (studies / "scaling.json").write_text(record_to_json(record), encoding="utf-8")
    write_scaling_law(studies / "laws" / "0123456789abcdef.json", LAW)
    Path("bench.json").write_text(bench_measurement.make_measurement().to_json(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
