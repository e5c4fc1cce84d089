"""The Chat tab of `mlxgpt play` in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mlxgpt.config import Config, override_config
from mlxgpt.data.chat_template import CHATML, IM_END, IM_START
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.tokenizer_json import add_special_tokens
from mlxgpt.storage import run as runs
from mlxgpt.storage.checkpoint import MODEL_FILE
from mlxgpt.utils import files
from tests.helpers.play_page import PlayPage, axe
from tests.helpers.play_server import PlayServer, serve_run
from tests.helpers.tiny_models import create_random_run

pytestmark = pytest.mark.filterwarnings("ignore")  # from playwright and axe


@pytest.fixture(scope="module")
def chat_served(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[PlayServer]:
    """Server of a random model with a chat template, initialized from another one."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = add_special_tokens(BPETokenizer([]), (IM_START, IM_END))
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 64}
    config = override_config(tiny, sizes)
    base = create_random_run(folder / "base", config, tokenizer, CHATML)
    weights = base.checkpoint_path() / MODEL_FILE
    origin = {"run": "base", "step": base.steps()[0], "sha256": files.sha256_file(weights)}
    run = replace(base, folder=folder / "chat", origin=origin)
    runs.create_run(run, CHATML)
    saved = base.load_first_valid([base.checkpoint_path()]).parameters
    run.save(run.checkpoints, 1, {name: 1.5 * value for name, value in saved.items()}, {})
    with serve_run(run.folder) as server:
        yield server


def test_a_reply_next_to_the_references(browser: Any, chat_served: PlayServer) -> None:
    play = PlayPage(browser, chat_served)
    page = play.page
    page.fill("#max-tokens", "12")
    page.fill("#temperature", "0")
    play.open_tab("Chat")
    page.check("#chat-compare")
    page.fill("#message", "Hello")
    page.press("#message", "Enter")
    page.wait_for_selector("#messages li:nth-child(3)")
    page.wait_for_selector("#send-button:enabled")
    assert page.locator("#messages b").all_text_contents() == ["You", "Model", "base"]
    replies = page.locator("#messages p").all_text_contents()[1:]
    request = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}
    for reply, reference in zip(replies, (False, True), strict=True):
        _, *events, _ = chat_served.post_stream(
            "/api/generate", temperature=0, reference=reference, **request
        )
        assert reply == "".join(event["text"] for event in events)
    assert replies[0] != replies[1]
    assert axe.Axe().run(page).violations_count == 0
    assert play.console_messages == []
    play.context.close()


def test_a_conversation(browser: Any, chat_served: PlayServer) -> None:
    """Messages and replies, Enter and Shift+Enter, a failed reply, a new conversation."""
    play = PlayPage(browser, chat_served)
    page = play.page
    page.fill("#max-tokens", "20")
    play.open_tab("Chat")

    def send(text: str, count: int) -> list[str]:
        page.fill("#message", text)
        page.press("#message", "Enter")
        page.wait_for_selector(f"#messages li:nth-child({count})")
        page.wait_for_selector("#send-button:enabled")
        return list(page.locator("#messages li p").all_text_contents())

    first = send("Hello", 2)
    assert first[0] == "Hello"
    assert first[1]
    second = send("Who?", 4)
    assert second[:3] == [*first, "Who?"]
    assert page.input_value("#message") == ""
    page.press("#message", "Shift+Enter")
    assert page.input_value("#message") == "\n"
    assert axe.Axe().run(page).violations_count == 0
    page.route("**/api/generate", lambda route: route.abort())
    page.fill("#message", "Lost?")
    page.click("#send-button")
    assert "not responding" in play.error()
    assert page.input_value("#message") == "Lost?"
    assert page.locator("#messages li p").all_text_contents() == second
    page.unroute("**/api/generate")
    page.click("#new-chat-button")
    assert page.locator("#messages li").count() == 0
    assert send("Hello", 2)[0] == "Hello"
    assert [m for m in play.console_messages if "Failed to load resource" not in m] == []
    play.context.close()
