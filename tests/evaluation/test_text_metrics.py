from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data import synthetic
from mlxgpt.evaluation import text_metrics
from mlxgpt.evaluation.text_metrics import METRICS, TrainingOverlap, compute_metrics

NAMES = [metric.name for metric in METRICS]
GRAMMAR = "grammar errors per 100 words"
GROUPS = 4

# Real text has only \n as a line end, but `str.split` also splits at others.
texts_strategy = st.text(st.sampled_from('ab "\n.') | st.characters(codec="utf-8"), max_size=60)


def needs_harper() -> None:
    if importlib.util.find_spec("harper") is None:
        pytest.skip("harper-py is not installed")


@pytest.fixture
def no_harper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "harper", None)
    text_metrics._load_linter.cache_clear()
    yield
    text_metrics._load_linter.cache_clear()


def metric_value(name: str, *texts: str, overlap: TrainingOverlap | None = None) -> float | None:
    return compute_metrics(texts, overlap)[name]


# Each metric against values computed by hand.


def test_split_sentences() -> None:
    text = '"Stop!" he cried. "No!" Tom said.\nHe fell,\nit hurt... "Oh. My!"\n\nBye\n\nOff'
    assert text_metrics.split_sentences(text) == [
        '"Stop!" he cried.',
        '"No!"',
        "Tom said.",
        "He fell,\nit hurt...",
        '"Oh.',
        'My!"',
        "Bye",
        "Off",
    ]
    assert text_metrics.split_sentences("Mr. A, Mrs. B and Dr. C ran.") == [
        "Mr. A, Mrs. B and Dr. C ran."
    ]
    assert text_metrics.split_sentences("“Go!” she said. Off") == ["“Go!” she said.", "Off"]
    assert text_metrics.split_sentences('"Go!"  she said.') == ['"Go!"  she said.']
    assert text_metrics.split_sentences(" \n") == []


@pytest.mark.parametrize(
    ("sentence", "complete"),
    [
        ("Tom ran.", 1),
        ("Tom ran", 0),
        ("tom ran.", 0),
        ('"Run!" he said.', 1),
        ('"run!" he said.', 0),
        ('He said, "Run!"', 1),
        ("He said, “Run!”", 1),
        ("Tom,\nran?", 1),
        ("Tom ran,", 0),
    ],
)
def test_a_complete_sentence_has_a_capital_and_a_final_stop(sentence: str, complete: int) -> None:
    assert metric_value("complete sentences", sentence) == complete


def test_complete_sentences_are_counted_over_all_texts_and_per_text() -> None:
    texts = ["Tom ran. he fell. Oh! He cried.", "Then it", "Tom sat. Then"]
    assert metric_value("complete sentences", *texts) == 4 / 7
    assert metric_value("complete sentences per story", *texts) == 1


def test_grammar_errors_are_per_100_words() -> None:
    needs_harper()
    good = "He eats an apple in the garden with his dog."
    assert metric_value(GRAMMAR, good) == 0
    assert (
        metric_value(GRAMMAR, good, "He eat an apple in a old garden with the the dog.") == 300 / 22
    )


def test_style_and_unknown_names_are_not_grammar_errors() -> None:
    needs_harper()
    assert (
        metric_value(
            GRAMMAR, "Zorbina was very good. Sam, Mia and Tom went far away, all of the day."
        )
        == 0
    )


def test_without_harper_only_grammar_errors_are_missing(no_harper: None) -> None:
    overlap = TrainingOverlap.scan(["Tom ran."], ["Tom ran"])
    values = compute_metrics(["Tom ran."], overlap)
    assert values[GRAMMAR] is None
    assert values["dictionary words"] == 1


def test_dictionary_words_occur_in_the_training_text() -> None:
    texts = ["The cat didn't zorb.", "A cat, a “cat”!"]
    overlap = TrainingOverlap.scan(texts, ['the CAT "a" ', "dog didn’t"])
    assert overlap.words == {b"the", b"cat", b"a", b"didnt"}
    assert metric_value("dictionary words", *texts, overlap=overlap) == 7 / 8


def test_distinct_n_grams_do_not_depend_on_the_amount_of_text() -> None:
    name = "distinct 3-grams"
    repeated, distinct = "a b " * 500, " ".join(f"w{n}" for n in range(1000))
    assert metric_value(name, repeated) == 2 / 998
    assert metric_value(name, repeated, repeated) == 2 / 998
    assert metric_value(name, repeated[:500], repeated[500:], "a b a") == 2 / 998
    assert metric_value(name, distinct) == metric_value(name, distinct, distinct) == 1
    assert metric_value(name, distinct, repeated) == mean([1, 2 / 998])
    assert metric_value(name, repeated[:-2]) is None


def test_copied_8_grams_occur_in_the_training_text() -> None:
    texts = ["One two, three four five six seven eight nine ten", "one two three", "z " * 8]
    overlap = TrainingOverlap.scan(
        texts, ["zero one two three", "", "four five", "six seven EIGHT NINE! z z z"]
    )
    # The 8-grams 1–8 and 2–9 are in the training text, 3–10 and the one of z are not.
    assert metric_value("copied 8-grams", *texts, overlap=overlap) == 2 / 4
    assert metric_value("copied 8-grams", "one two three", overlap=overlap) is None


def test_metrics_of_the_training_text_are_none_without_one() -> None:
    values = compute_metrics(["one two three four five six seven eight nine"], None)
    assert values["dictionary words"] is values["copied 8-grams"] is None


@pytest.mark.parametrize(
    ("text", "balanced"),
    [
        ('"Go!" he said, "or stay."', 1),
        ("“Go!” he said.", 1),
        ('He said, "Go!', 0),
        ('He said, Go!"', 0),
        ('He "said, "Go!"', 0),
        ('He" said, "Go!', 0),
        ('He"said, Go!"', 0),
        ('"Go!"he said.', 0),
        ('He said, " Go!"', 0),
        ('He said, "Go! "', 0),
        ("”Go!“ he said.", 0),
        ('("Go!") – "Go!"', 1),
        ("No quotes.", None),
    ],
)
def test_quotes_are_balanced_if_they_open_and_close_alternately(
    text: str, balanced: int | None
) -> None:
    assert metric_value("quotes balanced", text) == balanced


def test_balanced_quotes_are_a_share_of_the_texts_with_quotes() -> None:
    assert metric_value("quotes balanced", '"Go!"', "Go!", '"Go!', '"Oh." "No."') == 2 / 3


def test_names_that_stay_are_repeated_in_the_same_text() -> None:
    name = "names that stay"
    assert metric_value(name, "One day Tom met Ann. Tom smiled.") == 1 / 2
    assert metric_value(name, "One day Tom met Ann.", "But Tom met Ann, and Ann smiled.") == 1 / 4
    assert metric_value(name, "She saw The dog and the cat. The end.") is None
    assert metric_value(name, 'Ann ran. Now I know.\nThen he said, "Yes!" Yes.') is None


def test_ended_is_the_share_of_texts_marked_as_ended() -> None:
    texts = ["a", "b", "c", "d"]
    assert compute_metrics(texts, None, [True, True, False, True])["ended"] == 3 / 4
    assert compute_metrics(texts, None)["ended"] is None


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_metrics_of_empty_texts_are_none(texts: list[str]) -> None:
    values = compute_metrics(texts, TrainingOverlap.scan(texts, ["one two"]), [False] * len(texts))
    assert list(values) == NAMES
    del values["complete sentences per story"], values["ended"]
    assert set(values.values()) == {None}


def test_metrics_of_windows_of_a_play(shakespeare: Path, no_harper: None) -> None:
    text = shakespeare.read_text(encoding="utf-8")
    windows = [text[start : start + 800] for start in range(0, 16_000, 800)]
    values = compute_metrics(windows, TrainingOverlap.scan(windows, [text[8000:]]))
    missing = {name for name, value in values.items() if value is None}
    assert missing == {"quotes balanced", "ended", GRAMMAR}
    assert values["copied 8-grams"] == pytest.approx(1 / 2, abs=0.05)


@given(st.lists(texts_strategy))
def test_any_text_has_valid_metrics(texts: list[str]) -> None:
    values = compute_metrics(texts, TrainingOverlap.scan(texts, texts), [True] * len(texts))
    shares = [values[metric.name] for metric in METRICS if metric.is_fraction]
    assert all(share is None or 0 <= share <= 1 for share in shares)
    assert values["dictionary words"] in (None, 1)


# Overlap with the training text.

words_strategy = st.lists(st.sampled_from(["a", "b", "Ab"]), max_size=40)


@given(st.lists(words_strategy, max_size=4), st.lists(words_strategy, max_size=6))
def test_a_scan_matches_a_brute_force_search(
    texts: list[list[str]], pieces: list[list[str]]
) -> None:
    overlap = TrainingOverlap.scan(map(" ".join, texts), map(" ".join, pieces))
    training = [word.lower().encode() for piece in pieces for word in piece]
    expected_words = [[word.lower().encode() for word in text] for text in texts]

    def grams(words: Sequence[bytes]) -> set[tuple[bytes, ...]]:
        return {tuple(words[n : n + 8]) for n in range(len(words) - 7)}

    assert overlap.words == {word for text in expected_words for word in text} & set(training)
    assert overlap.eight_grams == {g for text in expected_words for g in grams(text)} & grams(
        training
    )


def test_a_scan_of_many_words_finds_exactly_the_copies() -> None:
    numbers = [str(n * n) for n in range(6000)]
    reversed_numbers = numbers[::-1]
    texts = [" ".join(numbers[n : n + 12]) for n in range(0, 4800, 12)] + [
        " ".join(reversed_numbers[:100])
    ]
    pieces = (" ".join(numbers[n : n + 7]) for n in range(0, 6000, 7))
    overlap = TrainingOverlap.scan(texts, pieces)
    assert metric_value("copied 8-grams", *texts, overlap=overlap) == 400 * 5 / (400 * 5 + 93)


# Controls: shuffled words and n-gram texts.


@given(texts_strategy)
def test_shuffling_keeps_words_and_white_space(text: str) -> None:
    (shuffled,) = text_metrics.shuffle_words([text], 1)
    assert Counter(re.findall(r"\S+", shuffled)) == Counter(re.findall(r"\S+", text))
    assert re.split(r"\S+", shuffled) == re.split(r"\S+", text)


def test_shuffling_depends_on_seed_and_index() -> None:
    texts = ["a b c d e f g h i j"] * 2
    shuffled = text_metrics.shuffle_words(texts, 1)
    assert shuffled == text_metrics.shuffle_words(texts, 1)
    assert len({*texts, *shuffled, *text_metrics.shuffle_words(texts, 2)}) == 5


@pytest.mark.parametrize("end", ["<|endoftext|>", "\n<|endoftext|>\n", "\0"])
def test_n_gram_texts_start_and_end_like_documents(end: str) -> None:
    training = end.join(["abcabd", "xyz", ""])
    generated = text_metrics.sample_ngram_texts(training, [20] * 40, 0)
    assert set(generated) == {"abcabd", "xyz"}
    assert set(text_metrics.sample_ngram_texts(training, [2] * 40, 0)) == {"ab", "xy"}


def test_n_gram_texts_have_the_frequencies_of_the_training_text() -> None:
    training = "<|endoftext|>".join(["aaaab", "caaad", "caaad", "caaad"])
    generated = Counter(text_metrics.sample_ngram_texts(training, [9] * 4000, 3))
    assert set(generated) == {"aaaab", "caaad"}
    assert generated["caaad"] / 4000 == pytest.approx(3 / 4, abs=0.03)


def test_n_gram_texts_have_a_context_of_four_characters() -> None:
    training = "1aaaa2<|endoftext|>3aaaa4"
    generated = set(text_metrics.sample_ngram_texts(training, [9] * 100, 0))
    assert generated == {"1aaaa2", "1aaaa4", "3aaaa2", "3aaaa4"}
    training = "1aaa2<|endoftext|>3aaa4"
    assert set(text_metrics.sample_ngram_texts(training, [9] * 100, 0)) == {"1aaa2", "3aaa4"}


def test_n_gram_texts_depend_on_seed_and_index() -> None:
    training = "<|endoftext|>".join(synthetic.generate_stories(0, size=20_000))
    generated = text_metrics.sample_ngram_texts(training, [200, 200], 1)
    assert generated == text_metrics.sample_ngram_texts(training, [200, 200], 1)
    assert len({*generated, *text_metrics.sample_ngram_texts(training, [200, 200], 2)}) == 4


# Preference for the original order of sentences.

STORIES = ["One. Two. Three. Four.", 'A "b." C!\nD?  E.']


def test_a_model_that_knows_the_stories_prefers_their_original_order() -> None:
    scored_texts: list[str] = []

    def scores(texts: Sequence[str]) -> list[float]:
        scored_texts.extend(texts)
        return [-1.0 if text in STORIES else -2.0 for text in texts]

    assert text_metrics.order_preference([*STORIES, "Too. Short. "], scores, 1) == 1
    assert scored_texts[:2] == STORIES
    for story, shuffled in zip(STORIES, scored_texts[2:], strict=True):
        assert story != shuffled
        assert sorted(text_metrics.split_sentences(story)) == sorted(
            text_metrics.split_sentences(shuffled)
        )
        assert len(story) == len(shuffled)


def test_shuffled_stories_always_have_a_different_order() -> None:
    def scores(texts: Sequence[str]) -> list[float]:
        assert texts[:40] == ["A. B. C."] * 40
        assert set(texts[40:]) == {"A. C. B.", "B. A. C.", "B. C. A.", "C. A. B.", "C. B. A."}
        return [0.0] * len(texts)

    text_metrics.order_preference([" A. B. C.\n"] * 40, scores, 0)


def test_order_preference_is_a_share_of_the_stories() -> None:
    assert text_metrics.order_preference(STORIES, lambda texts: [2.0, 1.0, 1.0, 2.0], 0) == 1 / 2
    assert text_metrics.order_preference(STORIES, lambda texts: [1.0] * 4, 0) == 0
    assert text_metrics.order_preference(["A. A. A.", "A. B."], lambda texts: [], 0) is None


def test_order_preference_depends_on_the_seed() -> None:
    def shuffled_order(seed: int) -> list[str]:
        scored_texts: list[str] = []

        def scores(texts: Sequence[str]) -> list[float]:
            scored_texts.extend(texts)
            return [0.0, 0.0]

        text_metrics.order_preference([" ".join(f"{n}." for n in range(20))], scores, seed)
        return scored_texts

    assert shuffled_order(1) == shuffled_order(1)
    assert shuffled_order(1) != shuffled_order(2)


# Every metric must separate real stories from at least one control.


@cache
def real_stories(part: str) -> list[str]:
    folder = os.environ.get("MLXGPT_TEXTS")
    if not folder:
        pytest.skip("MLXGPT_TEXTS names no folder of real texts")
    text = (Path(folder) / "tinystories" / f"{part}.txt").read_text(encoding="utf-8")
    return [story for story in map(str.strip, text.split("<|endoftext|>")) if story]


@cache
def compute_columns(corpus: str) -> dict[str, list[dict[str, float | None]]]:
    """The metrics of each group of stories, for the real stories and each control."""
    if corpus == "synthetic":
        real, training = (
            list(synthetic.generate_stories(1, size=60_000)),
            synthetic.generate_stories(2, size=800_000),
        )
    else:
        real, training = real_stories("valid")[:100], iter(real_stories("train")[:1500])
    documents = list(training)
    lengths = list(map(len, real))
    ngrams = text_metrics.sample_ngram_texts("<|endoftext|>".join(documents), lengths, 0)
    ended = {
        "real": [True] * len(real),
        "shuffled": [True] * len(real),
        "n-grams": [len(text) < length for text, length in zip(ngrams, lengths, strict=True)],
    }
    columns = {"real": real, "shuffled": text_metrics.shuffle_words(real, 0), "n-grams": ngrams}
    overlap = TrainingOverlap.scan(
        [text for texts in columns.values() for text in texts], documents
    )
    return {
        name: [
            compute_metrics(texts[n::GROUPS], overlap, ended[name][n::GROUPS])
            for n in range(GROUPS)
        ]
        for name, texts in columns.items()
    }


@pytest.mark.parametrize("corpus", ["synthetic", "real stories"])
@pytest.mark.parametrize("metric", METRICS, ids=NAMES)
def test_each_metric_separates_real_stories_from_a_control(
    metric: text_metrics.Metric, corpus: str
) -> None:
    """All groups of real stories are on the correct side of all groups of the control."""
    if metric.name == GRAMMAR:
        needs_harper()

    def values(column: str) -> list[float]:
        column_values = [group[metric.name] for group in compute_columns(corpus)[column]]
        return [value for value in column_values if value is not None]

    real, controls = values("real"), [values("shuffled"), values("n-grams")]
    assert [len(column) for column in (real, *controls)] == [GROUPS] * 3
    above = any(min(real) > max(control) for control in controls)
    below = any(max(real) < min(control) for control in controls)
    allowed = {"higher": above, "lower": below, "like real": above or below}
    assert allowed[metric.better]


def test_scoring_the_first_sentence_prefers_the_order_of_real_stories() -> None:
    def scores(texts: Sequence[str]) -> list[float]:
        return [float(text.startswith(("Once", "One day"))) for text in texts]

    real = real_stories("valid")[:100]
    preference = text_metrics.order_preference(real, scores, 0)
    assert preference is not None
    assert preference > 0.7
    shuffled = text_metrics.order_preference(text_metrics.shuffle_words(real, 0), scores, 0)
    assert shuffled is not None
    assert shuffled < 0.1
