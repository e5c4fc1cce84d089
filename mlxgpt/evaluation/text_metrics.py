"""Metrics of text quality, and two control texts that should score worse than real texts.

The controls are shuffled words and samples from a character 5-gram model. Each metric distinguishes
real stories from at least one of them.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlxgpt.data.tokenizers.base import END_OF_TEXT, NUL
from mlxgpt.utils.seeds import derive_seed

if TYPE_CHECKING:
    from harper import Linter


@dataclass(frozen=True)
class Metric:
    """A metric of text quality.

    Attributes:
        name: short name, and key in the result of `compute_metrics`.
        better: direction of better values; "like real": close to the value of held-out texts.
        is_fraction: whether values are between 0 and 1 and shown as percentages.
        description: explanation in one line.
    """

    name: str
    better: Literal["higher", "lower", "like real"]
    is_fraction: bool
    description: str


METRICS = (  # in table order
    Metric("complete sentences", "higher", True, "from a capital letter to a period, ! or ?"),
    Metric("complete sentences per story", "like real", False, "median over all samples"),
    Metric(
        "grammar errors per 100 words", "lower", False, "counted by Harper, without spelling errors"
    ),
    Metric("dictionary words", "higher", True, "words that occur in the training text"),
    Metric("distinct 3-grams", "like real", True, "share of the word 3-grams in 1,000 words"),
    Metric("copied 8-grams", "like real", True, "word 8-grams that occur in the training text"),
    Metric("quotes balanced", "higher", True, "samples with quotes in which every quote closes"),
    Metric("names that stay", "higher", True, "names that occur more than once in their sample"),
    Metric("ended", "higher", True, "samples that end before the maximum length"),
)


@dataclass(frozen=True)
class TrainingOverlap:
    """Words and word 8-grams of some texts that also occur in the training text.

    Attributes:
        words: words as returned by `split_words`.
        eight_grams: tuples of eight consecutive words.
    """

    words: frozenset[bytes]
    eight_grams: frozenset[tuple[bytes, ...]]

    @classmethod
    def scan(cls, texts: Iterable[str], pieces: Iterable[str]) -> TrainingOverlap:
        """Scan the training text once for words and 8-grams of `texts`.

        Memory depends only on `texts` and the longest piece.

        Args:
            texts: all texts that will be measured.
            pieces: the training text, split between words.
        """
        word_ids: dict[bytes, int] = {}  # from 1; 0: any word that is not in `texts`
        eight_grams: dict[int, tuple[bytes, ...]] = {}  # by hash
        for text in texts:
            text_words = split_words(text)
            for word in text_words:
                word_ids.setdefault(word, len(word_ids) + 1)
            text_ids = np.array([word_ids[word] for word in text_words], dtype=np.uint64)
            hashes = _hash_eight_grams(text_ids)
            eight_grams.update(zip(hashes.tolist(), _ngrams(text_words, 8), strict=True))

        # A filter on the upper 22 bits quickly rejects most hashes of the training text.
        shift = np.uint64(64 - 22)
        hash_filter = np.zeros(1 << 22, dtype=np.bool_)
        hash_filter[np.array(list(eight_grams), dtype=np.uint64) >> shift] = True

        word_seen = np.zeros(len(word_ids) + 1, dtype=np.bool_)
        seen_hashes: set[int] = set()
        tail = np.zeros(0, dtype=np.uint64)  # the last seven words, for 8-grams across a cut
        for piece in pieces:
            ids = list(map(word_ids.get, split_words(piece), repeat(0)))
            piece_ids = np.array(ids, dtype=np.uint64)
            word_seen[piece_ids] = True
            window = np.concatenate([tail, piece_ids])
            tail = window[-7:]
            hashes = _hash_eight_grams(window)
            hashes = hashes[hash_filter[hashes >> shift]]
            seen_hashes.update(eight_grams.keys() & hashes.tolist())
        return cls(
            frozenset(word for word, word_id in word_ids.items() if word_seen[word_id]),
            frozenset(eight_grams[gram_hash] for gram_hash in seen_hashes),
        )


def compute_metrics(
    texts: Sequence[str], overlap: TrainingOverlap | None, ended: Sequence[bool] | None = None
) -> dict[str, float | None]:
    """Compute all metrics over a set of texts; None for metrics that are not available.

    Args:
        texts: stories, or windows of a text without stories.
        overlap: result of a scan that included these texts; without it two metrics are None.
        ended: for each text, whether it ended before the maximum length.
    """
    words_by_text = [split_words(text) for text in texts]
    all_words = [word for text_words in words_by_text for word in text_words]
    eight_grams = [gram for text_words in words_by_text for gram in _ngrams(text_words, 8)]
    sentences_by_text = [split_sentences(text) for text in texts]
    complete_counts = [sum(map(_is_complete, sentences)) for sentences in sentences_by_text]
    values = (
        _fraction(sum(complete_counts), sum(map(len, sentences_by_text))),
        float(statistics.median(complete_counts)) if texts else None,
        _grammar_errors(texts, len(all_words)),
        None if overlap is None else _overlap_fraction(overlap.words, all_words),
        _distinct_trigrams(all_words),
        None if overlap is None else _overlap_fraction(overlap.eight_grams, eight_grams),
        _balanced_quotes_fraction(texts),
        _recurring_names_fraction(texts),
        None if ended is None else _fraction(sum(ended), len(ended)),
    )
    return dict(zip((metric.name for metric in METRICS), values, strict=True))


def order_preference(
    stories: Sequence[str], log_likelihood: Callable[[Sequence[str]], Sequence[float]], seed: int
) -> float | None:
    """Share of real stories that a model finds more likely than the same sentences in random order.

    0.5 for a model that ignores the order of sentences. Stories with fewer than three distinct
    sentences are skipped; None if no story is left.

    Args:
        log_likelihood: returns the total log-likelihood of each text, in nats; called once.
        seed: seed of the random orders.
    """
    stories = [story.strip() for story in stories if len(set(split_sentences(story))) >= 3]
    if not stories:
        return None
    reordered = []
    for n, story in enumerate(stories):
        random = Random(derive_seed(seed, "sentence order", n)).random
        parts = _SENTENCE_BREAK.split(story)
        permuted = parts.copy()
        while permuted == parts:
            permuted[::2] = _shuffle_stably(parts[::2], random)
        reordered.append("".join(permuted))
    scores = log_likelihood([*stories, *reordered])
    num_stories = len(stories)
    preferred = sum(a > b for a, b in zip(scores[:num_stories], scores[num_stories:], strict=True))
    return preferred / num_stories


def shuffle_words(texts: Sequence[str], seed: int) -> list[str]:
    """Control with real words: shuffle the words of each text, keeping its whitespace."""

    def shuffle_text(n: int, text: str) -> str:
        random = Random(derive_seed(seed, "shuffled words", n)).random
        order = iter(_shuffle_stably(re.findall(r"\S+", text), random))
        return re.sub(r"\S+", lambda _: next(order), text)

    return [shuffle_text(n, text) for n, text in enumerate(texts)]


NGRAM_ORDER = 5  # predicts a character from the previous four


def sample_ngram_texts(training_text: str, lengths: Sequence[int], seed: int) -> list[str]:
    """Control with real letter sequences: sample texts from a character 5-gram model.

    Args:
        training_text: a few megabytes, with `<|endoftext|>` or NUL between documents.
        lengths: maximum length of each text in characters; a text ends earlier if the end of a
            document is sampled.
    """
    next_characters: defaultdict[str, list[str]] = defaultdict(list)  # with repetitions
    context_length = NGRAM_ORDER - 1
    documents = training_text.replace(END_OF_TEXT, NUL).split(NUL)
    for document in filter(None, map(str.strip, documents)):
        padded = NUL * context_length + document + NUL
        for n in range(context_length, len(padded)):
            next_characters[padded[n - context_length : n]].append(padded[n])

    def draw_text(n: int, length: int) -> str:
        random = Random(derive_seed(seed, "n-gram text", n)).random
        text = NUL * context_length
        while len(text) < context_length + length:
            choices = next_characters[text[-context_length:]]
            character = choices[int(random() * len(choices))]
            if character == NUL:
                break
            text += character
        return text[context_length:]

    return [draw_text(n, length) for n, length in enumerate(lengths)]


_LETTER_TABLE = bytes(n if n > 127 or chr(n).isalnum() else ord(" ") for n in range(256))


def split_words(text: str) -> list[bytes]:
    """Split a text into lower-case words in UTF-8, without punctuation; "don't" becomes `dont`.

    Returns bytes, because splitting bytes is several times faster than splitting str.
    """
    for mark in "“”‘…–—":
        text = text.replace(mark, " ")
    return text.replace("’", "").lower().encode().translate(_LETTER_TABLE, b"'").split()


# After . ! ? (but not in `"Hi!" he said`) and at empty lines; verses break lines anywhere.
_SENTENCE_BREAK = re.compile(
    r"""((?<=[.!?])(?<!\b[DM]r\.)(?<!\bMrs\.)\s+|(?<=[.!?]["”')])\s++(?![a-z])|\n\s*\n\s*)"""
)


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, complete or not."""
    return [part for part in _SENTENCE_BREAK.split(text.strip())[::2] if part]


_COMPLETE_SENTENCE = re.compile(r"""["“(]?[A-Z].*[.!?]["”')]?""", re.DOTALL)


def _is_complete(sentence: str) -> bool:
    return _COMPLETE_SENTENCE.fullmatch(sentence) is not None


def _fraction(part: int, total: int) -> float | None:
    return part / total if total else None


def _overlap_fraction(training_items: frozenset[Any], items: Sequence[Any]) -> float | None:
    return _fraction(sum(item in training_items for item in items), len(items))


DISTINCT_WINDOW_WORDS = 1000  # fixed, as the share of distinct n-grams falls with length


def _distinct_trigrams(words: Sequence[bytes]) -> float | None:
    """Share of distinct word 3-grams, averaged over windows of 1,000 words."""
    starts = range(0, len(words) - DISTINCT_WINDOW_WORDS + 1, DISTINCT_WINDOW_WORDS)
    trigram_windows = (
        list(_ngrams(words[start : start + DISTINCT_WINDOW_WORDS], 3)) for start in starts
    )
    fractions = [len(set(trigrams)) / len(trigrams) for trigrams in trigram_windows]
    return statistics.mean(fractions) if fractions else None


# An opening quote comes before a word, a closing quote after one.
_BALANCED_QUOTES = re.compile(
    r"""([^"“”]*(?<![^\s(—-])["“](?=\S)[^"“”]*(?<=\S)["”](?!\w))*[^"“”]*"""
)


def _balanced_quotes_fraction(texts: Sequence[str]) -> float | None:
    quoted_texts = [text for text in texts if re.search('["“”]', text)]
    balanced = sum(_BALANCED_QUOTES.fullmatch(text) is not None for text in quoted_texts)
    return _fraction(balanced, len(quoted_texts))


_NAME_PATTERN = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+")  # within a sentence and a line


def _recurring_names_fraction(texts: Sequence[str]) -> float | None:
    """Share of names used more than once in their text. A name is a word that is capitalized within
    a sentence, and never in lower case in the same text.
    """
    uses = []
    for text in texts:
        text_words = re.findall("[A-Za-z]+", text)
        names = {name for name in _NAME_PATTERN.findall(text) if name.lower() not in text_words}
        uses += [text_words.count(name) for name in names]
    return _fraction(sum(count > 1 for count in uses), len(uses))


def _grammar_errors(texts: Sequence[str], word_count: int) -> float | None:
    linter = _load_linter()
    if linter is None or not word_count:
        return None
    errors = sum(len(linter.lint(text, language="plaintext")) for text in texts)
    return 100 * errors / word_count


# Harper's other groups check style, spelling or other metrics, and take most of its time.
_GRAMMAR_GROUPS = {"Grammar and Agreement", "Pronouns and Possession"}
_EXTRA_GRAMMAR_RULES = {"AnA", "RepeatedWords"}  # grammar rules in other groups


@functools.cache
def _load_linter() -> Linter | None:
    """Load the grammar checker Harper (takes 1 s); None if it is not installed."""
    try:
        from harper import Linter
    except ImportError:
        return None
    linter = Linter()
    groups = [setting["Group"] for setting in linter.get_structured_lint_config()["settings"]]
    rules = [
        rule["Bool"]["name"]
        for group in groups
        if group["label"] in _GRAMMAR_GROUPS
        for rule in group["child"]["settings"]
    ]
    enabled_rules = _EXTRA_GRAMMAR_RULES.union(rules)
    config = linter.get_default_lint_config()
    linter.set_lint_config({rule: on and rule in enabled_rules for rule, on in config.items()})
    return linter


def _ngrams(words: Sequence[bytes], n: int) -> Iterator[tuple[bytes, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _hash_eight_grams(word_ids: np.ndarray) -> np.ndarray:
    """64-bit hash of each run of eight words, long enough to make collisions unlikely."""
    count = max(0, len(word_ids) - 7)
    hashes = np.zeros(count, dtype=np.uint64)
    for start in range(8):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + word_ids[start : start + count]
    return hashes


def _shuffle_stably(items: Sequence[str], random: Callable[[], float]) -> list[str]:
    # Not random.shuffle: Python guarantees stability across versions for random() only.
    return sorted(items, key=lambda _: random())
