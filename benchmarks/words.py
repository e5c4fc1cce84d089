"""Share of generated words, of two letters or more, that occur in the training text.

python benchmarks/words.py RUN TEXT      ten draws of 2,000 words, at temperature 0.8

Of the text, the nine tenths that Tier 1 trains on count. Words are counted twice: as runs of
letters, and with their apostrophes, where "conveney'd" is one word that does not occur.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

import mlxgpt

WORDS = 2000
DRAWS = 10
TEMPERATURE = 0.8
KINDS = {
    "runs of letters": re.compile(r"[a-z]{2,}"),
    "with apostrophes": re.compile(r"[a-z][a-z']*[a-z]"),
}


def main() -> None:
    run, file = sys.argv[1:]
    text = Path(file).read_text(encoding="utf-8").lower()
    text = text[: int(0.9 * len(text))]
    # 16 × 1,000 characters have some 2,900 words; the last one of each may be cut off.
    draws = [
        mlxgpt.generate(run=run, seed=n, samples=16, max_tokens=1000, temperature=TEMPERATURE)
        for n in range(DRAWS)
    ]
    for kind, pattern in KINDS.items():
        known, shares, unknown = set(pattern.findall(text)), [], []
        for draw in draws:
            words = [word for made in draw.texts for word in pattern.findall(made.lower())[:-1]]
            words = words[:WORDS]
            assert len(words) == WORDS
            unknown += [word for word in words if word not in known]
            shares.append(sum(word in known for word in words) / WORDS)
        print(
            f"{kind}: {statistics.mean(shares):.2%} of {WORDS:,} words occur in the training text "
            f"({min(shares):.2%} to {max(shares):.2%}); not there: {' '.join(unknown[:8])} …"
        )


if __name__ == "__main__":
    main()
