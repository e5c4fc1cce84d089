"""Malicious or corrupted files, derived from valid ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

BYTE_EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),  # position as a fraction of the length
        st.sampled_from(["replace", "insert", "cut", "end"]),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([b"\xff" * 8, b"[" * 5000, b"\0" * 8, b"{}", b'"', b"-1", b"9" * 30]),
        ),
    ),
    min_size=1,
    max_size=4,
)


def apply_edits(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """Replace, insert or cut bytes, or truncate the file."""
    for position, kind, inserted in edits:
        offset = int(position * len(content))
        if kind == "replace":
            content = content[:offset] + inserted + content[offset + len(inserted) :]
        elif kind == "insert":
            content = content[:offset] + inserted + content[offset:]
        elif kind == "cut":
            content = content[:offset] + content[offset + len(inserted) :]
        else:
            content = content[:offset]
    return content


def nest_lists(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE_VALUES: st.SearchStrategy[Any] = st.one_of(
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
            nest_lists(50),
            nest_lists(900),
        ]
    ),
)
TREE_CHANGES = st.lists(
    st.tuples(
        st.integers(0, 1 << 30), st.sampled_from(["set", "drop", "add", "repeat"]), HOSTILE_VALUES
    ),
    min_size=1,
    max_size=3,
)


def apply_changes(tree: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """Set, drop or add nodes of a JSON tree."""
    root = [copy.deepcopy(tree)]
    for number, kind, value in changes:
        value = copy.deepcopy(value)  # hypothesis reuses values across examples
        nodes = list(_iter_nodes(root))
        container, key = nodes[number % len(nodes)]
        if kind == "drop" and len(nodes) > 1 and container is not root:
            del container[key]
        elif kind == "add" and isinstance(container[key], dict):
            container[key][str(number)] = value
        elif kind == "add" and isinstance(container[key], list):
            container[key].append(value)
        elif kind == "repeat" and isinstance(container[key], list):
            container[key].extend(container[key][:1000])
        else:
            container[key] = value
    return root[0]


def _iter_nodes(container: Any) -> Any:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(items):
        yield container, key
        if isinstance(value, (dict, list)) and len(value) < 1000:
            yield from _iter_child_nodes(value)


def _iter_child_nodes(value: Any, depth: int = 0) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items):
        yield value, key
        if isinstance(child, (dict, list)) and depth < 5:
            yield from _iter_child_nodes(child, depth + 1)


def dump_tree(tree: Any, seal: Callable[[dict], str] | None = None) -> str:
    """Dump a tree as JSON, with a valid seal if it can have one."""
    try:
        if seal and isinstance(tree, dict):
            return seal({key: value for key, value in tree.items() if key != "seal"})
        return json.dumps(tree)
    except (RecursionError, ValueError, TypeError):
        return "[" * 100_000
