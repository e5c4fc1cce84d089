from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.html_report.page import Figure, Page, replace_unprintable, write_page
from mlxgpt.utils.errors import UserError

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'single' \0\x1b[31m\u202e ]]> </title>"


class ParsedPage(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "input", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data: str) -> None:
        self.text += data


def make_full_page(text: str) -> Page:
    """Build a page with this text in every place that takes text."""
    page = Page(text)
    page.add_heading(text)
    page.add_paragraph(text)
    page.add_preformatted(text)
    page.add_commands([text, text])
    page.add_table([["", text], [text, "1.5"]], text)
    figure = Figure("<svg ></svg>", text, text)
    page.add_figure(figure)
    page.add_figure_grid([figure, figure])
    page.add_figure_tabs(text, {text: figure, "other": figure})
    page.add_markdown(f"# title\n\n{text}\n\n| {text} | |\n| --- | ---: |\n| {text} | 1 |\n")
    return page


@given(st.text())
def test_all_text_is_escaped(text: str) -> None:
    tags = ParsedPage(make_full_page("plain").to_html()).tags
    parsed = ParsedPage(make_full_page(text.replace("\n", " ").replace("|", " ")).to_html())
    markdown = {"em", "strong", "code", "a", "h1", "h2", "h3", "ul", "ol", "li", "blockquote", "hr"}
    markdown |= {"p", "pre", "table", "thead", "tbody", "tr", "th", "td", "div", "br"}
    extra = set(parsed.tags) - set(tags)
    assert extra <= markdown
    assert parsed.tags.count("svg") == tags.count("svg")
    assert not parsed.open


def test_page_makes_no_requests_and_runs_no_scripts() -> None:
    links = "![x](https://e.vil/a.png) [y](https://e.vil) <https://e.vil> <img src=x onerror=y>"
    for text in (HOSTILE, links):
        parsed = ParsedPage(make_full_page(text).to_html())
        assert not {"script", "img", "link", "iframe", "object", "a", "base"} & set(parsed.tags)
        assert not {"src", "href", "onerror", "srcset"} & {name for name, _ in parsed.attributes}
    html = make_full_page(HOSTILE).to_html()
    assert "url(" not in html
    assert "@import" not in html
    assert "<script" not in html
    assert "\0" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html, "no bidirectional control characters"
    assert "alert(1)" in ParsedPage(html).text


def test_replace_unprintable() -> None:
    assert replace_unprintable("a\n\tb 🦊 ä") == "a\n\tb 🦊 ä"
    assert replace_unprintable("\ud83e") == "\ufffd", "unpaired surrogate"
    make_full_page("\ud83e").to_html().encode()


def test_numeric_columns_are_right_aligned() -> None:
    page = Page("t")
    page.add_table([["a", "b", "c"], ["1,234", "–", "4 %"], ["-1.5", "x", "1.2 ×"]], "numbers")
    cells = re.findall(r"<td( class=\"number\")?>([^<]*)", page.to_html())
    assert [bool(kind) for kind, _ in cells] == [True, False, True] * 2


def test_labels_and_ids_are_unique() -> None:
    page = make_full_page("same")
    page.add_table([["a"], ["1"]], "same")
    page.add_figure_tabs("same", {"a": Figure("<svg ></svg>", "", "")})
    html = page.to_html()
    labels = re.findall(r'role="region" aria-label="([^"]*)"', html)
    assert len(labels) == len(set(labels)) == 3
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids)) == 3


def test_write_page_only_overwrites_pages(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, Page("one").to_html())
    write_page(path, Page("two").to_html(refresh=5))
    assert '<meta http-equiv="refresh" content="5">' in path.read_text()
    for content in (b"my own page", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="was not written by mlxgpt"):
            write_page(path, Page("three").to_html())
        assert path.read_bytes() == content
    with pytest.raises(UserError, match="cannot write"):
        write_page(tmp_path / "nowhere" / "page.html", Page("four").to_html())
