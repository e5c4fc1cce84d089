from __future__ import annotations

import pytest

from mlxgpt.evaluation.hellaswag import Example, load
from tests.helpers.hellaswag_examples import TEXT


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    path = tmp_path_factory.mktemp("hellaswag") / "small.jsonl"
    path.write_text(TEXT, encoding="utf-8")
    return load(path)
