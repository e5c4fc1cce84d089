"""`mlxgpt play` with the model that a run was initialized from, in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlxgpt.config import Config, override_config
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from tests.helpers.play_page import PlayPage, axe
from tests.helpers.play_server import PlayServer, serve_run
from tests.helpers.training_runs import tune_on_pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # from playwright and axe


@pytest.fixture(scope="module")
def tuned_served(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[PlayServer]:
    """Server of a run tuned on preference pairs, next to the run it was initialized from."""
    config = override_config(tiny, {"block_size": 64})
    with serve_run(tune_on_pairs(tmp_path_factory.mktemp("tuned"), config).folder) as server:
        yield server


def test_comparison_with_the_reference(browser: Any, tuned_served: PlayServer) -> None:
    """The same prompt and seed, and the probabilities of both models."""
    play = PlayPage(browser, tuned_served)
    page = play.page
    assert not page.is_visible("#reference-text")
    page.check("#compare")
    play.generate("There were 3", 8)
    texts = [play.text(), str(page.text_content("#reference-text"))]
    seed = int(str(page.text_content("#generate-status")).rpartition("seed ")[2])
    for text, reference in zip(texts, (False, True), strict=True):
        _, *events, _ = tuned_served.post_stream(
            "/api/generate", text="There were 3", seed=seed, max_tokens=8, reference=reference
        )
        # Tokens that complete no character are shown by their bytes, in < >, or as a dot.
        shown = [
            event["text"] or (event["label"] if event["label"].startswith("<") else "·")
            for event in events
        ]
        expected = "".join(shown).replace("\n", "⏎\n")
        assert text == f"{END_OF_TEXT}There were 3{expected}"
    page.wait_for_selector("#reference-next-tokens li")
    bars = [
        page.locator(f"#{name} li").all_text_contents()
        for name in ("next-tokens", "reference-next-tokens")
    ]
    assert len(bars[0]) == len(bars[1]) == 12
    assert bars[0] != bars[1]
    page.locator("#reference-text .token").last.hover()
    assert "fox gave it a probability of" in page.text_content("#alternatives-hint")
    assert page.locator("#alternatives button").count() == 0
    assert axe.Axe().run(page).violations_count == 0
    page.uncheck("#compare")
    assert not page.is_visible("#reference-text")
    assert play.console_messages == []
    play.context.close()
