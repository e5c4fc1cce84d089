"""Chat templates rendered by us and by transformers."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import jinja2
import pytest

from mlxgpt import api
from mlxgpt.config import Config
from mlxgpt.data import chat_template
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.utils.errors import UserError
from tests.helpers.chat_templates import CONVERSATIONS, TEMPLATES
from tests.helpers.training_runs import train_fox_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SPECIAL = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> LoadedModel:
    """A small trained model with a byte-level BPE."""
    folder = tmp_path_factory.mktemp("bpe")
    train_fox_model(folder, tiny)
    return load("fox", runs_dir=folder / "runs")


@pytest.fixture(scope="module")
def hf_tokenizer(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of the model, loaded by transformers."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    api.export(to="hf", run=str(model.run.folder), output=folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_conversations_match_transformers(
    hf_tokenizer: Any, name: str, conversation: str
) -> None:
    template, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    try:
        expected = hf_tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError) as error:
        with pytest.raises(UserError, match=re.escape(str(error).split("0x")[0])):
            render(template, messages)
    else:
        assert render(template, messages) == expected


def render(template: str, messages: list[dict[str, Any]]) -> str:
    cleaned = [{name: value for name, value in m.items() if value is not None} for m in messages]
    return chat_template.render_chat_template(template, cleaned, SPECIAL)


def test_most_templates_accept_most_conversations(hf_tokenizer: Any) -> None:
    """Otherwise the test above would only compare errors."""
    rendered = 0
    for template in TEMPLATES.values():
        for messages in CONVERSATIONS.values():
            with contextlib.suppress(UserError):
                rendered += bool(render(template, messages))
    assert len(TEMPLATES) >= 20
    assert rendered > 0.8 * len(TEMPLATES) * len(CONVERSATIONS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_of_conversations_match_transformers(
    model: LoadedModel, hf_tokenizer: Any, name: str
) -> None:
    messages = CONVERSATIONS["long"][1:4]
    expected = hf_tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=True, add_generation_prompt=True
    )
    ids = chat_template.encode_chat(TEMPLATES[name], messages, model.tokenizer)
    assert ids == expected["input_ids"]
