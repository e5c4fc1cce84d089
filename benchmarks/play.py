"""Measure the latency and frame rate of the web UI of `mlxgpt play` in Chromium.

Latencies: from the click on Generate to the first token, and from hovering over a token to its
details. Needs the extra `browser` and a run.

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


@contextmanager
def serve_run(args: list[str]) -> Iterator[str]:
    """Run `mlxgpt play` within this context and yield its URL with the key."""
    command = [sys.executable, "-m", "mlxgpt", "play", "--no-browser", "--port", "0", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            yield next(word for word in process.stderr.readline().split() if "#" in word)
        finally:
            process.terminate()


# Resolves to the milliseconds from a click or hover to the frame that shows the result.
LATENCY_SCRIPT = """(action) => new Promise((resolve) => {
  const start = performance.now();
  const observer = new MutationObserver(() => {
    if (document.querySelectorAll(action.until).length < (action.count ?? 1)) return;
    observer.disconnect();
    requestAnimationFrame(() => resolve(performance.now() - start));
  });
  observer.observe(document.body, { subtree: true, childList: true, characterData: true });
  const target = document.querySelector(action.target);
  if (action.click) target.click();
  else target.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
})"""
REPEATS = 20


def first_token_latency(page: Page) -> float:
    """Milliseconds from the click to the first new token on screen."""
    page.evaluate("document.querySelector('#generated-text').replaceChildren()")
    action = {
        "click": True,
        "target": "#generate-button",
        "until": "#generated-text .token:not(.prompt)",
    }
    latency = page.evaluate(LATENCY_SCRIPT, action)
    page.wait_for_selector("#stop-button:disabled", timeout=600_000)
    return float(latency)


def hover_latencies(page: Page, text_id: str, panel: str, count: int) -> list[float]:
    """Milliseconds from hovering over a token to its details on screen, for REPEATS tokens.

    Args:
        text_id: id of the element with the tokens.
        panel: selector of the element that shows the details.
        count: number of children of the panel when the details are complete.
    """
    latencies = []
    for n in range(REPEATS):
        page.evaluate(f"document.querySelector('{panel}').replaceChildren()")
        target = f"#{text_id} .token:nth-child({10 + 2 * n})"
        action = {"target": target, "until": f"{panel} > *", "count": count}
        latencies.append(float(page.evaluate(LATENCY_SCRIPT, action)))
    return latencies


# Resolves to the times of all animation frames during generation, in milliseconds.
FRAME_TIMES_SCRIPT = """() => new Promise((resolve) => {
  const times = [];
  const next = (now) => {
    times.push(now);
    if (document.querySelector("#stop-button").disabled) resolve(times);
    else requestAnimationFrame(next);
  };
  document.querySelector("#generate-button").click();
  requestAnimationFrame(next);
})"""


def measure_page(page: Page) -> dict[str, Any]:
    """Measure all latencies and the intervals between frames, in milliseconds."""
    page.fill("#max-tokens", "60")
    latencies = {"first character": [first_token_latency(page) for _ in range(REPEATS)]}
    latencies["alternatives of a token"] = hover_latencies(
        page, "generated-text", "#alternatives", 10
    )
    page.click("#tab-inspect")
    page.wait_for_selector("#lens tbody tr")
    latencies["logit lens of a token"] = hover_latencies(page, "inspected-text", "#lens tbody", 2)
    latencies["neighbors of a token"] = hover_latencies(page, "inspected-text", "#neighbors", 10)
    page.click("#tab-generate")
    page.fill("#max-tokens", "1000")
    times = page.evaluate(FRAME_TIMES_SCRIPT)
    frame_gaps = [b - a for a, b in itertools.pairwise(times)]
    return {**latencies, "gaps between frames": frame_gaps}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run")
    parser.add_argument("--runs-dir")
    args = parser.parse_args()
    play_args = [args.run] + (["--runs-dir", args.runs_dir] if args.runs_dir else [])
    chromium = shutil.which("chromium")
    with serve_run(play_args) as address, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        print(page.text_content("#run-info"))
        measurements = measure_page(page)
        frame_gaps = measurements.pop("gaps between frames")
        print("\n| milliseconds | first | median | largest |\n|---|---|---|---|")
        for name, latencies in measurements.items():
            median, largest = statistics.median(latencies), max(latencies)
            print(f"| {name} | {latencies[0]:.0f} | {median:.0f} | {largest:.0f} |")
        seconds = sum(frame_gaps) / 1000
        late = sum(gap > 25 for gap in frame_gaps)
        frames = len(frame_gaps)
        print(
            f"\nwhile 1,000 tokens stream in, {seconds:.1f} s: {frames / seconds:.1f} frames a "
            f"second, {late} of {frames} late"
        )


if __name__ == "__main__":
    main()
