"""Make play-*.png, the screenshots of `mlxgpt play` in README.md and web-ui.md, and html-file.png,
that of a model exported to HTML, from two runs.

    pip install -e '.[play,browser]' pillow
    python docs/figures/screenshots.py STORIES SHAKESPEARE

The first run was trained on stories with a BPE tokenizer, the second has snapshots. Needs Chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from play import serve_run

from mlxgpt import api

VIEWPORT_WIDTH = 1040


def main(stories_run: str, shakespeare_run: str) -> None:
    """Take the screenshots."""
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with serve_run([stories_run]) as address:
            page = open_page(browser, address)
            generate(page)
            save_screenshot(page, "play-generate.png", "#generate")
            page.click("#tab-inspect")
            page.wait_for_selector("#lens tbody tr")
            page.get_by_role("radio", name="2", exact=True).check()
            page.wait_for_selector("#attention-summary:has-text('Layer 2')")
            tokens = page.locator("#inspected-text .token")
            words = [n for n, text in enumerate(tokens.all_text_contents()) if len(text) > 4]
            tokens.nth(words[len(words) // 2]).hover()
            page.wait_for_timeout(500)
            save_screenshot(page, "play-inspect.png", "#inspect")
        with serve_run([shakespeare_run]) as address:
            page = open_page(browser, address)
            page.click("#tab-training")
            page.click("#snapshots-form button")
            page.wait_for_selector("#snapshots-status:has-text('same seed')")
            page.focus("#snapshot")
            for _ in range(4):
                page.keyboard.press("ArrowLeft")
            save_screenshot(page, "play-training.png", "#snapshots")
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "stories.html"
            api.export_html(run=stories_run, output=output)
            page = open_page(browser, output.as_uri())
            generate(page)
            save_screenshot(page, "html-file.png", "#alternatives")
        browser.close()


def generate(page: Page) -> None:
    """Generate a text, and show the alternatives to a token."""
    page.fill("#max-tokens", "120")
    page.fill("#seed", "1")
    page.click("#generate-button")
    page.wait_for_selector("#generate-status:has-text('seed')")
    page.wait_for_selector("#next-tokens li")
    page.hover("#generated-text .token:nth-child(9)")


def open_page(browser: Any, address: str) -> Page:
    """Open the page and wait until it is ready."""
    page: Page = browser.new_page(viewport={"width": VIEWPORT_WIDTH, "height": 900})
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    return page


FIGURES_DIR = Path(__file__).parent
PALETTE_SIZE = 64  # colors


def save_screenshot(page: Page, name: str, last_selector: str) -> None:
    """Save the page from its top to the end of an element, with a reduced palette."""
    box = page.locator(last_selector).bounding_box()
    assert box
    page.evaluate("window.scrollTo(0, 0)")
    box = page.locator(last_selector).bounding_box()
    assert box
    clip = {"x": 0, "y": 0, "width": VIEWPORT_WIDTH, "height": box["y"] + box["height"] + 16}
    image = Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=True)))
    image.convert("RGB").quantize(PALETTE_SIZE).save(FIGURES_DIR / name, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
