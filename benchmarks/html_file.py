"""Measure HTML files that contain a model, in Chromium: time to open, to the first token, tokens/s.

    python benchmarks/html_file.py FILE.html…
    python benchmarks/html_file.py --sizes

`--sizes` exports models of Tier 1's and Tier 2's sizes with random weights, of 8 bits, and measures
these. Needs the extra `browser`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlxgpt  # isort: skip  # loads its BLAS before mlx.core is imported
from playwright.sync_api import sync_playwright

from mlxgpt.bench.markdown import render_markdown_table
from mlxgpt.config.resolve import resolve_config
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.convert.importing import create_imported_run
from mlxgpt.data.synthetic import generate_story
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.bpe import train_bpe
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params

REPEATS = 5
TOKENS = 150


def main() -> None:
    """Print a table with a row per file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--sizes", action="store_true", help="also measure both tiers' sizes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        paths = [*args.files, *(export_tiers(Path(folder)) if args.sizes else [])]
        header = ["file", "MB", "open, s", "first token, s", "tokens/s"]
        rows = [[path.name, *measure(browser, path)] for path in paths]
        print("\n".join(render_markdown_table([header, *rows])))
        browser.close()


def export_tiers(folder: Path) -> list[Path]:
    """Export models with random weights; prints how long that takes."""
    text = "".join(generate_story(n, 1) for n in range(20_000))
    tokenizers: dict[str, Tokenizer] = {
        "tier1": CharTokenizer(map(chr, range(32, 97)), end_of_text=False),
        "tier2": train_bpe([text], 4096),
    }
    paths = []
    for recipe in ("classic", "modern", "racing"):
        for tier, tokenizer in enumerate(tokenizers.values(), 1):
            _, config = resolve_config(tier, None, recipe, vocab_size=tokenizer.vocab_size)
            parameters = flatten_params(GPT(config.model).parameters())
            run = folder / f"tier{tier}-{recipe}"
            create_imported_run(ImportedModel(config.model, parameters, tokenizer, True), run)
            start = time.perf_counter()
            result = mlxgpt.export_html(run=str(run), output=folder / f"{run.name}.html")
            print(f"{run.name}: exported in {time.perf_counter() - start:.1f} s")
            paths.append(result.folder)
    return paths


def measure(browser: Any, path: Path) -> list[str]:
    """Size, and medians of several openings."""
    figures = []
    for _ in range(REPEATS):
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(path.absolute().as_uri())
        page.wait_for_selector("body[data-ready]")
        opened = time.perf_counter()
        page.fill("#max-tokens", str(TOKENS))
        page.click("#generate-button")
        page.wait_for_selector("#generated-text .token:not(.prompt)")
        first = time.perf_counter()
        page.wait_for_selector("#generate-status:not(:empty)")
        match = re.search(r"([\d,]+) tok/s", page.text_content("#generate-status"))
        assert match
        figures.append((opened - start, first - opened, float(match[1].replace(",", ""))))
        page.close()
    medians = [statistics.median(column) for column in zip(*figures, strict=True)]
    size = path.stat().st_size / 1e6
    return [f"{size:.2f}", f"{medians[0]:.2f}", f"{medians[1]:.2f}", f"{medians[2]:,.0f}"]


if __name__ == "__main__":
    main()
