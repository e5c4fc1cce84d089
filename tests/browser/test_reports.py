"""HTML reports in Chromium: layout, accessibility, keyboard, printing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.html_report.page import write_page
from tests.helpers.commands import ROOT
from tests.html_report.test_page import HOSTILE, make_full_page

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # from playwright and axe

REPORTS = ROOT / "benchmarks" / "reports"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> dict[str, Path]:
    """A report of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    runs = folder / "runs"
    shutil.copytree(trained / "runs", runs)
    shutil.copytree(runs / "done", runs / "<script>alert(1)<\\script>")
    bench, compared = REPORTS / "2026-11-26-epyc-2-cores.json", REPORTS / "compare"
    paths = {
        "run": api.report("done", runs_dir=runs, output=folder / "run.html"),
        "runs": api.report(
            "done", "<script>alert(1)<\\script>", runs_dir=runs, output=folder / "runs.html"
        ),
        "bench": api.report(bench, output=folder / "bench.html"),
        "compare": api.report(compared / "stories-ablation.json", output=folder / "compare.html"),
        "hostile": folder / "hostile.html",
    }
    write_page(paths["hostile"], make_full_page(HOSTILE).to_html())
    return paths


KINDS = ("run", "runs", "bench", "compare", "hostile")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1280, "light")])
def test_accessibility_and_layout(
    browser: Any, pages: dict[str, Path], kind: str, width: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    requested_urls: list[str] = []
    console_messages: list[str] = []
    page.on("request", lambda request: requested_urls.append(request.url))
    page.on("console", lambda message: console_messages.append(message.text))
    page.on("dialog", lambda dialog: console_messages.append(dialog.message))
    page.on("pageerror", lambda error: console_messages.append(str(error)))
    page.goto(pages[kind].as_uri())
    assert requested_urls == [pages[kind].as_uri()], "no other requests"
    assert console_messages == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "no horizontal overflow"
    results = axe.Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    shown = page.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => s.clientWidth > 0)"
        ".map(s => s.classList[0])"
    )
    if kind != "hostile":
        assert shown
        assert not {"wide" if width == 320 else "narrow"} & set(shown)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(22, 24, 29)" if scheme == "dark" else "rgb(255, 255, 255)")
    context.close()


def test_x_axis_tabs_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.goto(pages["run"].as_uri())
    visible = "[...document.querySelectorAll('.chosen')].map(c => c.clientHeight > 0)"
    assert page.evaluate(visible) == [True, False, False]
    page.keyboard.press("Tab")  # to the first table, a scrollable region
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "radio"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(visible) == [False, True, False]
    page.get_by_role("radio", name="minutes").check(force=True)
    assert page.evaluate(visible) == [False, False, True]
    page.close()


@pytest.mark.parametrize("kind", KINDS)
def test_printing(browser: Any, pages: dict[str, Path], kind: str, tmp_path: Path) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(pages[kind].as_uri())
    pdf = page.pdf(path=str(tmp_path / "page.pdf"), format="A4")
    assert pdf[:5] == b"%PDF-"
    page.emulate_media(media="print")
    assert not page.evaluate(
        "[...document.querySelectorAll('.choice > label')].some(label => label.clientHeight > 0)"
    )
    page.close()
