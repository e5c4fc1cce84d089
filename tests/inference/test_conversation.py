from __future__ import annotations

import pytest

from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.inference.conversation import Conversation

TOKENIZER = BPETokenizer([])
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"


def make_conversation(exchanges: int, system: str = "") -> Conversation:
    conversation = Conversation(TEMPLATE, TOKENIZER, system)
    for n in range(exchanges):
        conversation.add_message("user", str(n))
        conversation.add_message("assistant", str(n))
    conversation.add_message("user", "?")
    return conversation


@pytest.mark.parametrize("system", ["", "S"])
@pytest.mark.parametrize("max_tokens", [1, 2, 4, 5, 6, 10, 14, 100])
def test_whole_exchanges_are_dropped_until_the_rest_fits(max_tokens: int, system: str) -> None:
    conversation = make_conversation(3, system)
    ids, num_dropped = conversation.encode(max_tokens)
    prefix = "sS" if system else ""
    texts = [prefix + "".join(f"u{n}a{n}" for n in range(first, 3)) + "u?" for first in range(4)]
    expected = next((text for text in texts if len(text) <= max_tokens), texts[-1])
    assert TOKENIZER.decode(ids) == expected
    assert num_dropped == 2 * texts.index(expected)
    assert conversation.encode(max_tokens) == (ids, 0)


def test_the_last_exchange_is_removed() -> None:
    conversation = make_conversation(1, "S")
    assert conversation.pop_exchange() == "?"
    assert conversation.pop_exchange() == "0"
    assert conversation.pop_exchange() is None
    assert conversation.messages == [{"role": "system", "content": "S"}]


def test_clear_keeps_the_system_message() -> None:
    conversation = make_conversation(1, "S")
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "S"}]
