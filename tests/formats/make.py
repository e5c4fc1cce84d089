"""Write files of the current formats into a new folder: two runs of 8 steps, with characters and
with BPE, and their data. To be run after a format version is increased:

    python -m tests.formats.make tests/formats/N
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from mlxgpt import api
from mlxgpt.config import config_from_tree
from mlxgpt.training import selfcheck
from tests.conftest import TINY

WORDS = ["to be", "or not", "the rain", "in Spain", "falls,", "mainly.\n", "ÄÖÜ", "plain"]


def main(folder: Path) -> None:
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
            "model": {**TINY["model"], "n_layer": 1, "n_embd": 8, "vocab_size": size},
            "data": data,
            "optim": {**TINY["optim"], "decay_steps": 12},
            "train": {**TINY["train"], "max_steps": 8},
        }
        api.train(config=config_from_tree(tree), source=source, run=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
