"""nanoGPT's meta.pkl, the vocabulary beside arrays of characters: read, never run.

A pickle is a little program that may call any function. Here its opcodes are split by
`pickletools`, which runs none, and carried out by a machine that knows whole numbers, texts, lists
and dictionaries only. Knows nothing of arrays.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from mlxgpt import files
from mlxgpt.corpus.tokenizer import CharTokenizer
from mlxgpt.errors import UserError

# Room for all that nanoGPT's two-byte ids can tell apart, in the wordiest protocol: 54 bytes and 8
# opcodes a character. An opcode makes some hundred bytes of memory at most.
IDS = 1 << 16
LARGEST = 64 * IDS  # bytes
OPCODES = 9 * IDS
PROTOCOL = 5

NUMBERS = {"INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"}
TEXTS = {"UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
GETS = {"GET", "BINGET", "LONG_BINGET"}

REMEDY = "let nanoGPT's prepare.py write it again, or prepare the text itself: --source FILE."


def characters(path: Path) -> str:
    """The vocabulary of a meta.pkl as nanoGPT's data/shakespeare_char/prepare.py writes it,
    {"vocab_size": int, "itos": {int: str}, "stoi": {str: int}}, in the order of its ids.

    Args:
        path: the file, a pickle of protocol 0 to 5.

    Returns:
        One character for each id from 0 on.

    Raises:
        UserError: if it cannot be read, asks for anything but such values, or its parts do not
            agree.
    """
    if not files.is_file(path):  # opening a pipe may take for ever
        raise UserError(f"{path} is no file", REMEDY)
    try:
        content = files.read_small_bytes(path, LARGEST)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes, in texts that are refused anyway
            return _agreed(_Machine().run(content))
    except ValueError as error:
        raise UserError(f"{path} is no vocabulary of characters: {error}", REMEDY) from error


def tokenizer(path: Path) -> CharTokenizer:
    """The tokenizer of a meta.pkl, its ids in any order; see `characters`."""
    return CharTokenizer.from_ids({c: id for id, c in enumerate(characters(path))})


def _agreed(meta: Any) -> str:
    if type(meta) is not dict:
        raise ValueError("it is no dictionary")
    size, itos, stoi = (meta.get(name) for name in ("vocab_size", "itos", "stoi"))
    if type(size) is not int or type(itos) is not dict or type(stoi) is not dict:
        raise ValueError("it has not vocab_size, itos and stoi")
    if not 0 < size <= IDS or not len(itos) == len(stoi) == size:
        raise ValueError("vocab_size, itos and stoi are not of one size")
    found = [itos.get(id) for id in range(size)]
    for id, one in enumerate(found):
        if type(one) is not str or len(one) != 1 or "\ud800" <= one <= "\udfff":
            raise ValueError(f"id {id} is no single character")
        if stoi.get(one) != id:
            raise ValueError(f"itos and stoi do not agree on id {id}")
    return "".join(cast(list[str], found))


class _Machine:
    """Carries out the opcodes of one pickle; any other error than ValueError is a mistake of ours.

    Lists and dictionaries hold each other one deep at most: `_holding` are those (by id()) that
    hold others, `_held` those that others hold, and none is both. Nothing is ever taken out of
    them, so that none goes away and leaves its id() to another.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._holding: set[int] = set()
        self._held: set[int] = set()
        self._simple: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._marks.append(len(self._stack)),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_DICT": lambda: self._stack.append({}),
            "LIST": lambda: self._push_filled([]),
            "DICT": lambda: self._push_filled({}),
            "APPEND": lambda: self._fill(self._pop(1)),
            "APPENDS": lambda: self._fill(self._pop_to_mark()),
            "SETITEM": lambda: self._fill(self._pop(2)),
            "SETITEMS": lambda: self._fill(self._pop_to_mark()),
            "MEMOIZE": lambda: self._remember(len(self._memo)),
        }

    def run(self, content: bytes) -> Any:
        """The value that a pickle describes.

        Raises:
            ValueError: if it is damaged, too long, or asks for anything else.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count >= OPCODES:
                raise ValueError("it is too long")
            if opcode.name == "STOP":
                (value,) = self._pop(1)
                return value
            self._do(opcode.name, argument)
        raise ValueError("it has no end")

    def _do(self, name: str, argument: Any) -> None:
        if name in self._simple:
            self._simple[name]()
        elif name in NUMBERS or name in TEXTS:
            if isinstance(argument, bool):  # protocol 0 writes them as numbers
                raise ValueError("it holds more than numbers and texts (a bool)")
            self._stack.append(argument)
        elif name in PUTS:
            self._remember(argument)
        elif name in GETS:
            if argument not in self._memo:
                raise ValueError("it is damaged")
            self._stack.append(self._memo[argument])
        elif name == "PROTO":
            if argument > PROTOCOL:
                raise ValueError(f"its protocol is {argument}")
        elif name != "FRAME":  # which only says how many bytes to read at once
            raise ValueError(f"it holds more than numbers and texts ({name}), and could run code")

    def _pop(self, count: int) -> list[Any]:
        """The topmost values, none from below the last mark."""
        bottom = self._marks[-1] if self._marks else 0
        if len(self._stack) - count < bottom:
            raise ValueError("it is damaged")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("it is damaged")
        at = self._marks.pop()
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def _remember(self, place: int) -> None:
        (value,) = self._pop(1)
        self._stack.append(value)
        self._memo[place] = value

    def _push_filled(self, container: list[Any] | dict[Any, Any]) -> None:
        values = self._pop_to_mark()
        self._stack.append(container)
        self._fill(values)

    def _fill(self, values: list[Any]) -> None:
        """Put values into the list or dictionary below them, which stays where it is."""
        (container,) = self._pop(1)
        self._stack.append(container)
        for value in values:
            self._hold(container, value)
        if type(container) is list:
            container.extend(values)
            return
        if type(container) is not dict or len(values) % 2:
            raise ValueError("it is damaged")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (int, str) or key in container:
                raise ValueError("a key of it is no number or text, or comes twice")
            container[key] = value

    def _hold(self, container: Any, value: Any) -> None:
        if type(value) not in (list, dict):
            return
        if container is value or id(container) in self._held or id(value) in self._holding:
            raise ValueError("it is nested too deeply")
        self._holding.add(id(container))
        self._held.add(id(value))
