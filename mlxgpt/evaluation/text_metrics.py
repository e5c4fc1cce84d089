"""Whether texts read like real ones: what can be counted, and two controls that must count worse.

Each metric tells real stories from at least one control, words in random order or texts of a
character 5-gram model; what tells them from neither says nothing about a text, and is not here.
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

from mlxgpt.data.tokenizers.char import END_OF_TEXT, NUL
from mlxgpt.utils.seeds import derive

if TYPE_CHECKING:
    from harper import Linter

DISTINCT_WORDS = 1000  # over which n-grams are counted; the more words, the fewer are distinct
ORDER = 5  # of the character n-gram model: a character given the four before it


@dataclass(frozen=True)
class Metric:
    """One thing that is measured.

    Attributes:
        name: short, and the key in what `measure` returns.
        better: which values are better; "like real" where both less and more are worse.
        share: whether it lies between 0 and 1 and reads best as a percentage.
        description: one line.
    """

    name: str
    better: Literal["higher", "lower", "like real"]
    share: bool
    description: str


METRICS = (  # in the order of a table
    Metric("complete sentences", "higher", True, "from a capital letter to a full stop, ! or ?"),
    Metric("complete sentences per story", "like real", False, "the median over all texts"),
    Metric("grammar errors per 100 words", "lower", False, "found by Harper; spelling is not"),
    Metric("dictionary words", "higher", True, "words that occur in the training text"),
    Metric("distinct 3-grams", "like real", True, "of the word 3-grams of a thousand words"),
    Metric("copied 8-grams", "like real", True, "word 8-grams that occur in the training text"),
    Metric(
        "quotes balanced", "higher", True, "of the texts with quotes: all open and close in turn"
    ),
    Metric("names that stay", "higher", True, "names that their text uses more than once"),
    Metric("ended", "higher", True, "texts that end by themselves, not at the greatest length"),
)


@dataclass(frozen=True)
class Known:
    """What of some texts occurs in the training text.

    Attributes:
        words: those that occur, as `words` gives them.
        eight_grams: the runs of eight words that occur.
    """

    words: frozenset[bytes]
    eight_grams: frozenset[tuple[bytes, ...]]

    @classmethod
    def scan(cls, texts: Iterable[str], pieces: Iterable[str]) -> Known:
        """Read the training text once.

        Memory grows with the texts and the longest piece only.

        Args:
            texts: all that will be measured; of other texts nothing will be known.
            pieces: the training text, cut between words.
        """
        numbers: dict[bytes, int] = {}  # 0 is every word that the texts do not have
        eight_grams: dict[int, tuple[bytes, ...]] = {}  # by hash
        for text in texts:
            found = words(text)
            for word in found:
                numbers.setdefault(word, len(numbers) + 1)
            hashes = _hashes(np.array([numbers[word] for word in found], dtype=np.uint64))
            eight_grams.update(zip(hashes.tolist(), _grams(found, 8), strict=True))

        # Most of the training text's hashes are none of these; their upper bits say so at once.
        shift = np.uint64(64 - 22)
        possible = np.zeros(1 << 22, dtype=np.bool_)
        possible[np.array(list(eight_grams), dtype=np.uint64) >> shift] = True

        seen_words = np.zeros(len(numbers) + 1, dtype=np.bool_)
        seen: set[int] = set()
        rest = np.zeros(0, dtype=np.uint64)  # the last seven words, for 8-grams across a cut
        for piece in pieces:
            here = np.array(list(map(numbers.get, words(piece), repeat(0))), dtype=np.uint64)
            seen_words[here] = True
            run = np.concatenate([rest, here])
            rest = run[-7:]
            hashes = _hashes(run)
            hashes = hashes[possible[hashes >> shift]]
            seen.update(eight_grams.keys() & hashes.tolist())
        return cls(
            frozenset(word for word, number in numbers.items() if seen_words[number]),
            frozenset(eight_grams[one] for one in seen),
        )


def measure(
    texts: Sequence[str], known: Known | None, ended: Sequence[bool] | None = None
) -> dict[str, float | None]:
    """Each metric's value over all texts together; None where it cannot be said.

    Args:
        texts: stories, or windows of a text that has none.
        known: from a scan that had these texts; without it two metrics are None.
        ended: which texts ended by themselves.
    """
    found = [words(text) for text in texts]
    together = [word for one in found for word in one]
    eight_grams = [gram for one in found for gram in _grams(one, 8)]
    split = [sentences(text) for text in texts]
    complete = [sum(map(_is_complete, some)) for some in split]
    values = (
        _share(sum(complete), sum(map(len, split))),
        float(statistics.median(complete)) if texts else None,
        _grammar_errors(texts, len(together)),
        None if known is None else _known(known.words, together),
        _distinct(together),
        None if known is None else _known(known.eight_grams, eight_grams),
        _quotes_balanced(texts),
        _names_that_stay(texts),
        None if ended is None else _share(sum(ended), len(ended)),
    )
    return dict(zip((metric.name for metric in METRICS), values, strict=True))


def order_preference(
    stories: Sequence[str], log_likelihood: Callable[[Sequence[str]], Sequence[float]], seed: int
) -> float | None:
    """How often a model finds a real story likelier than its sentences in another order.

    A model that sees no connection between sentences comes to a half. Stories of fewer than three
    different sentences are left out; None if there is no other.

    Args:
        log_likelihood: of each text, in nats, summed over it. It is called once.
        seed: of the other orders.
    """
    stories = [story.strip() for story in stories if len(set(sentences(story))) >= 3]
    if not stories:
        return None
    others = []
    for n, story in enumerate(stories):
        draw = Random(derive(seed, "sentence order", n)).random
        parts = _GAP.split(story)
        other = parts.copy()
        while other == parts:
            other[::2] = _shuffled(parts[::2], draw)
        others.append("".join(other))
    scores = log_likelihood([*stories, *others])
    count = len(stories)
    preferred = sum(a > b for a, b in zip(scores[:count], scores[count:], strict=True))
    return preferred / count


def shuffled_words(texts: Sequence[str], seed: int) -> list[str]:
    """The control that has the right words: each text's in random order, its white space kept."""

    def shuffle(n: int, text: str) -> str:
        draw = Random(derive(seed, "shuffled words", n)).random
        order = iter(_shuffled(re.findall(r"\S+", text), draw))
        return re.sub(r"\S+", lambda _: next(order), text)

    return [shuffle(n, text) for n, text in enumerate(texts)]


def ngram_texts(training: str, lengths: Sequence[int], seed: int) -> list[str]:
    """The control that has the right letters: texts of a character 5-gram model.

    Args:
        training: a few megabytes; `<|endoftext|>`, or a NUL, stands between documents.
        lengths: one text is drawn for each. It ends where a document would, and is then shorter,
            or else at this many characters.
    """
    after: defaultdict[str, list[str]] = defaultdict(list)  # each as often as it occurs
    size = ORDER - 1
    for document in filter(None, map(str.strip, training.replace(END_OF_TEXT, NUL).split(NUL))):
        padded = NUL * size + document + NUL
        for n in range(size, len(padded)):
            after[padded[n - size : n]].append(padded[n])

    def draw_text(n: int, length: int) -> str:
        draw = Random(derive(seed, "n-gram text", n)).random
        text = NUL * size
        while len(text) < size + length:
            choices = after[text[-size:]]
            character = choices[int(draw() * len(choices))]
            if character == NUL:
                break
            text += character
        return text[size:]

    return [draw_text(n, length) for n, length in enumerate(lengths)]


_LETTERS = bytes(n if n > 127 or chr(n).isalnum() else ord(" ") for n in range(256))


def words(text: str) -> list[bytes]:
    """In lower case and UTF-8, without punctuation; "don't" is `dont`.

    Bytes, since splitting gigabytes of them is several times as fast.
    """
    for mark in "“”‘…–—":
        text = text.replace(mark, " ")
    return text.replace("’", "").lower().encode().translate(_LETTERS, b"'").split()


# Between sentences: after . ! or ?, but after a closing quote not before `he said`. A line's end
# is none, since verses have it in the middle of a sentence; an empty line is one.
_GAP = re.compile(
    r"""((?<=[.!?])(?<!\b[DM]r\.)(?<!\bMrs\.)\s+|(?<=[.!?]["”')])\s++(?![a-z])|\n\s*\n\s*)"""
)
_COMPLETE = re.compile(r"""["“(]?[A-Z].*[.!?]["”')]?""", re.DOTALL)
# An opening mark stands before a word, a closing one after it.
_BALANCED = re.compile(r"""([^"“”]*(?<![^\s(—-])["“](?=\S)[^"“”]*(?<=\S)["”](?!\w))*[^"“”]*""")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+")  # within a sentence and a line


def sentences(text: str) -> list[str]:
    """The text's sentences, complete or not."""
    return [part for part in _GAP.split(text.strip())[::2] if part]


def _is_complete(sentence: str) -> bool:
    return _COMPLETE.fullmatch(sentence) is not None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _known(known: frozenset[Any], found: Sequence[Any]) -> float | None:
    return _share(sum(one in known for one in found), len(found))


def _distinct(found: Sequence[bytes]) -> float | None:
    """The mean over each thousand words, so that more texts do not look more repetitive."""
    starts = range(0, len(found) - DISTINCT_WORDS + 1, DISTINCT_WORDS)
    runs = (list(_grams(found[start : start + DISTINCT_WORDS], 3)) for start in starts)
    shares = [len(set(run)) / len(run) for run in runs]
    return statistics.mean(shares) if shares else None


def _quotes_balanced(texts: Sequence[str]) -> float | None:
    quoting = [text for text in texts if re.search('["“”]', text)]
    return _share(sum(_BALANCED.fullmatch(text) is not None for text in quoting), len(quoting))


def _names_that_stay(texts: Sequence[str]) -> float | None:
    """A name has a capital within a sentence, and its text never has it without."""
    uses = []
    for text in texts:
        found = re.findall("[A-Za-z]+", text)
        names = {name for name in _NAME.findall(text) if name.lower() not in found}
        uses += [found.count(name) for name in names]
    return _share(sum(count > 1 for count in uses), len(uses))


def _grammar_errors(texts: Sequence[str], count: int) -> float | None:
    linter = _linter()
    if linter is None or not count:
        return None
    errors = sum(len(linter.lint(text, language="plaintext")) for text in texts)
    return 100 * errors / count


# Harper's other rules are about taste, or spelling (it does not know every name), or what other
# metrics say, and take most of its time.
_GRAMMAR = {"Grammar and Agreement", "Pronouns and Possession"}
_MORE_GRAMMAR = {"AnA", "RepeatedWords"}  # in groups that are not all grammar


@functools.cache
def _linter() -> Linter | None:
    """Harper, which takes a second to load; None if it is not installed."""
    try:
        from harper import Linter
    except ImportError:
        return None
    linter = Linter()
    groups = [one["Group"] for one in linter.get_structured_lint_config()["settings"]]
    rules = [
        rule["Bool"]["name"]
        for group in groups
        if group["label"] in _GRAMMAR
        for rule in group["child"]["settings"]
    ]
    on = _MORE_GRAMMAR.union(rules)
    default = linter.get_default_lint_config()
    linter.set_lint_config({rule: usual and rule in on for rule, usual in default.items()})
    return linter


def _grams(found: Sequence[bytes], n: int) -> Iterator[tuple[bytes, ...]]:
    return zip(*(found[start:] for start in range(n)), strict=False)


def _hashes(numbers: np.ndarray) -> np.ndarray:
    """Of each run of eight: 64 bits, so that no two of the texts' and the training's collide."""
    count = max(0, len(numbers) - 7)
    hashes = np.zeros(count, dtype=np.uint64)
    for start in range(8):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + numbers[start : start + count]
    return hashes


def _shuffled(items: Sequence[str], draw: Callable[[], float]) -> list[str]:
    # Not random.shuffle: of Python's generator only random() stays the same between versions.
    return sorted(items, key=lambda _: draw())
