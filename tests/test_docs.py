"""Links and anchors in the Markdown files, and the index of docs/."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

FOLDERS = (".", "docs", "data", "benchmarks", "benchmarks/notes", "benchmarks/reports/**")
PAGES = sorted({path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md")})
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def find_links(text: str) -> Iterator[str]:
    """Targets of the links and images that are not on the network."""
    text = re.sub(r"`[^`]*`", "", CODE_BLOCK.sub("", text))
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            yield target


def find_anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    anchors: set[str] = set()
    counts: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", CODE_BLOCK.sub("", text), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(f"{anchor}-{counts[anchor]}" if counts[anchor] else anchor)
        counts[anchor] += 1
    return anchors


@cache
def read_page(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def find_broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in find_links(text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in find_anchors(read_page(path))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert not find_broken_links(page, read_page(page))


@pytest.mark.parametrize(
    "link",
    ["[a](missing.md)", "[a](faq.md#missing)", "[a](#missing)", "![a](figures/missing.svg)"],
)
def test_a_broken_link_is_found(link: str) -> None:
    assert find_broken_links(ROOT / "docs/README.md", f"# Title\n\n{link}\n")


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs/README.md"
    listed = {target.partition("#")[0] for target in find_links(read_page(index))}
    assert {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"} <= listed
