"""`mlxgpt chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Any

from mlxgpt import config
from mlxgpt.cli.repl import Repl
from mlxgpt.inference.conversation import Conversation
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.utils.errors import UserError


class ChatRepl(Repl):
    """Replies to messages, with the run's chat template and the conversation so far.

    Args:
        system: content of the system message; empty: none.
        options: of `Repl`.
    """

    greeting = "type a message"
    help_lines = (
        "Type a message. Ctrl-C stops the reply.\n"
        "/again             another reply to the last message\n"
        "/clear             begin a new conversation"
    )

    def __init__(self, *args: Any, system: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self._system = system
        self._set_model(self._model)
        self._commands["clear"] = lambda _: self._conversation.clear()

    def _set_model(self, model: LoadedModel) -> None:
        """Use a model, and begin a new conversation."""
        template = model.run.chat_template()
        self._conversation = Conversation(template, model.tokenizer, self._system)
        super()._set_model(model)

    def _answer(self, line: str) -> None:
        self._reply(line, self._sampling)

    def _repeat(self) -> None:
        message = self._conversation.pop_exchange()
        if message is None:
            raise UserError("there is no message yet", "type one.")
        self._reply(message, self._sampling | {"seed": None})

    def _reply(self, message: str, sampling: dict[str, Any]) -> None:
        """Print the reply to a message, and add both to the conversation: without a reply, neither.
        The part of a reply before Ctrl-C or an error is kept.
        """
        block_size = self._model.run.config.model.block_size
        max_reply = min(config.parse_sampling_params(sampling).max_tokens, block_size // 2)
        self._conversation.add_message("user", message)
        reply = ""
        try:
            ids, num_dropped = self._conversation.encode(block_size - max_reply)
            if num_dropped:
                self._print_line(f"context full: forgot the oldest {num_dropped} messages")
            for output in self._model.iter_tokens(ids or "", **sampling):
                self._write_text(output.text)
                reply += output.text
        except BaseException:
            if reply:
                self._conversation.add_message("assistant", reply)
            else:
                self._conversation.pop_exchange()
            raise
        self._conversation.add_message("assistant", reply)
        self._write_text("\n")
