"""Share of generated words, of two letters or more, that occur in the training text.

python benchmarks/words.py RUN TEXT      2,000 words at temperature 0.8, seeds 1, 2, …
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlxgpt

WORDS = 2000
WORD = re.compile(r"[A-Za-z']*[A-Za-z][A-Za-z']*")


def words(text: str) -> list[str]:
    found = (word.strip("'").lower() for word in WORD.findall(text))
    return [word for word in found if len(word) >= 2]


def main() -> None:
    run, file = sys.argv[1:]
    text = Path(file).read_text(encoding="utf-8")
    known = set(words(text[: int(0.9 * len(text))]))  # the training side alone
    drawn: list[str] = []
    seed = 0
    while len(drawn) < WORDS:
        seed += 1
        # The last word of a text may be cut off.
        texts = mlxgpt.generate(run=run, seed=seed, samples=8, max_tokens=1000, temperature=0.8)
        for sample in texts.texts:
            drawn += words(sample)[:-1]
    drawn = drawn[:WORDS]
    unknown = [word for word in drawn if word not in known]
    print(f"{1 - len(unknown) / WORDS:.1%} of {WORDS:,} words occur in the training text")
    print(f"not there: {' '.join(unknown[:20])} …")


if __name__ == "__main__":
    main()
