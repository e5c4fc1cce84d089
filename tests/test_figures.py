"""Check figures in the documents against benchmarks/results.toml, which names their sources."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal

import pytest

from tests.helpers.commands import ROOT

RESULTS = tomllib.loads((ROOT / "benchmarks/results.toml").read_text(encoding="utf-8"))
FIELDS = {"value", "unit", "measured", "command", "source", "quote", "patterns"}
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("README*.md", "docs/*.md", "benchmarks/*.md", "benchmarks/notes/*.md")
    for path in sorted(ROOT.glob(pattern))
}
# Portuguese uses decimal commas.
PORTUGUESE = "README.pt-BR.md"
DOCUMENTS[PORTUGUESE] = re.sub(r"(?<=\d),(?=\d)", ".", DOCUMENTS[PORTUGUESE])
# A figure with one of these units in README or docs/ must be in results.toml or in OTHER_FIGURES.
UNITS = r"\**\s+(?:bits (?:per|por) byte|nats (?:a|per) character|nats por caractere)"
OTHER_FIGURES = {"0.0002"}


def parse_figure(text: str) -> tuple[Decimal, int]:
    """Parse a printed figure into its value and number of decimals; 7:51 is 7.85 minutes."""
    if ":" in text:
        minutes, seconds = text.split(":")
        return Decimal(minutes) + Decimal(seconds) / 60, 2
    text = text.replace(",", "")
    return Decimal(text), len(text.partition(".")[2])


def agrees(text: str, value: float) -> bool:
    """Return whether a printed figure is the value rounded to the same number of decimals."""
    figure, decimals = parse_figure(text)
    unit = Decimal(1).scaleb(-decimals)
    return figure.quantize(unit) == Decimal(str(value)).quantize(unit, ROUND_HALF_UP)


def find_statements(name: str, documents: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (document, sentence, printed figure) for each statement of a figure."""
    for pattern in RESULTS[name]["patterns"]:
        for document, text in documents.items():
            for match in re.finditer(re.sub(" ", r"\\s+", pattern), text):
                yield document, match[0], match[1]


@pytest.mark.parametrize("name", RESULTS)
def test_documents_agree_with_results_toml(name: str) -> None:
    statements = list(find_statements(name, DOCUMENTS))
    assert statements, f"no document states {name}: update its patterns in benchmarks/results.toml"
    for document, sentence, text in statements:
        assert agrees(text, RESULTS[name]["value"]), (document, sentence, RESULTS[name]["value"])


@pytest.mark.parametrize("name", RESULTS)
def test_source_of_each_result_contains_its_quote(name: str) -> None:
    assert set(RESULTS[name]) == FIELDS
    source, quote = RESULTS[name]["source"], RESULTS[name]["quote"]
    assert quote in (ROOT / source).read_text(encoding="utf-8"), f"{quote} is not in {source}"


def test_every_figure_in_the_documents_is_listed() -> None:
    values = [result["value"] for result in RESULTS.values()]
    for document, text in DOCUMENTS.items():
        if document.startswith("benchmarks/"):
            continue
        for figure in re.findall(rf"(\d+\.\d+){UNITS}", text):
            is_listed = any(agrees(figure, value) for value in values)
            assert is_listed or figure in OTHER_FIGURES, (document, figure)


@pytest.mark.parametrize(
    ("text", "value", "is_equal"),
    [
        ("1.498", 1.4983, True),
        ("1.5", 1.4983, True),
        ("1.497", 1.4983, False),
        ("8", 7.85, True),
        ("7:51", 7.85, True),
        ("7:52", 7.85, False),
        ("24,200", 24200, True),
    ],
)
def test_figures_are_compared_at_the_printed_precision(
    text: str, value: float, is_equal: bool
) -> None:
    assert agrees(text, value) is is_equal


def test_wrong_figure_is_detected() -> None:
    sentence = "to a validation loss of **{} nats per character**"
    for text, is_equal in (("1.498", True), ("1.489", False)):
        found = list(find_statements("tier1_val_loss", {"README.md": sentence.format(text)}))
        assert [agrees(figure, 1.4983) for _, _, figure in found] == [is_equal]
