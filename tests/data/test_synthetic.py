from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data.synthetic import (
    PRONOUNS,
    Plot,
    _StoryContext,
    generate_stories,
    generate_story,
    load_grammar,
)

WORDS = load_grammar().words
GIRLS, BOYS = set(WORDS["girl"]), set(WORDS["boy"])
ADULTS = {*WORDS["woman"], *WORDS["man"]}
# Match the names of adults as a whole: "Aunt May" is two words.
NAME = re.compile(r"\b(?:(?:Aunt|Uncle) )?[A-Z][a-z]+\b")
numbers = st.integers(min_value=0, max_value=10**9)


def find_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def known_words() -> set[str]:
    """Return every word of the word lists, and the few that the grammar adds."""
    texts = ["a an the to"]
    texts += [form for members in WORDS.values() for word in members for form in word.split("|")]
    texts += [form for forms in PRONOUNS.values() for form in forms.values()]
    for plot in load_grammar().plots:
        for variants, _ in plot.sentences:
            texts += [part for variant in variants for part in variant if isinstance(part, str)]
    texts += [
        part for opening in load_grammar().openings for part in opening if isinstance(part, str)
    ]
    return find_words(" ".join(texts))


KNOWN_WORDS = known_words()


@given(n=numbers, seed=numbers)
def test_story_has_valid_words_punctuation_and_quotes(n: int, seed: int) -> None:
    text = generate_story(n, seed)
    assert find_words(text) <= KNOWN_WORDS
    assert text.isascii()
    assert not re.search(r"[{}|~/]|  |\s$|^\s| [.,?!]|\.\.|[,?!]\.|,\"\.", text)
    assert text.count('"') % 2 == 0
    for quote in re.findall(r'"([^"]*)"', text):
        assert quote[0].isupper() or re.search(r'," (?:said|\w+ said) ', text), quote
        assert quote[-1] in ".,?!"
    assert text[-1] in '.?!"'


@given(n=numbers, seed=numbers)
def test_articles_agree(n: int, seed: int) -> None:
    for article, word in re.findall(r"\b([Aa]n?) (\w+)", generate_story(n, seed)):
        vowel = word[0] in "aeiou" or word == "honest"
        assert (article.lower() == "an") == vowel, f"{article} {word}"


@given(n=numbers, seed=numbers)
def test_people_and_pronouns_are_consistent(n: int, seed: int) -> None:
    """At most two children and one adult, with pronouns that agree."""
    text = generate_story(n, seed)
    people = {name for name in NAME.findall(text) if name in GIRLS | BOYS | ADULTS}
    # "Will" may start a question: "Will you sing?"
    people -= {"Will"} if "Will you" in text else set()
    children, adults = people & (GIRLS | BOYS), people & ADULTS
    assert 1 <= len(children) <= 2
    assert len(adults) <= 1
    has_female = bool(people & GIRLS) or bool(adults & set(WORDS["woman"]))
    has_male = bool(people & BOYS) or bool(adults & set(WORDS["man"])) or "Will" in text
    if find_words(text) & {"she", "her", "herself"}:
        assert has_female
    if find_words(text) & {"he", "him", "his", "himself"}:
        assert has_male
    if "girl" in find_words(text):
        assert people & GIRLS
    if "boy" in find_words(text):
        assert people & BOYS or "Will" in text


@given(n=numbers, seed=numbers)
def test_animal_is_introduced_once(n: int, seed: int) -> None:
    """One animal: "a small dog" the first time, "the dog" from then on."""
    text = generate_story(n, seed)
    animals = {word.split("|")[0] for kind in ("animal", "climber") for word in WORDS[kind]}
    matches = re.findall(r"\b([Aa]n?|[Tt]he) (?:\w+ )?(\w+)", text)
    articles = [article.lower() for article, noun in matches if noun in animals]
    assert len({noun for _, noun in matches if noun in animals}) <= 1
    assert articles[1:] == ["the"] * len(articles[1:])


def test_stories_have_three_to_eight_sentences() -> None:
    for plot in load_grammar().plots:
        required_count = sum(not optional for _, optional in plot.sentences)
        assert 3 <= required_count <= len(plot.sentences) <= 8, plot.name
        assert plot.thing_class in WORDS


def test_grammar_has_the_documented_size() -> None:
    kinds = set(WORDS) - {"girl", "boy", "woman", "man", "outside", "inside", "day", "later"}
    grammar_words = [word.split("|")[0] for kind in kinds for word in WORDS[kind]]
    assert len(set(grammar_words)) >= 300
    assert len(load_grammar().plots) >= 20
    plots_with_dialogue = [
        plot.name
        for plot in load_grammar().plots
        if any('"' in part for part in literal_parts(plot))
    ]
    assert plots_with_dialogue == [plot.name for plot in load_grammar().plots], "each has dialogue"
    for kind, members in WORDS.items():
        assert len(set(members)) == len(members), kind


def literal_parts(plot: Plot) -> list[str]:
    return [
        part
        for variants, _ in plot.sentences
        for variant in variants
        for part in variant
        if isinstance(part, str)
    ]


def is_always_named(plot: Plot, name: str) -> bool:
    """Return whether every variant of some required sentence has this field."""
    return any(
        all(
            any(not isinstance(part, str) and part[0] == name for part in variant)
            for variant in variants
        )
        for variants, optional in plot.sentences
        if not optional
    )


def test_there_are_more_than_a_billion_different_stories() -> None:
    """Lower bound: the variants of each sentence times the words that every story uses."""
    children = len(GIRLS | BOYS)
    total = 0
    for plot in load_grammar().plots:
        choices = {
            "h": children,
            "f": children - 1,
            "p": len(ADULTS),
            "t": len(WORDS[plot.thing_class]),
        }
        total += math.prod(
            len(variants) + optional for variants, optional in plot.sentences
        ) * math.prod(n for name, n in choices.items() if is_always_named(plot, name))
    assert total >= 10**9
    stories = list(itertools.islice(generate_stories(3, size=10**9), 20_000))
    assert len(set(stories)) > 19_990


def test_every_word_of_the_grammar_is_used() -> None:
    all_text = " ".join(itertools.islice(generate_stories(4, size=10**9), 20_000))
    for kind, members in WORDS.items():
        for word in members:
            # The first word of a sentence is capitalized; words of "skill" have two forms.
            assert any(
                re.search(rf"\b{re.escape(form)}\b", all_text, re.I) for form in word.split("|")
            ), f"{word} of {kind}"


def test_story_depends_only_on_its_number_and_seed() -> None:
    assert list(itertools.islice(generate_stories(5, size=10**6), 3)) == [
        generate_story(n, 5) for n in range(3)
    ]
    assert generate_story(0, 0) != generate_story(0, 1) != generate_story(1, 0)


def test_stories_end_at_the_requested_size() -> None:
    texts = list(generate_stories(0, size=10_000))
    assert 10_000 <= sum(map(len, texts)) < 10_000 + len(texts[-1])
    assert list(generate_stories(0, size=0)) == []


@pytest.mark.parametrize("plot", load_grammar().plots, ids=lambda plot: plot.name)
def test_plots_name_their_hero_in_the_first_sentence(plot: Plot) -> None:
    """No pronoun comes before its name, whichever variants are chosen."""
    first = plot.sentences[0]
    assert not first[1], "the first sentence is always there"
    for variant in first[0]:
        fields = [part for part in variant if not isinstance(part, str)]
        person_fields = [name for name, _ in fields if name in "hfp"]
        for name in set(person_fields):
            parts = [part for field, part in fields if field == name]
            assert parts[0] == "" or parts[0] in ("child", "his"), variant
        hero_forms = Counter(part for field, part in fields if field == "h")
        assert not hero_forms or hero_forms[""], variant


def test_hero_and_friend_are_different() -> None:
    for n in range(300):
        cast = _StoryContext(random.Random(n).choice, load_grammar().words, load_grammar().plots[0])
        assert cast._people["h"][""] != cast._people["f"][""]
