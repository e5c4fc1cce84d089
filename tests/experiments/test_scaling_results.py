from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from mlxgpt.experiments.scaling_results import parse_scaling_record
from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError
from tests.helpers.comparisons import make_scaling_record


def test_a_record_survives_json() -> None:
    record = make_scaling_record()
    record.test.losses[0] = math.inf  # a diverged run
    text = json.dumps(json_files.replace_nonfinite(asdict(record)))
    assert parse_scaling_record(text) == record


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no results": lambda tree: tree["fitted"].clear(),
    "a law without losses": lambda tree: tree["test"].update(losses=[]),
    "a text as a number": lambda tree: tree["advice"][0]["size"].update(step_seconds="long"),
    "a size of zero": lambda tree: tree["fitted"][0]["size"].update(parameters=0),
    "no tokens": lambda tree: tree["test"].update(tokens=0),
    "an empty text": lambda tree: tree.update(train_tokens=0),
    "half a law": lambda tree: tree["fit"]["resampled"][0].pop("beta"),
    "more than a float": lambda tree: tree["fit"].update(residual=10**400),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused(damage: str) -> None:
    tree = asdict(make_scaling_record())
    DAMAGES[damage](tree)
    with pytest.raises(UserError, match="not a valid scaling study"):
        parse_scaling_record(json.dumps(tree))


@pytest.mark.parametrize("text", ['{"fitted": 3}', "[]", "no JSON"])
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a valid scaling study"):
        parse_scaling_record(text)
