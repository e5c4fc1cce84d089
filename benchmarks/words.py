"""Share of generated words, of two letters or more, that occur in the training text.

python benchmarks/words.py RUN TEXT      five draws of 2,000 words, at temperature 0.8

A word with an apostrophe is one word. Of the text, the nine tenths that Tier 1 trains on count.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlxgpt

WORDS = 2000
DRAWS = 5
TEMPERATURE = 0.8
WORD = re.compile(r"[A-Za-z']*[A-Za-z][A-Za-z']*")


def words(text: str) -> list[str]:
    found = (word.strip("'").lower() for word in WORD.findall(text))
    return [word for word in found if len(word) >= 2]


def main() -> None:
    run, file = sys.argv[1:]
    text = Path(file).read_text(encoding="utf-8")
    known = set(words(text[: int(0.9 * len(text))]))  # the training side alone
    shares, unknown = [], []
    for seed in range(DRAWS):
        # 16 × 1,000 characters have some 2,900 words.
        made = mlxgpt.generate(
            run=run, seed=seed, samples=16, max_tokens=1000, temperature=TEMPERATURE
        )
        # Without the last word of each text, which may be cut off.
        drawn = [word for sample in made.texts for word in words(sample)[:-1]][:WORDS]
        assert len(drawn) == WORDS
        unknown += [word for word in drawn if word not in known]
        shares.append(sum(word in known for word in drawn) / WORDS)
    mean = sum(shares) / DRAWS
    each = ", ".join(f"{share:.2%}" for share in shares)
    print(f"{mean:.2%} of {WORDS:,} words occur in the training text ({each})")
    print(f"not there: {' '.join(unknown[:20])} …")


if __name__ == "__main__":
    main()
