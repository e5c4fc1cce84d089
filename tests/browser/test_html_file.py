"""An HTML file that contains a model, opened from disk in Chromium without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxgpt
from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.convert import html
from mlxgpt.data.chat_template import CHATML, IM_END, IM_START
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.tokenizer_json import add_special_tokens
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.model.parameters import flatten_params, load_parameters
from mlxgpt.storage import run as runs
from mlxgpt.storage.loading import load_model
from tests.helpers.play_page import axe
from tests.helpers.tiny_models import create_random_run
from tests.helpers.training_runs import MODERN_PARTS, train_fox_model

pytestmark = pytest.mark.filterwarnings("ignore")  # from playwright and axe

LOGITS = """ids => {
    const engine = modules["gpt.js"], api = modules["file_api.js"];
    const read = (id) => document.getElementById(id).textContent;
    const info = JSON.parse(read("model-info"));
    const bytes = Uint8Array.from(atob(read("model-weights")), (c) => c.charCodeAt(0));
    const model = new engine.GPT(info.config, api.readWeights(bytes.buffer, info.weights));
    const cache = model.newCache();
    return ids.map((id) => Array.from(model.logits(model.step(cache, id))));
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> runs.Run:
    """A trained run with every part of the racing recipe."""
    config = override_config(tiny, {"block_size": 64, **MODERN_PARTS})
    return train_fox_model(tmp_path_factory.mktemp("file"), config, stories=200)


@pytest.fixture(scope="module")
def file(run: runs.Run) -> Path:
    folder = run.folder.parents[1]
    return api.export_html(
        run="fox",
        snapshots=2,
        output=folder / "fox.html",
        runs_dir=folder / "runs",
        data_dir=folder / "data",
    ).folder


class FilePage:
    """A page opened from disk, offline, with its messages and requests."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        size = {"width": 1280, "height": 900}
        self.context = browser.new_context(**{"viewport": size, **options})
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready]")

    def generate(self, prompt: str, seed: int, tokens: int = 20) -> str:
        self.page.fill("#prompt", prompt)
        self.page.fill("#max-tokens", str(tokens))
        self.page.fill("#seed", str(seed))
        self.page.click("#generate-button")
        self.page.wait_for_selector("#generate-status:not(:empty)")
        self.page.wait_for_selector("#stop-button:disabled")
        return str(self.page.text_content("#generated-text")).replace(END_OF_TEXT, "")

    def close(self) -> None:
        assert self.messages == []
        assert all(url.startswith(("file:", "data:")) for url in self.requests)
        self.context.close()


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[FilePage]:
    page = FilePage(browser, file)
    yield page
    page.close()


def test_logits_are_those_of_mlx_with_the_same_rounded_weights(
    page: FilePage, run: runs.Run
) -> None:
    gpt, _ = load_model(run)
    load_parameters(gpt, html.pack_weights(flatten_params(gpt.parameters()), 8).rounded)
    model = LoadedModel(run, gpt, 0)
    ids = np.random.default_rng(0).integers(0, run.tokenizer.vocab_size, 40)
    logits = page.page.evaluate(LOGITS, ids.tolist())
    expected = model.logits(ids)[:, : run.tokenizer.vocab_size]
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    page.page.fill("#temperature", "0")
    greedy = page.generate("Once upon a time", 1, 40)
    assert greedy == model.generate("Once upon a time", temperature=0.0, max_tokens=40).texts[0]


def test_texts_are_reproducible_by_seed(page: FilePage) -> None:
    page.page.fill("#temperature", "1.5")
    texts = [page.generate("There were", seed) for seed in (3, 4, 3)]
    assert texts[0] == texts[2] != texts[1]
    assert "seed 3" in page.page.text_content("#generate-status")


def test_a_selected_alternative_is_continued(page: FilePage) -> None:
    before = page.generate("There were", 1)
    assert before.startswith("There were")
    tokens = page.page.locator("#generated-text .token")
    tokens.nth(8).hover()
    page.page.locator("#alternatives button").nth(1).click()
    page.page.wait_for_selector("#stop-button:disabled")
    name = page.page.locator("#generated-text .token").nth(8)
    assert name.get_attribute("aria-label")


def test_every_tab_is_accessible(page: FilePage) -> None:
    page.generate("There were", 1)
    for tab in ("Generate", "Inspect", "About"):
        page.page.get_by_role("tab", name=tab).click()
        page.page.wait_for_timeout(300)
        assert axe.Axe().run(page.page).violations_count == 0, tab
    text = str(page.page.text_content("#about"))
    assert "fox.txt" in text
    assert "8 bits" in text
    assert page.page.locator("#about-snapshots li").count() == 2


def test_attention_and_logit_lens(page: FilePage, run: runs.Run) -> None:
    page.generate("There were", 1)
    page.page.get_by_role("tab", name="Inspect").click()
    page.page.wait_for_selector("#lens tbody tr:nth-child(3)")
    page.page.wait_for_selector("#neighbors li")
    assert page.page.locator("#attention-lines path").count() > 0
    assert page.page.locator("#heads canvas").count() == run.config.model.n_head
    assert page.page.locator("#ablated-next-tokens .thin").count() == 0
    page.page.locator("#heads input").first.check()
    page.page.wait_for_selector("#ablated-next-tokens .thin")


@pytest.mark.parametrize("width", [320, 1280])
def test_the_page_fits_the_width(browser: Any, file: Path, width: int) -> None:
    page = FilePage(browser, file, viewport={"width": width, "height": 700})
    page.generate("There were", 1)
    for tab in ("Generate", "Inspect", "About"):
        page.page.get_by_role("tab", name=tab).click()
        page.page.wait_for_timeout(200)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width, tab
    page.close()


def test_in_portuguese(browser: Any, file: Path) -> None:
    page = FilePage(browser, file, locale="pt-BR")
    page.generate("There were", 1)
    assert page.page.get_attribute("html", "lang") == "pt-BR"
    assert page.page.text_content("#generate-button") == "Gerar"
    assert "semente 1" in page.page.text_content("#generate-status")
    page.page.get_by_role("tab", name="Sobre").click()
    text = str(page.page.text_content("#about"))
    assert "treinado com" in text
    titles = page.page.locator("#about th, #about p, #about h2, #about h3").all_text_contents()
    assert not re.search(r"\b(the|of|with|validation|weights|step|steps)\b", " ".join(titles))
    page.close()


def test_nothing_is_stored_and_unknown_characters_are_named(page: FilePage) -> None:
    page.generate("There were", 1)
    assert page.page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
    assert json.loads(page.page.text_content("#model-info"))["is_file"]


def test_a_conversation(browser: Any, tmp_path: Path, tiny: Config) -> None:
    tokenizer = add_special_tokens(BPETokenizer([]), (IM_START, IM_END))
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 64}
    config = override_config(tiny, sizes)
    create_random_run(tmp_path / "chat", config, tokenizer, CHATML)
    path = api.export_html(run=str(tmp_path / "chat"), output=tmp_path / "chat.html").folder
    page = FilePage(browser, path)
    page.page.fill("#max-tokens", "8")
    page.page.get_by_role("tab", name="Chat").click()
    for count in (2, 4):
        page.page.fill("#message", "Hello")
        page.page.press("#message", "Enter")
        page.page.wait_for_selector(f"#messages li:nth-child({count})")
        page.page.wait_for_selector("#send-button:enabled")
    assert len(page.page.locator("#messages p").all_text_contents()[3]) > 0
    assert axe.Axe().run(page.page).violations_count == 0
    page.close()


def test_hostile_samples_and_tokens_run_nothing(browser: Any, tmp_path: Path, tiny: Config) -> None:
    """In the run's name, its samples and its prompts."""
    folder = tmp_path / "a<img src=x onerror=alert(1)>"
    config = override_config(tiny, {"vocab_size": 257, "block_size": 32})
    create_random_run(folder, config, BPETokenizer([])).add_sample(
        1, "</script><script>alert(1)</script>"
    )
    path = api.export_html(run=str(folder), output=tmp_path / "m.html", snapshots=1).folder
    page = FilePage(browser, path)
    page.generate("<script>alert(1)</script><img src=x onerror=alert(1)>", 1)
    assert page.page.locator("main img, header img").count() == 0
    assert page.page.text_content("#run-name") == folder.name
    page.close()
    assert mlxgpt.load(str(folder)).run.name == folder.name
