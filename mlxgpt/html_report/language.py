"""Languages of the reports: English, and Portuguese by its table of templates."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mlxgpt.html_report.portuguese import PORTUGUESE
from mlxgpt.utils.errors import UserError

LANGUAGE_TAGS = {"en": "en", "pt": "pt-BR"}

_language: ContextVar[str] = ContextVar("language", default="en")


def check_language(lang: str) -> None:
    """Check that a language is one of LANGUAGE_TAGS.

    Raises:
        UserError: if it is not.
    """
    if lang not in LANGUAGE_TAGS:
        names = " or ".join(LANGUAGE_TAGS)
        raise UserError(f"lang = {lang!r} is not a supported language", f"use {names}.")


@contextmanager
def use_language(lang: str) -> Iterator[None]:
    """Build and render pages in a language, one of LANGUAGE_TAGS, within this context."""
    check_language(lang)
    token = _language.set(lang)
    try:
        yield
    finally:
        _language.reset(token)


def language_tag() -> str:
    """The current language, as HTML names it."""
    return LANGUAGE_TAGS[_language.get()]


SENTENCE_END = re.compile(r"(?<=\.) (?=[A-Z±*\d])")


def translate(text: str) -> str:
    """Translate a name, sentences or a list separated by semicolons; other text stays."""
    if _language.get() == "en" or not re.search("[A-Za-z]{2}", text):
        return text
    if text in PORTUGUESE:
        return PORTUGUESE[text]
    if len(sentences := SENTENCE_END.split(text)) > 1:
        return " ".join(map(translate, sentences))
    for pattern, template in _compile_templates():
        if match := pattern.fullmatch(text):
            return template.format(*map(translate, match.groups()))
    if "; " in text:
        return "; ".join(map(translate, text.split("; ")))
    return f"{translate(text[:-1])}." if text.endswith(".") else text


@functools.cache
def _compile_templates() -> list[tuple[re.Pattern[str], str]]:
    """Patterns of the templates with values, the most specific first."""
    number = r"([-+]?[\d,]+(?:\.\d+)?(?:e[-+]\d+)?)"
    templates = [template for template in PORTUGUESE if re.search(r"#|\{\}", template)]
    templates.sort(key=lambda template: len(re.sub(r"#|\{\}", "", template)), reverse=True)
    return [
        (
            re.compile(re.escape(key).replace(r"\{\}", "(.+?)").replace(r"\#", number)),
            PORTUGUESE[key],
        )
        for key in templates
    ]
