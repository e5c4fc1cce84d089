"""Files as somebody might write them who means no good, or as chance might: made from good ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),  # where, as a share of the length
        st.sampled_from(["replace", "insert", "cut", "end"]),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([b"\xff" * 8, b"[" * 5000, b"\0" * 8, b"{}", b'"', b"-1", b"9" * 30]),
        ),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """Some bytes of a file replaced, inserted, or cut out; or its end cut off."""
    for share, kind, new in edits:
        at = int(share * len(content))
        if kind == "replace":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        elif kind == "cut":
            content = content[:at] + content[at + len(new) :]
        else:
            content = content[:at]
    return content


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [
            -1,
            0,
            1 << 31,
            1 << 63,
            1 << 64,
            10**400,
            1e300,
            "",
            ".",
            "..",
            "../../etc/passwd",
            "/etc/passwd",
            "a\0b",
            "\ud800",
            "x" * 100_000,
            [],
            {},
            [[1, 2]],
            [["a", "b"]] * 3,
            {"a": 1},
            "<u2",
            "<u4",
            "O",
            nested(50),
            nested(900),
        ]
    ),
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 30), st.sampled_from(["set", "drop", "add", "repeat"]), VALUES),
    min_size=1,
    max_size=3,
)


def changed(tree: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """A tree of JSON with a few of its nodes set to another value, dropped, or added to."""
    root = [copy.deepcopy(tree)]
    for number, kind, value in changes:
        value = copy.deepcopy(value)  # the same one comes again in other examples
        places = list(_places(root))
        owner, key = places[number % len(places)]
        if kind == "drop" and len(places) > 1 and owner is not root:
            del owner[key]
        elif kind == "add" and isinstance(owner[key], dict):
            owner[key][str(number)] = value
        elif kind == "add" and isinstance(owner[key], list):
            owner[key].append(value)
        elif kind == "repeat" and isinstance(owner[key], list):
            owner[key].extend(owner[key][:1000])
        else:
            owner[key] = value
    return root[0]


def _places(owner: Any) -> Any:
    pairs = owner.items() if isinstance(owner, dict) else enumerate(owner)
    for key, value in list(pairs):
        yield owner, key
        if isinstance(value, (dict, list)) and len(value) < 1000:
            yield from _shallow(value)


def _shallow(value: Any, depth: int = 0) -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, (dict, list)) and depth < 5:
            yield from _shallow(inner, depth + 1)


def as_json(tree: Any, seal: Callable[[dict], str] | None = None) -> str:
    """A tree as text, with a fitting seal where it can have one."""
    try:
        if seal and isinstance(tree, dict):
            return seal({key: value for key, value in tree.items() if key != "seal"})
        return json.dumps(tree)
    except (RecursionError, ValueError, TypeError):
        return "[" * 100_000
