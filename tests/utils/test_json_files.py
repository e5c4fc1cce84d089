from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(tree=st.dictionaries(st.text().filter(lambda k: k not in ("seal", "format")), values))
def test_checksummed_files_round_trip(tmp_path_factory: pytest.TempPathFactory, tree: dict) -> None:
    path = tmp_path_factory.mktemp("sealed") / "x.json"
    path.write_text(json_files.dump_checksummed(tree), encoding="utf-8")
    assert json_files.read_checksummed(path, 1) == tree


def test_every_bit_flip_in_a_checksummed_file_is_detected(tmp_path: Path) -> None:
    tree = {"format": 1, "step": 12, "loss": 1.25, "name": "tier1", "parts": {"a": [1, 2]}}
    path = tmp_path / "x.json"
    content = json_files.dump_checksummed(tree).encode()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert json_files.read_checksummed(path, 1) == tree, (
                "such as another kind of white space"
            )
        except (ValueError, UserError):
            continue


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"step": 1}', '{"step": 1, "seal": "x"}'])
def test_files_without_a_valid_checksum_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"\w"):
        json_files.read_checksummed(tmp_path / "x.json", 1)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"format": 2, "whatever": 1}))
    with pytest.raises(UserError, match=r"newer mlxgpt \(format 2\)"):
        json_files.read_checksummed(tmp_path / "x.json", 1)


@pytest.mark.parametrize("digits", [310, 400, 5000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_json_with_a_number_that_no_float_can_hold_is_a_value_error(sign: str, digits: int) -> None:
    assert json_files.parse_json(f'{{"n": {sign}1{"0" * 308}}}') == {
        "n": int(f"{sign}1{'0' * 308}")
    }
    with pytest.raises(ValueError, match="digits"):
        json_files.parse_json(f'{{"n": {sign}1{"0" * (digits - 1)}}}')
