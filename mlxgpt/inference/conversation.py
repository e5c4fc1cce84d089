"""A conversation with a model, encoded with its chat template."""

from __future__ import annotations

from mlxgpt.data.chat_template import encode_chat
from mlxgpt.data.tokenizers.base import Tokenizer


class Conversation:
    """Messages of a conversation. The oldest are dropped when they outgrow the model's context.

    Args:
        template: Jinja chat template.
        system: content of the system message, which is never dropped; empty: none.

    Attributes:
        messages: with the keys `role` and `content`.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, system: str = "") -> None:
        self._template, self._tokenizer = template, tokenizer
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._system)

    def add_message(self, role: str, content: str) -> None:
        """Add a message of `user` or `assistant`."""
        self.messages.append({"role": role, "content": content})

    def clear(self) -> None:
        """Drop all messages but the system message."""
        self.messages = list(self._system)

    def pop_exchange(self) -> str | None:
        """Remove the last user message and the reply to it; returns the message, if any."""
        while len(self.messages) > len(self._system):
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def encode(self, max_tokens: int) -> tuple[list[int], int]:
        """Encode the messages up to the start of the assistant's reply. Drops whole exchanges, from
        the oldest on, until at most `max_tokens` ids are left; the last user message is kept, even
        if it alone is too long.

        Returns:
            the ids, and how many messages were dropped

        Raises:
            UserError: if the template fails, or the tokenizer cannot encode a message.
        """
        num_dropped = 0
        while True:
            ids = encode_chat(self._template, self.messages, self._tokenizer)
            start = len(self._system)
            users = [n for n, m in enumerate(self.messages) if m["role"] == "user" and n > start]
            if len(ids) <= max_tokens or not users:
                return ids, num_dropped
            del self.messages[start : users[0]]
            num_dropped += users[0] - start
