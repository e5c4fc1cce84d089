"""A page of `mlxgpt play` in Chromium."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.play_server import KEY, PlayServer

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")


class PlayPage:
    """Page of a server, with its console messages and requested URLs."""

    def __init__(
        self,
        browser: Any,
        server: PlayServer,
        width: int = 1280,
        scheme: str = "light",
        locale: str = "en-US",
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, locale=locale
        )
        self.page = self.context.new_page()
        self.console_messages: list[str] = []
        self.requested_urls: list[str] = []
        self.page.on("request", lambda request: self.requested_urls.append(request.url))
        self.page.on("console", lambda message: self.console_messages.append(message.text))
        self.page.on("pageerror", lambda error: self.console_messages.append(str(error)))
        self.page.goto(f"{server.address}/#{KEY}")
        self.page.wait_for_selector("body[data-ready]")

    def generate(self, prompt: str, tokens: int = 30) -> str:
        """Generate text from a prompt, wait until it is done, and return the text."""
        self.page.fill("#prompt", prompt)
        self.page.fill("#max-tokens", str(tokens))
        self.page.click("#generate-button")
        self.wait_until_done()
        return self.text()

    def wait_until_done(self) -> None:
        self.page.wait_for_selector("#generate-status:has-text('; se')")
        self.page.wait_for_selector("#stop-button:disabled")

    def text(self) -> str:
        return str(self.page.text_content("#generated-text"))

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def error(self) -> str:
        self.page.wait_for_selector("#error:not(:empty)")
        return str(self.page.text_content("#error"))

    def tokens(self) -> list[str]:
        return list(self.page.locator("#generated-text .token").all_text_contents())
