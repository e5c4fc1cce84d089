"""The built-in corpus: short stories for children, from a grammar of our own, in unlimited number.

Story n of a seed is a function of (seed, n), the same on every machine. The words and plots stand
in storybook.txt, which says how it is written.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.utils.seeds import derive

MOST = 8  # sentences
PRONOUNS = {
    "girl": {"he": "she", "him": "her", "his": "her", "himself": "herself", "child": "girl"},
    "boy": {"he": "he", "him": "him", "his": "his", "himself": "himself", "child": "boy"},
}
PRONOUNS["woman"], PRONOUNS["man"] = PRONOUNS["girl"], PRONOUNS["boy"]

# A sentence's template: text, and the fields (name, part) between.
Template = tuple[str | tuple[str, str], ...]
Pick = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        name: as the text calls it.
        thing: the class of words that the story's thing comes from.
        animal, spot: those of its animal, and of the places to look.
        sentences: the variants of each, and whether it may be left out.
    """

    name: str
    thing: str
    animal: str
    spot: str
    sentences: tuple[tuple[tuple[Template, ...], bool], ...]


@dataclass(frozen=True)
class Book:
    """What storybook.txt holds, and the sha256 of it."""

    words: dict[str, tuple[str, ...]]
    openings: tuple[Template, ...]
    plots: tuple[Plot, ...]
    sha256: str


@functools.cache
def book() -> Book:
    """The words, openings and plots."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    _, words, openings, plots = re.split(r"^# \w+$", text, flags=re.MULTILINE)
    classes = {}
    for line in words.strip().splitlines():
        name, _, members = line.partition(" = ")
        classes[name] = tuple(members.split(", "))
    return Book(
        classes,
        tuple(map(_template, openings.strip().splitlines())),
        tuple(map(_plot, plots.split("\n## ")[1:])),
        hashlib.sha256(text.encode("utf-8")).hexdigest(),
    )


def stories(seed: int, *, size: int) -> Iterator[str]:
    """Story 0, 1, … of a seed, until together they have at least `size` bytes."""
    for n in itertools.count():
        if size <= 0:
            return
        text = story(n, seed)
        size -= len(text)  # all ASCII
        yield text


def story(n: int, seed: int) -> str:
    """Story n of a seed: up to 8 sentences in one paragraph."""
    # Of Python's generator only random() is promised to stay the same between versions.
    draw = random.Random(derive(seed, "story", n)).random

    def pick(choices: Sequence[Any]) -> Any:
        return choices[int(draw() * len(choices))]

    words, plot = book().words, pick(book().plots)
    templates = [
        pick(variants) for variants, optional in plot.sentences if not optional or draw() < 0.5
    ]
    if len(templates) < MOST and draw() < 0.5:
        templates.insert(0, pick(book().openings))
    fill = _Cast(pick, words, plot).fill
    return " ".join(map(_sentence, map(fill, templates)))


class _Cast:
    """Who and what one story is about."""

    def __init__(self, pick: Pick, words: dict[str, tuple[str, ...]], plot: Plot) -> None:
        self._pick, self._words = pick, words
        hero = self._person("girl", "boy")
        friend = hero
        while friend[""] == hero[""]:
            friend = self._person("girl", "boy")
        noun, sound = pick(words[plot.animal]).split("|")
        animal = {"noun": noun, "adjective": pick(words["kind"]), "sound": sound}
        look = pick(words["look"])
        thing = {"noun": pick(words[plot.thing]), "adjective": look, "look": look}
        food = {"noun": pick(words["food"]), "adjective": pick(words["taste"])}
        if plot.thing == "food":
            thing["adjective"] = pick(words["taste"])
        place, preposition = pick(words["place"]).split("|")
        do, did = pick(words["skill"]).split("|")
        here = there = pick(words[plot.spot])
        while there == here:
            there = pick(words[plot.spot])
        self._people = {"h": hero, "f": friend, "p": self._person("woman", "man")}
        self._things = {"a": animal, "t": thing, "o": food}
        self._fixed = {
            "place": place,
            "at": f"{preposition} the {place}",
            "to": f"to the {place}",
            "here": here,
            "there": there,
            "do": do,
            "did": did,
        }
        self._known: set[str] = set()

    def fill(self, template: Template) -> str:
        """The template's words."""
        return "".join(p if isinstance(p, str) else self._field(*p) for p in template)

    def _person(self, *kinds: str) -> dict[str, str]:
        kind = self._pick(kinds)
        return {"": self._pick(self._words[kind]), **PRONOUNS[kind]}

    def _field(self, name: str, part: str) -> str:
        if name in self._people:
            return self._people[name][part]
        if thing := self._things.get(name):
            if part not in ("", "noun"):
                return thing[part]
            new = name not in self._known
            self._known.add(name)
            if part:
                return thing["noun"]
            return f"a {thing['adjective']} {thing['noun']}" if new else f"the {thing['noun']}"
        return self._fixed.get(name) or self._pick(self._words[name])


def _template(text: str) -> Template:
    found = re.finditer(r"([^{]+)|\{(\w+)\.?(\w*)\}", text)
    return tuple(match[1] or (match[2], match[3]) for match in found)


def _plot(text: str) -> Plot:
    head, *lines = text.strip().splitlines()
    name, _, terms = head.partition(": ")
    thing, *special = terms.split(", ")
    return Plot(
        name=name,
        thing=thing,
        animal="climber" if "climber" in special else "animal",
        spot="inside" if "inside" in special else "outside",
        sentences=tuple(
            (tuple(map(_template, line.removeprefix("~ ").split(" / "))), line.startswith("~ "))
            for line in lines
        ),
    )


_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou]|honest)")


def _sentence(text: str) -> str:
    """With its capital letter, its full stop, and "an" where it belongs."""
    start = text[0] == '"'
    text = text[:start] + text[start].upper() + text[start + 1 :]
    body, end = (text[:-1], '"') if text.endswith('"') else (text, "")
    stop = "" if body[-1] in ".?!" else "."
    return _BEFORE_VOWEL.sub(r"\1n ", f"{body}{stop}{end}")
