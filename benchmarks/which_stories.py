"""Should Tier 2 learn `tinystories`, or `tinystories-gpt4`, which has only the better ones?

python benchmarks/which_stories.py [--minutes 60] [--recipe modern] [TEXT TEXT]

Trains Tier 2 on each for as long (they are fetched from the hub), and measures both models on both
validation texts, in bits per byte, and what they write by `mlxgpt eval --quality`. One seed each: a
difference of some hundredths of a bit may be chance.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mlxgpt
from mlxgpt.results import show_appraisal

TEXTS = ["tinystories", "tinystories-gpt4"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", nargs="*", default=TEXTS)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--recipe", default="modern")
    given = parser.parse_args()
    held_out, runs = {}, {}
    for text in given.texts:
        data = mlxgpt.prepare(text, tokenizer="bpe")
        held_out[text] = data.tokenizer.decode(data.val.ids.tolist())
        runs[text] = mlxgpt.train(
            tier=2,
            recipe=given.recipe,
            source=data.folder,
            run=f"which-{data.name}",
            max_minutes=given.minutes,
        ).run
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for text, run in runs.items():
            row = {"trained on": text}
            for n, (other, held) in enumerate(held_out.items()):
                file = Path(scratch) / f"{n}.txt"
                file.write_text(held, encoding="utf-8")
                found = mlxgpt.evaluate(run=str(run), source=file)
                row[f"bits per byte of {other}"] = f"{found.bits_per_byte:.4f}"
            rows.append(row)
    for row in rows:
        print(row)
    for text, run in runs.items():
        print(text)
        show_appraisal(mlxgpt.appraise(run=str(run)))


if __name__ == "__main__":
    main()
