from __future__ import annotations

import pytest

from mlxgpt.evaluation.hellaswag import HellaSwagExample, load_examples
from tests.helpers.hellaswag_examples import EXAMPLES_JSONL


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[HellaSwagExample]:
    path = tmp_path_factory.mktemp("hellaswag") / "small.jsonl"
    path.write_text(EXAMPLES_JSONL, encoding="utf-8")
    return load_examples(path)
