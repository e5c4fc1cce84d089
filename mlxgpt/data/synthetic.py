"""Synthetic stories for children, generated from a grammar: the built-in corpus `synthetic`.

Story n is a pure function of (seed, n), the same on every machine. Words and plots are in
synthetic.txt, which also describes its syntax.
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

from mlxgpt.utils.seeds import derive_seed

# Template of a sentence: text, and fields as (name, part).
Template = tuple[str | tuple[str, str], ...]
Pick = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Plot:
    """One plot of the grammar.

    Attributes:
        name: heading in synthetic.txt.
        thing_class: word class of the thing in the story.
        animal_class, spot_class: word classes of the animal, and of the places to look.
        sentences: (variants, is optional) of each sentence.
    """

    name: str
    thing_class: str
    animal_class: str
    spot_class: str
    sentences: tuple[tuple[tuple[Template, ...], bool], ...]


@dataclass(frozen=True)
class StoryGrammar:
    """The parsed synthetic.txt, and its SHA-256."""

    words: dict[str, tuple[str, ...]]
    openings: tuple[Template, ...]
    plots: tuple[Plot, ...]
    sha256: str


@functools.cache
def load_grammar() -> StoryGrammar:
    """Parse synthetic.txt: words, openings and plots."""
    # Editing any line of the file, even its description, changes the origin of prepared data.
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    _, words, openings, plots = re.split(r"^# \w+$", text, flags=re.MULTILINE)
    words_by_class = {}
    for line in words.strip().splitlines():
        name, _, members = line.partition(" = ")
        words_by_class[name] = tuple(members.split(", "))
    return StoryGrammar(
        words_by_class,
        tuple(map(_parse_template, openings.strip().splitlines())),
        tuple(map(_parse_plot, plots.split("\n## ")[1:])),
        hashlib.sha256(text.encode("utf-8")).hexdigest(),
    )


def generate_stories(seed: int, *, size: int) -> Iterator[str]:
    """Yield stories 0, 1, … of a seed until they have at least `size` bytes in total."""
    for n in itertools.count():
        if size <= 0:
            return
        text = generate_story(n, seed)
        size -= len(text)  # all ASCII
        yield text


MAX_SENTENCES = 8


def generate_story(n: int, seed: int) -> str:
    """Generate story n of a seed: one paragraph of up to `MAX_SENTENCES` sentences."""
    # Only random() is guaranteed to give the same numbers in all versions of Python.
    draw = random.Random(derive_seed(seed, "story", n)).random

    def pick(choices: Sequence[Any]) -> Any:
        return choices[int(draw() * len(choices))]

    words, plot = load_grammar().words, pick(load_grammar().plots)
    templates = [
        pick(variants) for variants, optional in plot.sentences if not optional or draw() < 0.5
    ]
    if len(templates) < MAX_SENTENCES and draw() < 0.5:
        templates.insert(0, pick(load_grammar().openings))
    fill = _StoryContext(pick, words, plot).fill
    return " ".join(map(_punctuate, map(fill, templates)))


PRONOUNS = {
    "girl": {"he": "she", "him": "her", "his": "her", "himself": "herself", "child": "girl"},
    "boy": {"he": "he", "him": "him", "his": "his", "himself": "himself", "child": "boy"},
}
PRONOUNS["woman"], PRONOUNS["man"] = PRONOUNS["girl"], PRONOUNS["boy"]


class _StoryContext:
    """The people, animal, things and places of one story."""

    def __init__(self, pick: Pick, words: dict[str, tuple[str, ...]], plot: Plot) -> None:
        self._pick, self._words = pick, words
        hero = self._pick_person("girl", "boy")
        friend = hero
        while friend[""] == hero[""]:
            friend = self._pick_person("girl", "boy")
        noun, sound = pick(words[plot.animal_class]).split("|")
        animal = {"noun": noun, "adjective": pick(words["kind"]), "sound": sound}
        look = pick(words["look"])
        thing = {"noun": pick(words[plot.thing_class]), "adjective": look, "look": look}
        food = {"noun": pick(words["food"]), "adjective": pick(words["taste"])}
        if plot.thing_class == "food":
            thing["adjective"] = pick(words["taste"])
        place, preposition = pick(words["place"]).split("|")
        verb, past_tense = pick(words["skill"]).split("|")
        first_spot = second_spot = pick(words[plot.spot_class])
        while second_spot == first_spot:
            second_spot = pick(words[plot.spot_class])
        self._people = {"h": hero, "f": friend, "p": self._pick_person("woman", "man")}
        self._things = {"a": animal, "t": thing, "o": food}
        self._phrases = {
            "place": place,
            "at": f"{preposition} the {place}",
            "to": f"to the {place}",
            "here": first_spot,
            "there": second_spot,
            "do": verb,
            "did": past_tense,
        }
        self._mentioned: set[str] = set()

    def fill(self, template: Template) -> str:
        """Fill in the fields of a template."""
        return "".join(p if isinstance(p, str) else self._fill_field(*p) for p in template)

    def _pick_person(self, *kinds: str) -> dict[str, str]:
        kind = self._pick(kinds)
        return {"": self._pick(self._words[kind]), **PRONOUNS[kind]}

    def _fill_field(self, name: str, part: str) -> str:
        if name in self._people:
            return self._people[name][part]
        if thing := self._things.get(name):
            if part not in ("", "noun"):
                return thing[part]
            is_first_mention = name not in self._mentioned
            self._mentioned.add(name)
            if part:
                return thing["noun"]
            article_and_adjective = f"a {thing['adjective']}" if is_first_mention else "the"
            return f"{article_and_adjective} {thing['noun']}"
        return self._phrases.get(name) or self._pick(self._words[name])


def _parse_template(text: str) -> Template:
    matches = re.finditer(r"([^{]+)|\{(\w+)\.?(\w*)\}", text)
    return tuple(match[1] or (match[2], match[3]) for match in matches)


def _parse_plot(text: str) -> Plot:
    header, *lines = text.strip().splitlines()
    name, _, terms = header.partition(": ")
    thing, *flags = terms.split(", ")
    return Plot(
        name=name,
        thing_class=thing,
        animal_class="climber" if "climber" in flags else "animal",
        spot_class="inside" if "inside" in flags else "outside",
        sentences=tuple(map(_parse_sentence, lines)),
    )


def _parse_sentence(line: str) -> tuple[tuple[Template, ...], bool]:
    """Parse a sentence: its variants, and whether it is optional."""
    variants = line.removeprefix("~ ").split(" / ")
    return tuple(map(_parse_template, variants)), line.startswith("~ ")


_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou]|honest)")


def _punctuate(text: str) -> str:
    """Capitalize the first letter, add a period, and change "a" to "an" before a vowel."""
    is_quoted = text[0] == '"'
    text = text[:is_quoted] + text[is_quoted].upper() + text[is_quoted + 1 :]
    body, closing_quote = (text[:-1], '"') if text.endswith('"') else (text, "")
    period = "" if body[-1] in ".?!" else "."
    return _BEFORE_VOWEL.sub(r"\1n ", f"{body}{period}{closing_quote}")
