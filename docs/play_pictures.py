"""The pictures of `mlxgpt play` in the README and in play.md: docs/play-*.png, from real runs.

    pip install -e '.[play,browser]' pillow
    python docs/play_pictures.py STORIES SHAKESPEARE

The first run tells stories by a BPE, the second has snapshots. Needs Chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.play import played

DOCS = Path(__file__).parent
COLORS = 64
WIDTH = 1040


def main(stories: str, shakespeare: str) -> None:
    """Take all three."""
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with played([stories]) as address:
            page = opened(browser, address)
            page.fill("#max-tokens", "120")
            page.click("#go")
            page.wait_for_selector("#state:has-text('seed')")
            page.wait_for_selector("#next li")
            page.hover("#story .token:nth-child(9)")
            save(page, "play-write.png", "#write")
            page.click("#tab-inside")
            page.wait_for_selector("#lens tbody tr")
            page.get_by_role("radio", name="2", exact=True).check()
            page.wait_for_selector("#attends:has-text('Layer 2')")
            page.hover("#seen .token:nth-child(60)")
            page.wait_for_timeout(500)
            save(page, "play-inside.png", "#inside")
        with played([shakespeare]) as address:
            page = opened(browser, address)
            page.click("#tab-life")
            page.click("#life-form button")
            page.wait_for_selector("#life-state:has-text('same seed')")
            page.focus("#age")
            for _ in range(4):
                page.keyboard.press("ArrowLeft")
            save(page, "play-life.png", "#ages")
        browser.close()


def opened(browser: Any, address: str) -> Page:
    """The page, once it can be used."""
    page: Page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    return page


def save(page: Page, name: str, last: str) -> None:
    """The page down to where an element ends, in few colours."""
    box = page.locator(last).bounding_box()
    assert box
    page.evaluate("window.scrollTo(0, 0)")
    box = page.locator(last).bounding_box()
    assert box
    size = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
    picture = Image.open(io.BytesIO(page.screenshot(clip=size, full_page=True)))
    picture.convert("RGB").quantize(COLORS).save(DOCS / name, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
