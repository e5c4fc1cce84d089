"""`mlxgpt play` in Portuguese, in Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.config import Config, override_config
from tests.helpers.play_page import PlayPage, axe
from tests.helpers.play_server import PlayServer, serve_run, serve_run_copy
from tests.helpers.training_runs import tune_on_pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # from playwright and axe

ENGLISH = re.compile(
    r"\b(the|of|and|with|this|each|to|from|by|step|steps|training|layer|head|text|random|ago)\b",
    re.IGNORECASE,
)
# Texts and names of the page, except those of the model, its tokens and its prompt.
PAGE_TEXTS = """() => {
    const skipped = "script, code, .token-view, .snapshots span, .samples li, #run-name";
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const texts = [document.title];
    for (let node = walker.nextNode(); node; node = walker.nextNode())
        if (!node.parentElement.closest(skipped)) texts.push(node.data);
    for (const element of document.querySelectorAll("h3")) texts.push(element.textContent);
    for (const name of ["aria-label", "aria-valuetext", "placeholder", "title"])
        for (const element of document.querySelectorAll(`[${name}]:not(.token)`))
            texts.push(element.getAttribute(name));
    return texts;
}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[PlayServer]:
    with serve_run_copy(trained, tmp_path_factory.mktemp("played") / "done") as server:
        yield server


def find_english(page: Any) -> list[str]:
    return [text for text in page.evaluate(PAGE_TEXTS) if ENGLISH.search(text)]


def test_every_tab_in_portuguese(browser: Any, served: PlayServer) -> None:
    play = PlayPage(browser, served, locale="pt-BR")
    page = play.page
    assert page.get_attribute("html", "lang") == "pt-BR"
    play.generate("to be")
    assert "semente" in page.text_content("#generate-status")
    play.tokens()
    page.locator("#generated-text .token").last.hover()
    assert "probabilidade de " in page.text_content("#alternatives-hint")
    assert page.text_content("#temperature ~ output") == "0,80"
    assert find_english(page) == []
    for tab, wait_for in (("Inspecionar", "#lens tbody tr"), ("Treino", "#loss-curve .val-loss")):
        play.open_tab(tab)
        page.wait_for_selector(wait_for, state="attached")
        page.wait_for_timeout(300)
        assert find_english(page) == [], tab
        assert axe.Axe().run(page).violations_count == 0, tab
    page.get_by_role("button", name="Gerar em todos os snapshots").click()
    page.wait_for_selector("#snapshots-status:has-text('mesma semente')")
    assert page.locator("#snapshots h3").all_text_contents()[0] == "passo 0 (sem treino)"
    assert "palpite uniforme: ln " in page.text_content("#loss-curve")
    assert page.text_content("#training-progress").startswith("Passo 12 de 12, 0,")
    assert find_english(page) == []
    assert play.console_messages == []
    play.context.close()


def test_comparison_in_portuguese(browser: Any, tmp_path: Path, tiny: Config) -> None:
    folder = tune_on_pairs(tmp_path, override_config(tiny, {"block_size": 64})).folder
    with serve_run(folder) as server:
        play = PlayPage(browser, server, locale="pt-BR")
        play.page.check("#compare")
        play.generate("There were 3", 8)
        play.page.wait_for_selector("#reference-next-tokens li")
        assert find_english(play.page) == []
        play.open_tab("Treino")
        play.page.wait_for_selector("#loss-curve .uniform-label", state="attached")
        assert "a referência: ln 2 = 0,69" in play.page.text_content("#loss-curve")
        assert "nats por par" in play.page.text_content("#loss-curve")
        assert find_english(play.page) == []
        play.context.close()


def test_the_chosen_language_wins_over_the_browsers(
    browser: Any, tmp_path: Path, trained: Path
) -> None:
    shutil.copytree(trained / "runs" / "done", folder := tmp_path / "done")
    for lang, locale, title in (("pt", "en-US", "Gerar"), ("en", "pt-BR", "Generate")):
        with serve_run(folder, lang) as server:
            play = PlayPage(browser, server, locale=locale)
            assert play.page.text_content("#generate-button") == title
            expected = "pt-BR" if lang == "pt" else "en"
            assert play.page.get_attribute("html", "lang") == expected
            play.page.reload()
            play.page.wait_for_selector("body[data-ready]")
            assert play.page.text_content("#generate-button") == title
            play.context.close()


def test_page_errors_in_portuguese(browser: Any, served: PlayServer) -> None:
    page = browser.new_page(locale="pt-BR")
    page.goto(served.address)
    page.wait_for_selector("#error:not(:empty)")
    assert "precisa da chave da API" in page.text_content("#error")
    page.close()
