"""How quickly the page of `mlxgpt play` answers, measured in a Chromium, as a person would have it:
from the click to the first character; from pointing at a token to what is told of it; frames a
second while a text streams in. Needs the extra `browser`, and a run.

    python benchmarks/play.py RUN [--runs-dir DIR]
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

TIMES = 20
WATCHED = """(what) => new Promise((resolve) => {
  const began = performance.now();
  const seen = new MutationObserver(() => {
    if (document.querySelectorAll(what.until).length < (what.count ?? 1)) return;
    seen.disconnect();
    requestAnimationFrame(() => resolve(performance.now() - began));
  });
  seen.observe(document.body, { subtree: true, childList: true, characterData: true });
  const target = document.querySelector(what.target);
  if (what.click) target.click();
  else target.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
})"""
FRAMES = """() => new Promise((resolve) => {
  const times = [];
  const next = (now) => {
    times.push(now);
    if (document.querySelector("#stop").disabled) resolve(times); else requestAnimationFrame(next);
  };
  document.querySelector("#go").click();
  requestAnimationFrame(next);
})"""


@contextmanager
def serve_run(args: list[str]) -> Iterator[str]:
    """The address of a page that is served while this lasts."""
    command = [sys.executable, "-m", "mlxgpt", "play", "--no-browser", "--port", "0", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            yield next(word for word in process.stderr.readline().split() if "#" in word)
        finally:
            process.terminate()


def first_character(page: Page) -> float:
    """Milliseconds from the click to the first new token on the screen."""
    page.evaluate("document.querySelector('#story').replaceChildren()")
    what = {"click": True, "target": "#go", "until": "#story .token:not(.given)"}
    took = page.evaluate(WATCHED, what)
    page.wait_for_selector("#stop:disabled", timeout=600_000)
    return float(took)


def pointed(page: Page, box: str, answer: str, count: int) -> list[float]:
    """Milliseconds from pointing at each of some tokens to what is told of it."""
    took = []
    for n in range(TIMES):
        page.evaluate(f"document.querySelector('{answer}').replaceChildren()")
        target = f"#{box} .token:nth-child({10 + 2 * n})"
        what = {"target": target, "until": f"{answer} > *", "count": count}
        took.append(float(page.evaluate(WATCHED, what)))
    return took


def measure(page: Page) -> dict[str, Any]:
    """Milliseconds each, and frames."""
    page.fill("#max-tokens", "60")
    found = {"first character": [first_character(page) for _ in range(TIMES)]}
    found["alternatives of a token"] = pointed(page, "story", "#alternatives", 10)
    page.click("#tab-inside")
    page.wait_for_selector("#lens tbody tr")
    found["logit lens of a token"] = pointed(page, "seen", "#lens tbody", 2)
    found["neighbours of a token"] = pointed(page, "seen", "#neighbours", 10)
    page.click("#tab-write")
    page.fill("#max-tokens", "1000")
    times = page.evaluate(FRAMES)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return {**found, "gaps between frames": gaps}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run")
    parser.add_argument("--runs-dir")
    given = parser.parse_args()
    arguments = [given.run] + (["--runs-dir", given.runs_dir] if given.runs_dir else [])
    chromium = shutil.which("chromium")
    with serve_run(arguments) as address, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        print(page.text_content("#facts"))
        found = measure(page)
        gaps = found.pop("gaps between frames")
        print("\n| milliseconds | first | median | largest |\n|---|---|---|---|")
        for name, took in found.items():
            middle, most = statistics.median(took), max(took)
            print(f"| {name} | {took[0]:.0f} | {middle:.0f} | {most:.0f} |")
        seconds = sum(gaps) / 1000
        late = sum(gap > 25 for gap in gaps)
        print(
            f"\nwhile 1,000 tokens stream in, {seconds:.1f} s: {len(gaps) / seconds:.1f} frames a "
            f"second, {late} of {len(gaps)} late"
        )


if __name__ == "__main__":
    main()
