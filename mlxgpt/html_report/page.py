"""Self-contained HTML pages: they open from disk, make no requests and can be printed.

Escapes all text, but not the SVG of figures, which plots.py makes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore

from mlxgpt.html_report.language import language_tag, translate
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

# Marks the pages that `write_page` may overwrite.
GENERATOR_META = '<meta name="generator" content="mlxgpt report">'

# Control characters, bidirectional text controls, and unpaired surrogates.
UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def replace_unprintable(text: str) -> str:
    """Replace unprintable characters with U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", text)


def _escape_html(text: str) -> str:
    return escape(replace_unprintable(text))


@dataclass(frozen=True)
class Figure:
    """Plot with a caption.

    Attributes:
        svg: output of plots.py: one SVG, or two for different widths.
        caption: what is plotted, as a sentence.
        alt_text: what the plot shows, for screen readers.
    """

    svg: str
    caption: str
    alt_text: str

    def to_html(self) -> str:
        """Render the figure with its caption."""
        svg_tag = f'<svg role="img" aria-label="{_escape_html(translate(self.alt_text))}" '
        svg = self.svg.replace("<svg ", svg_tag)
        caption = _escape_html(translate(self.caption))
        return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


# Line colors have a contrast of at least 4.5:1, so that text can use them, too.
CSS_COLORS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1f; --faint: #5c5f66;
  --rule: #d5d7dc; --line-1: #b3261e; --line-2: #1f5fa8; --line-3: #2e7d32; --line-4: #7b3fa0;
  --line-5: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181d; --ink: #e6e7ea; --faint: #a7abb3;
  --rule: #3a3e47; --line-1: #ff8a80; --line-2: #8ab4f8; --line-3: #81c995; --line-4: #d7aefb;
  --line-5: #fdd663; } }
"""
CSS_RULES = """
body { background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  max-width: 58rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin-bottom: 0; }
figure { margin: 1rem 0; max-width: 46rem; } figcaption { color: var(--faint); font-size: .9rem; }
svg { width: 100%; height: auto; display: block; } svg.narrow { display: none; }
@media screen and (max-width: 40rem) { svg.wide { display: none; } svg.narrow { display: block; } }
.side-by-side { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.scroll { overflow-x: auto; margin: .6rem 0; } .scroll:focus-visible { outline: 2px solid; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--rule); padding: .25rem .9rem .25rem 0; text-align: left;
  vertical-align: top; overflow-wrap: normal; } td.number { text-align: right; }
pre { white-space: pre-wrap; border-left: 3px solid var(--rule); padding-left: .8rem;
  font-size: .9rem; }
pre.command { font-weight: 600; }
.choice { border: 0; padding: 0; margin: 0; min-width: 0; }
.choice > input { position: absolute; opacity: 0; }
.choice > label { padding: .1rem .7rem; margin-right: .2rem; border: 1px solid var(--faint);
  border-radius: 1rem; cursor: pointer; }
.choice > input:checked + label { background: var(--ink); color: var(--paper); }
.choice > input:focus-visible + label { outline: 3px solid var(--line-2); outline-offset: 2px; }
.choice > .chosen { display: none; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  figure, pre, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .choice > legend, .choice > label { display: none; } .scroll { overflow: visible; } }
"""

_markdown_parser = MarkdownIt("commonmark", {"html": False}).enable("table")
# Text from untrusted files, such as a chip's name, must not add links or images.
_markdown_parser.disable(["image", "link", "autolink", "html_block", "html_inline"])


def _translate_markdown(state: StateCore) -> None:
    for token in state.tokens:
        if token.type == "inline":
            token.content = translate(token.content.replace("\n", " "))


_markdown_parser.core.ruler.before("inline", "translate", _translate_markdown)


@dataclass
class Page:
    """HTML page under construction.

    Attributes:
        warnings: messages for the user about parts that were skipped.
    """

    title: str
    parts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _tab_groups: int = 0
    _table_names: Counter[str] = field(default_factory=Counter)

    def add_heading(self, text: str, level: int = 2) -> None:
        """Add a heading; level 1 is the title."""
        self.parts.append(f"<h{level}>{_escape_html(translate(text))}</h{level}>")

    def add_paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(f"<p>{_escape_html(translate(text))}</p>")

    def add_preformatted(self, text: str) -> None:
        """Add text with its line breaks preserved."""
        self.parts.append(f"<pre>{_escape_html(text)}</pre>")

    def add_commands(self, lines: Sequence[str]) -> None:
        """Add command lines to copy."""
        self.parts.append(f'<pre class="command">{_escape_html(chr(10).join(lines))}</pre>')

    def add_markdown(self, text: str) -> None:
        """Add a Markdown report without its first line, which repeats the page's title."""
        html = _markdown_parser.render(replace_unprintable(text.partition("\n")[2]))
        html = re.sub(r"<th[^>]*></th>", "<td></td>", html)  # empty cells are not headers
        html = re.sub("<table>", lambda _: f"{self._open_scroll_region('a table')}<table>", html)
        self.parts.append(html.replace("</table>", "</table></div>"))

    def add_figure(self, figure: Figure) -> None:
        """Add a figure."""
        self.parts.append(figure.to_html())

    def add_figure_grid(self, figures: Sequence[Figure]) -> None:
        """Add figures in two columns if the screen is wide enough."""
        self.parts.append(
            f'<div class="side-by-side">{"".join(f.to_html() for f in figures)}</div>'
        )

    def add_figure_tabs(self, name: str, figures: dict[str, Figure]) -> None:
        """Add figures as labeled tabs; the first is selected."""
        self._tab_groups += 1
        group_id = f"choice-{self._tab_groups}"
        rules, inputs, panels = [], [], []
        for n, (label, figure) in enumerate(figures.items()):
            tab_id = f"{group_id}-{n}"
            rules.append(f"#{tab_id}:checked ~ .{tab_id} {{ display: block; }}")
            checked = " checked" if n == 0 else ""
            inputs.append(
                f'<input type="radio" name="{group_id}" id="{tab_id}"{checked}>'
                f'<label for="{tab_id}">{_escape_html(translate(label))}</label>'
            )
            panels.append(f'<div class="chosen {tab_id}">{figure.to_html()}</div>')
        self.parts.append(
            f"<style>{' '.join(rules)}</style>"
            f'<fieldset class="choice"><legend>{_escape_html(translate(name))}</legend>'
            f"{''.join(inputs)}{''.join(panels)}</fieldset>"
        )

    def add_table(self, rows: Sequence[Sequence[str]], name: str) -> None:
        """Add a table; the first row is the header, numeric columns are right-aligned.

        Args:
            name: what the table shows, for screen readers.
        """
        header, *body_rows = [[*map(translate, row)] for row in rows]
        thead = "".join(
            f'<th scope="col">{_escape_html(cell)}</th>' if cell else "<td></td>" for cell in header
        )
        is_numeric = [all(map(_is_number, column)) for column in zip(*body_rows, strict=True)]
        tbody = "".join(
            f"<tr>{''.join(map(_render_cell, row, is_numeric))}</tr>" for row in body_rows
        )
        self.parts.append(
            f"{self._open_scroll_region(name)}<table><thead><tr>{thead}</tr></thead>"
            f"<tbody>{tbody}</tbody></table></div>"
        )

    def _open_scroll_region(self, name: str) -> str:
        """Opening tag of a focusable region in which wide tables scroll; its label is unique."""
        name = translate(name)
        self._table_names[name] += 1
        name += f", {self._table_names[name]}" * (self._table_names[name] > 1)
        return f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape_html(name)}">'

    def to_html(self, refresh: int | None = None) -> str:
        """Render the whole page; browsers reload it every `refresh` seconds."""
        title = _escape_html(translate(self.title))
        refresh_meta = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
        return (
            f'<!doctype html>\n<html lang="{language_tag()}"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"{GENERATOR_META}{refresh_meta}<title>{title}</title>"
            f"<style>{CSS_COLORS}{CSS_RULES}</style></head>\n"
            f"<body><main><h1>{title}</h1>\n" + "\n".join(self.parts) + "\n</main></body></html>\n"
        )


MAX_PAGE_BYTES = 1 << 26  # 64 MiB, limit of an existing page


def write_page(path: Path, html: str) -> None:
    """Write a page atomically; overwrite only pages written by mlxgpt.

    Raises:
        UserError: if the file cannot be written, or exists and is not such a page.
    """
    try:
        if files.exists(path) and GENERATOR_META not in files.read_small(path, MAX_PAGE_BYTES):
            raise ValueError
        files.write_atomically(path, html)
    except ValueError:
        raise UserError(
            f"{path} exists and was not written by mlxgpt report", "choose another --output FILE."
        ) from None
    except OSError as error:
        raise files.to_user_error(
            error, "write", path, "choose another --output FILE.html."
        ) from error


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"–?|[-+±]?[\d,]*\.?\d+( ?%| ?×)?", text))


def _render_cell(text: str, is_numeric: bool) -> str:
    class_attribute = ' class="number"' if is_numeric else ""
    return f"<td{class_attribute}>{_escape_html(text)}</td>"
