"""The reader of nanoGPT's meta.pkl, tested against Python's pickle."""

from __future__ import annotations

import os
import pickle
import pickletools
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxgpt.data import meta_pickle
from mlxgpt.utils.errors import UserError
from tests.helpers.hostile_files import nest_lists

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_vocabulary(characters: str) -> dict[str, Any]:
    """Make the vocabulary dict of nanoGPT's data/shakespeare_char/prepare.py."""
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: id for id, character in enumerate(characters)},
    }


def read_vocabulary(folder: Path, content: bytes) -> str:
    path = folder / "meta.pkl"
    path.write_bytes(content)
    return meta_pickle.read_char_vocab(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@SHARED
@given(st.sets(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300))
def test_vocabulary_round_trip(tmp_path: Path, protocol: int, characters: set[str]) -> None:
    text = "".join(sorted(characters))
    content = pickle.dumps(make_vocabulary(text), protocol)
    assert read_vocabulary(tmp_path, content) == text
    assert read_vocabulary(tmp_path, pickletools.optimize(content)) == text


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_vocabulary_from_the_pure_python_pickler(tmp_path: Path, protocol: int) -> None:
    """The pure-Python pickler writes other opcodes than the C one."""
    pickler: Any = pickle
    content = pickler._dumps(make_vocabulary("\n !aé🙂"), protocol)
    assert read_vocabulary(tmp_path, content) == "\n !aé🙂"


@pytest.mark.parametrize("protocol", [0, 4])
def test_largest_vocabulary_is_read_in_bounded_memory(tmp_path: Path, protocol: int) -> None:
    text = "".join(chr(code) for code in range(0x10000, 0x10000 + meta_pickle.MAX_IDS))
    content = pickle.dumps(make_vocabulary(text), protocol)
    tracemalloc.start()
    assert read_vocabulary(tmp_path, content) == text
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_extra_keys_are_ignored(tmp_path: Path, protocol: int) -> None:
    extra = {"chars": ["a", "b"], "sizes": {"train": 1 << 70, "val": -3}, 7: []}
    content = pickle.dumps({**extra, **make_vocabulary("ab")}, protocol)
    assert read_vocabulary(tmp_path, content) == "ab"


class Trap:
    """Its pickle creates a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickle_that_runs_code_is_refused(home: Path, protocol: int) -> None:
    content = pickle.dumps({**make_vocabulary("ab"), "more": Trap()}, protocol)
    with pytest.raises(UserError, match=r"more than numbers and strings \(.+\), and could run"):
        read_vocabulary(home, content)
    assert not Path("sprung").exists()
    pickle.loads(content)
    assert Path("sprung").exists(), "and it would have"


DANGEROUS = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
DANGEROUS |= {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
ARGUMENTS: dict[str, bytes] = {
    "GLOBAL": b"os\nmkdir\n",
    "INST": b"os\nmkdir\n",
    "PERSID": b"x\n",
    "STRING": b"'\\q'\n",
    "FLOAT": b"1.5\n",
}


@pytest.mark.parametrize("opcode", pickletools.opcodes, ids=lambda opcode: opcode.name)
def test_opcodes_that_are_not_allowed_are_refused(tmp_path: Path, opcode: Any) -> None:
    """The opcode is inserted at the start of an otherwise valid pickle."""
    assert not DANGEROUS & meta_pickle.ALLOWED_OPCODES
    valid = pickle.dumps(make_vocabulary("ab"), 4)
    argument = ARGUMENTS.get(opcode.name, b"\0" * 8 if opcode.arg else b"")
    content = opcode.code.encode("latin-1") + argument + valid
    if opcode.name in meta_pickle.ALLOWED_OPCODES:
        return
    with pytest.raises(UserError, match=rf"numbers and strings \({opcode.name}\), and could run"):
        read_vocabulary(tmp_path, content)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unpickler_finds_no_function_even_if_all_opcodes_are_allowed(
    home: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        meta_pickle, "ALLOWED_OPCODES", {opcode.name for opcode in pickletools.opcodes}
    )
    with pytest.raises(UserError, match=r"damaged .*mkdir"):
        read_vocabulary(home, pickle.dumps({**make_vocabulary("ab"), "more": Trap()}, protocol))
    assert not Path("sprung").exists()


def without_key(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != name}


VALID_VOCABULARY = make_vocabulary("abc")


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ([1, 2], "it is not a dictionary"),
        ({}, "lacks vocab_size, itos or stoi"),
        (without_key(VALID_VOCABULARY, "vocab_size"), "lacks vocab_size, itos or stoi"),
        (without_key(VALID_VOCABULARY, "itos"), "lacks vocab_size, itos or stoi"),
        (without_key(VALID_VOCABULARY, "stoi"), "lacks vocab_size, itos or stoi"),
        ({**VALID_VOCABULARY, "vocab_size": "3"}, "lacks vocab_size, itos or stoi"),
        ({**VALID_VOCABULARY, "itos": ["a", "b", "c"]}, "lacks vocab_size, itos or stoi"),
        ({**VALID_VOCABULARY, "vocab_size": 4}, "differ in size"),
        ({**VALID_VOCABULARY, "vocab_size": 0}, "differ in size"),
        ({"vocab_size": 0, "itos": {}, "stoi": {}}, "differ in size"),
        ({**VALID_VOCABULARY, "itos": {0: "a", 1: "b"}}, "differ in size"),
        ({**VALID_VOCABULARY, "stoi": {**VALID_VOCABULARY["stoi"], "d": 3}}, "differ in size"),
        ({**VALID_VOCABULARY, "itos": {1: "a", 2: "b", 3: "c"}}, "id 0 is not a single character"),
        ({**VALID_VOCABULARY, "itos": {0: "a", 1: "bb", 2: "c"}}, "id 1 is not a single character"),
        ({**VALID_VOCABULARY, "itos": {0: "a", 1: "", 2: "c"}}, "id 1 is not a single character"),
        ({**VALID_VOCABULARY, "itos": {0: "a", 1: 98, 2: "c"}}, "id 1 is not a single character"),
        (
            {**VALID_VOCABULARY, "itos": {0: "a", 1: "\ud800", 2: "c"}},
            "id 1 is not a single character",
        ),
        ({**VALID_VOCABULARY, "itos": {0: "a", 1: "a", 2: "c"}}, "disagree on id 1"),
        ({**VALID_VOCABULARY, "stoi": {"a": 0, "b": 2, "c": 1}}, "disagree on id 1"),
        ({**VALID_VOCABULARY, "stoi": {"a": 0, "b": "1", "c": 2}}, "disagree on id 1"),
        ({**VALID_VOCABULARY, "vocab_size": True}, r"a bool|NEWTRUE"),
        ({**VALID_VOCABULARY, "more": nest_lists(meta_pickle.MAX_CONTAINERS)}, "nested too deeply"),
        ({**VALID_VOCABULARY, "more": nest_lists(200)}, "nested too deeply"),
        ({**VALID_VOCABULARY, "more": (1, 2)}, r"and could run code"),
        ({**VALID_VOCABULARY, "more": None}, r"NONE"),
        ({**VALID_VOCABULARY, "more": 1.5}, r"FLOAT"),
        ({**VALID_VOCABULARY, "more": b"bytes"}, r"GLOBAL|BINBYTES"),
    ],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_inconsistent_vocabulary_is_refused(
    tmp_path: Path, protocol: int, tree: Any, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        read_vocabulary(tmp_path, pickle.dumps(tree, protocol))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "exhausted"),
        (b".", "damaged"),
        (b"\x80\x06}.", "damaged .*protocol: 6"),
        (b"h\x00.", "damaged"),  # GET without PUT
        (b"a.", "damaged"),
        (b"u.", "damaged"),
        (b"(u.", "damaged"),
        (b"](K\x01a.", "damaged"),  # pops below the mark
        (b"K\x01K\x02a.", "damaged"),  # appends to a number
        (b"}(K\x01u.", "damaged"),  # a key without a value
        (b"}]K\x01s.", "damaged .*unhashable"),  # a list as a key
        (b"}K\x01K\x02sK\x01K\x02s.", "lacks vocab_size"),  # a duplicate key
        (b"]q\x00h\x00a.", "not a dictionary"),  # a list that contains itself
        (b"]q\x00]q\x01h\x00ah\x00h\x01a.", "not a dictionary"),  # lists in each other
        (b"}U\x01a.", "could run code"),
        (b"}r\xff\xff\xff\x7f.", "damaged\n"),  # a memo of 16 GB
        (b"}p2000000000\n.", "damaged\n"),
        (b"}p-1\n.", "damaged\n"),
        (b"\x8d" + b"\xff" * 8 + b"x.", "byte count"),
        (b"\x8a\x09" + b"\xff" * 9 + b".", "not a dictionary"),
        (b"I" + b"9" * 5000 + b"\n.", "digits"),
        (b"(" * (1 << 20) + b".", "too long"),
        (b"]" * (1 << 22), "nested too deeply"),
        (b"(" * (1 << 22), "too long"),
        (b"]" + b"\x94" * (1 << 21), "too long"),
        (b"]" * (1 << 23), "larger than"),
    ],
)
def test_damaged_pickle_is_refused_in_bounded_memory(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    (tmp_path / "meta.pkl").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=problem) as excinfo:
        meta_pickle.read_char_vocab(tmp_path / "meta.pkl")
    assert tracemalloc.get_traced_memory()[1] < 96 << 20
    tracemalloc.stop()
    assert "\n" not in excinfo.value.problem
    assert len(excinfo.value.problem) < 400 + len(str(tmp_path))


def test_path_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "missing"):
        with pytest.raises(UserError, match=f"{name} is not a file"):
            meta_pickle.read_char_vocab(tmp_path / name)
