"""How fast the storybook writes, in megabytes a minute.

python benchmarks/storybook.py
"""

from __future__ import annotations

import time

from mlxgpt.corpus.storybook import stories

MEGABYTES = 10


def main() -> None:
    start = time.perf_counter()
    written = list(stories(0, size=MEGABYTES * 10**6))
    seconds = time.perf_counter() - start
    print(f"{60 * MEGABYTES / seconds:.0f} MB a minute: {len(written):,} stories")


if __name__ == "__main__":
    main()
