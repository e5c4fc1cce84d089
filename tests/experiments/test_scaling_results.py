from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from mlxgpt.experiments.scaling_results import parse_scaling_record
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.comparisons import make_scaling_record


def test_a_record_survives_json() -> None:
    record = make_scaling_record()
    record.test.losses[0] = math.inf  # a diverged run
    text = json.dumps(files.replace_nonfinite(asdict(record)))
    assert parse_scaling_record(text) == record


@pytest.mark.parametrize("text", ['{"fitted": 3}', "[]", "no JSON"])
def test_a_damaged_record_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a valid scaling study"):
        parse_scaling_record(text)
