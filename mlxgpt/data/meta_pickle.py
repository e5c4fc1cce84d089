"""Safely read nanoGPT's meta.pkl, the vocabulary of a character-level dataset.

Unpickling can call any function. So `pickletools` first lists the opcodes without executing them,
and only pickles of numbers, strings, lists and dicts are loaded, with an unpickler that rejects all
functions and classes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from pathlib import Path
from typing import Any, NoReturn, cast

from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

MAX_IDS = 1 << 16  # ids that nanoGPT's uint16 can hold
MAX_BYTES = 64 * MAX_IDS  # 54 bytes per character in the longest protocol, rounded up

META_PICKLE_REMEDY = "run nanoGPT's prepare.py again, or prepare the original text: --source FILE."


def read_char_vocab(path: Path) -> str:
    """Read the vocabulary of a meta.pkl written by nanoGPT's data/shakespeare_char/prepare.py:
    {"vocab_size": int, "itos": {int: str}, "stoi": {str: int}}.

    Args:
        path: the file, a pickle of protocol 0 to 5.

    Returns:
        The characters, in order of their ids.

    Raises:
        UserError: if it cannot be read, contains other types, or is inconsistent.
    """
    if not files.is_file(path):  # opening a pipe could block
        raise UserError(f"{path} is not a file", META_PICKLE_REMEDY)
    try:
        content = files.read_small_bytes(path, MAX_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes, in files that are rejected anyway
            _check_opcodes(content)
            return _check_vocabulary(_unpickle(content))
    except ValueError as error:
        raise UserError(
            f"{path} is not a character vocabulary: {error}", META_PICKLE_REMEDY
        ) from error


def load_char_tokenizer(path: Path) -> CharTokenizer:
    """Load the character tokenizer of a meta.pkl, with the same ids; see `read_char_vocab`."""
    return CharTokenizer.from_ids({c: id for id, c in enumerate(read_char_vocab(path))})


class _RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that rejects all functions and classes, so that it cannot run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name}")


MAX_OPCODES = 9 * MAX_IDS  # 8 opcodes per character in the longest protocol, rounded up
MAX_CONTAINERS = 16  # nanoGPT's own has 3

NUMBER_OPCODES = {"INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"}
STRING_OPCODES = {"UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"}
# No tuples or sets: hashing nested ones can take exponential time, or overflow the stack.
CONTAINER_OPCODES = {"EMPTY_LIST", "LIST", "EMPTY_DICT", "DICT"}
ITEM_OPCODES = {"APPEND", "APPENDS", "SETITEM", "SETITEMS"}
MEMO_PUT_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}  # at an index that the pickle chooses
MEMO_OPCODES = MEMO_PUT_OPCODES | {"MEMOIZE", "GET", "BINGET", "LONG_BINGET"}
FRAMING_OPCODES = {"PROTO", "FRAME", "MARK", "STOP"}
ALLOWED_OPCODES = (
    NUMBER_OPCODES
    | STRING_OPCODES
    | CONTAINER_OPCODES
    | ITEM_OPCODES
    | MEMO_OPCODES
    | FRAMING_OPCODES
)


def _check_opcodes(content: bytes) -> None:
    """Reject a pickle with other opcodes, too many opcodes, or a memo larger than the pickle.

    Raises:
        ValueError: if it is rejected or damaged.
    """
    n_containers = 0
    for index, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in ALLOWED_OPCODES:
            raise ValueError(
                f"it contains more than numbers and strings ({opcode.name}), and could run code"
            )
        if isinstance(argument, bool):  # protocol 0 encodes bools as integers
            raise ValueError("it contains more than numbers and strings (a bool)")
        n_containers += opcode.name in CONTAINER_OPCODES
        if n_containers > MAX_CONTAINERS:
            raise ValueError("it is nested too deeply, or contains too many lists")
        # The memo is an array as long as its largest index.
        if opcode.name in MEMO_PUT_OPCODES and not 0 <= cast(int, argument) <= index:
            raise ValueError("it is damaged")
        if index >= MAX_OPCODES:
            raise ValueError("it is too long")


def _unpickle(content: bytes) -> Any:
    try:
        return _RestrictedUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # pickle does not document all its errors
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def _check_vocabulary(meta: Any) -> str:
    """Characters of a loaded meta.pkl, in order of ids; raises ValueError if inconsistent."""
    if type(meta) is not dict:
        raise ValueError("it is not a dictionary")
    size, itos, stoi = (meta.get(name) for name in ("vocab_size", "itos", "stoi"))
    if type(size) is not int or type(itos) is not dict or type(stoi) is not dict:
        raise ValueError("it lacks vocab_size, itos or stoi")
    if not 0 < size <= MAX_IDS or not len(itos) == len(stoi) == size:
        raise ValueError("vocab_size, itos and stoi differ in size")
    vocabulary = [itos.get(id) for id in range(size)]
    for id, character in enumerate(vocabulary):
        if type(character) is not str or len(character) != 1 or "\ud800" <= character <= "\udfff":
            raise ValueError(f"id {id} is not a single character")
        if stoi.get(character) != id:
            raise ValueError(f"itos and stoi disagree on id {id}")
    return "".join(cast(list[str], vocabulary))
