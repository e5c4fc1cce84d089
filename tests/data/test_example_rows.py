from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.config import DataConfig
from mlxgpt.data.example_rows import find_first_example, read_examples, uses_template
from mlxgpt.utils.errors import UserError
from tests.helpers.example_rows import ANSWER, PAIR, SECOND, TALK, USER, write_rows


def test_the_format_is_recognized_by_the_keys(tmp_path: Path) -> None:
    def find(row: Any, **settings: Any) -> bool | None:
        source = write_rows(tmp_path / "rows.jsonl", row)
        data = DataConfig(source=(source,), **settings)
        example = find_first_example(data)
        return None if example is None else uses_template(example, data)

    strings = {"prompt": "a", "completion": "b"}
    assert find({"text": "a"}) is None
    assert find("a") is None
    assert find(TALK) is True
    assert find({"prompt": [USER], "completion": [ANSWER]}) is True
    assert find(strings) is False
    assert find(strings, template=True) is True
    assert find_first_example(DataConfig(source=("shakespeare",))) is None


def test_parquet_rows_as_on_the_hub(tmp_path: Path) -> None:
    """HuggingFaceH4/ultrachat_200k has `prompt`, `prompt_id` and `messages`; in
    trl-internal-testing/harmony, messages without `thinking` have it as null. A null content, as
    of a message that only calls tools, is refused with its row.
    """
    import pyarrow
    import pyarrow.parquet

    def write(*answers: dict[str, str | None]) -> str:
        rows = [
            {
                "prompt": "Hi",
                "prompt_id": "f0e37e9f",
                "messages": [{"content": "Hi", "role": "user"}, {"role": "assistant", **answer}],
            }
            for answer in answers
        ]
        path = tmp_path / "train_sft-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)

    with_thinking: dict[str, str | None] = {"content": "Yo", "thinking": "A greeting."}
    first, second = read_examples([write({"content": "Yo", "thinking": None}, with_thinking)])
    (expected,) = read_examples([write_rows(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})])
    assert first.key == expected.key
    assert second.messages[1]["thinking"] == "A greeting."
    with pytest.raises(UserError, match="row 2: messages is not a list of messages"):
        list(read_examples([write({"content": "Yo"}, {"content": None})]))


def write_preferences(tmp_path: Path, rows: list[dict[str, Any]], omitted: str = "") -> str:
    """Write pairs laid out as in HuggingFaceH4/ultrafeedback_binarized, without one column."""
    import pyarrow
    import pyarrow.parquet

    conversation = pyarrow.list_(
        pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])
    )
    columns = {
        "prompt": pyarrow.string(),
        "prompt_id": pyarrow.string(),
        "chosen": conversation,
        "rejected": conversation,
        "messages": conversation,
        "score_chosen": pyarrow.float64(),
        "score_rejected": pyarrow.float64(),
    }
    schema = pyarrow.schema([pair for pair in columns.items() if pair[0] != omitted])
    rows = [{"messages": row["chosen"], "score_chosen": 8.0, **row} for row in rows]
    path = tmp_path / "train_prefs-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return str(path)


@pytest.mark.parametrize("omitted", ["", "prompt"])
def test_pairs_as_on_the_hub(omitted: str, tmp_path: Path) -> None:
    """HuggingFaceH4/ultrafeedback_binarized has the prompt as a string and in both conversations,
    and `messages`, which are those of `chosen`; trl-lib/ultrafeedback_binarized has no `prompt`.
    """
    row = {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, SECOND]}
    (pair,) = read_examples([write_preferences(tmp_path, [row], omitted)])
    (expected,) = read_examples([write_rows(tmp_path / "rows.jsonl", PAIR)])
    assert pair.is_pair
    assert pair.key == expected.key
    for rejected, problem in (
        ([USER, {"role": "assistant", "content": None}], "row 2: rejected is not a list of messag"),
        ([USER], "row 2: rejected is not a list of messages"),
        (None, "row 2"),
    ):
        path = write_preferences(tmp_path, [row, {**row, "rejected": rejected}], omitted)
        with pytest.raises(UserError, match=problem):
            list(read_examples([path]))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same chosen and rejected answer"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "chosen is not a list of messag"),
        ({"chosen": "b", "rejected": "c"}, "has no 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": [ANSWER]}, "prompt and rejected is text"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "prompt and chosen is text"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "prompt and rejected is text"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": None}, "rejected is not a list"),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": None}, "prompt and chosen is text"),
        ({"chosen": [USER, ANSWER], "rejected": None}, "has no 'prompt'"),
        ({"prompt": "a", "completion": "b"}, "only one of .*line 1 and .*line 2 is a pair"),
    ],
)
def test_invalid_pairs_are_refused_with_their_line(row: Any, problem: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", PAIR, row)
    with pytest.raises(UserError, match=problem) as caught:
        list(read_examples([path]))
    assert "line 2" in caught.value.problem


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_other_tables_have_the_same_examples(suffix: str, tmp_path: Path) -> None:
    rows = [TALK, {"messages": [USER, ANSWER]}]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    expected = read_examples([write_rows(tmp_path / "rows.jsonl", *rows)])
    examples = list(read_examples([str(path)]))
    assert [row.key for row in examples] == [row.key for row in expected]
    assert "2" in examples[1].location


def test_text_files_among_examples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"a.txt cannot contain prompts and answers"):
        list(read_examples([write_rows(tmp_path / "rows.jsonl", TALK), str(tmp_path / "a.txt")]))
