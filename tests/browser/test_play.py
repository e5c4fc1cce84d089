"""`mlxgpt play` in a real Chromium: by mouse, by keys, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mlxgpt.config import Config, override_config
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.convert.importing import create_imported_run
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from tests.helpers.play_server import KEY, PlayServer, serve_run, serve_run_copy
from tests.helpers.tiny_models import make_random_model

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[PlayServer]:
    with serve_run_copy(trained, tmp_path_factory.mktemp("played") / "done") as server:
        yield server


@pytest.fixture(scope="module")
def bytes_served(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[PlayServer]:
    """A model of bytes, with any text in the world; a character is up to four of its tokens."""
    folder = tmp_path_factory.mktemp("bytes") / "bytes"
    config = override_config(tiny, {"vocab_size": 257, "block_size": 64, "n_layer": 3}).model
    model = make_random_model(
        override_config(tiny, {"vocab_size": 257, "block_size": 64, "n_layer": 3})
    )
    parameters = dict(tree_flatten(model.parameters()))
    create_imported_run(ImportedModel(config, parameters, BPETokenizer([]), True), folder)
    with serve_run(folder) as server:
        yield server


class PlayPage:
    """A page, and what it said that a person does not see."""

    def __init__(
        self, browser: Any, server: PlayServer, width: int = 1280, scheme: str = "light"
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.console_messages: list[str] = []
        self.requested_urls: list[str] = []
        self.page.on("request", lambda request: self.requested_urls.append(request.url))
        self.page.on("console", lambda message: self.console_messages.append(message.text))
        self.page.on("pageerror", lambda error: self.console_messages.append(str(error)))
        self.page.goto(f"{server.address}/#{KEY}")
        self.page.wait_for_selector("body[data-ready]")

    def write(self, prompt: str, tokens: int = 30) -> str:
        """Let it write, to the end; the text."""
        self.page.fill("#prompt", prompt)
        self.page.fill("#max-tokens", str(tokens))
        self.page.click("#go")
        self.wait_until_done()
        return self.text()

    def wait_until_done(self) -> None:
        self.page.wait_for_selector("#state:has-text('seed')")
        self.page.wait_for_selector("#stop:disabled")

    def text(self) -> str:
        return str(self.page.text_content("#story"))

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def problem(self) -> str:
        self.page.wait_for_selector("#problem:not(:empty)")
        return str(self.page.text_content("#problem"))

    def tokens(self) -> list[str]:
        return list(self.page.locator("#story .token").all_text_contents())


@pytest.fixture
def play(browser: Any, served: PlayServer) -> Iterator[PlayPage]:
    page = PlayPage(browser, served)
    yield page
    assert page.console_messages == []
    page.context.close()


def test_each_token_has_a_width(play: PlayPage) -> None:
    """Also the second letter of what a font draws as one, such as "fl"."""
    play.write("to befl")
    widths = play.page.locator("#story .token").evaluate_all(
        "tokens => tokens.map((token) => token.getBoundingClientRect().width)"
    )
    assert len(widths) == 37
    assert min(widths[:7]) > 0


def test_another_branch_by_mouse(play: PlayPage) -> None:
    before = play.write("to be")
    assert before.startswith("to be")
    tokens = play.tokens()
    assert len(tokens) == 35
    play.page.hover("#story .token:nth-child(12)")
    alternatives = play.page.locator("#alternatives button")
    assert alternatives.count() == 12
    assert "Alternatives to" in play.page.text_content("#other-title")
    names = play.page.locator("#alternatives code").all_text_contents()
    index = next(n for n, name in enumerate(names) if name not in (tokens[11], "␣", "⏎"))
    alternatives.nth(index).click()
    play.wait_until_done()
    after = play.tokens()
    assert after[:11] == tokens[:11]
    assert after[11] == names[index] != tokens[11]
    assert len(after) == 12 + 30
    assert play.page.get_attribute("#story .token:nth-child(3)", "aria-label")
    play.page.hover("#story .token:nth-child(2)")
    assert "part of the prompt" in play.page.text_content("#other-hint")


def test_all_of_it_by_keys(play: PlayPage) -> None:
    keyboard = play.page.keyboard
    play.page.focus("#prompt")
    play.page.fill("#max-tokens", "20")
    play.page.focus("#prompt")
    keyboard.press("Control+A")
    keyboard.type("or not")
    keyboard.press("Tab")
    keyboard.press("Enter")
    play.wait_until_done()
    assert play.text().startswith("or not")
    active = "document.activeElement"
    for _ in range(8):
        keyboard.press("Tab")
        if play.page.locator(".token:focus").count():
            break
    assert play.page.locator(".token:focus").count() == 1
    keyboard.press("End")
    keyboard.press("ArrowLeft")
    assert play.page.evaluate(f"{active}.dataset.n") == "24"
    keyboard.press("Enter")
    assert play.page.evaluate(f"{active}.parentElement.parentElement.id") == "alternatives"
    keyboard.press("ArrowDown")
    chosen = play.page.evaluate(f"{active}.querySelector('code').textContent")
    keyboard.press("Escape")
    assert play.page.evaluate(f"{active}.dataset.n") == "24"
    keyboard.press("Enter")
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    play.wait_until_done()
    assert play.tokens()[24].replace(" ", "␣").replace("\n", "") == chosen
    play.page.focus("#tab-write")
    keyboard.press("ArrowRight")
    assert play.page.is_visible("#inside")
    keyboard.press("End")
    assert play.page.is_visible("#life")
    play.page.wait_for_selector("#age-says:has-text('step 12')")  # its ages are there
    play.page.focus("#age")
    keyboard.press("Home")
    play.page.wait_for_selector("#age-says:has-text('untrained')")


def test_settings_show_what_they_leave(play: PlayPage) -> None:
    play.write("to be")
    assert play.page.locator("#next li").count() == 12
    play.page.focus("#top_k")
    play.page.keyboard.press("Home")
    play.page.keyboard.press("ArrowRight")
    play.page.wait_for_selector("#next li:nth-child(1):has-text('→ 100%')")
    shares = play.page.locator("#next li span:last-child").all_text_contents()
    assert [share.split("→ ")[1] for share in shares] == ["100%"] + ["0.0%"] * 11


def test_no_answer_waits_for_another_one(play: PlayPage) -> None:
    play.write("to be", 2)
    play.page.route("**/api/lens", lambda route: None)  # never answered
    play.open_tab("Inspect")
    play.page.wait_for_selector("#neighbors li:nth-child(12)")
    assert play.page.locator("#lens tbody tr").count() == 0


def test_looking_inside(play: PlayPage) -> None:
    play.write("to be", 2)
    play.open_tab("Inspect")
    play.page.wait_for_selector("#seen .token:nth-child(7)")
    assert play.page.locator(".head").count() == 2
    play.page.hover("#seen .token:nth-child(6)")
    play.page.wait_for_selector("#lines path", state="attached")
    caption = play.page.text_content("#attends")
    assert caption.startswith("Layer 1, head 1: ")
    play.page.wait_for_selector("#lens tbody tr:nth-child(3)")
    assert play.page.locator("#lens th[scope=row]").all_text_contents() == [
        "embedding",
        "layer 1",
        "layer 2",
    ]
    play.page.wait_for_selector("#neighbors li:nth-child(12)")
    play.page.get_by_role("radio", name="a heat map").check()
    assert play.page.locator("#lines path").count() == 0
    shades = play.page.evaluate(
        "[...document.querySelectorAll('#seen .token')].map(t => t.style.background !== '')"
    )
    assert any(shades[:6])
    assert not any(shades[6:]), "nobody looks ahead"
    next_tokens = play.page.locator("#without li").all_text_contents()
    play.page.get_by_role("checkbox", name="disable head 2 of layer 1").check()
    play.page.wait_for_selector("#without .before", state="attached")
    assert play.page.locator("#without li").all_text_contents() != next_tokens
    play.page.get_by_role("radio", name="2", exact=True).check()
    play.page.wait_for_selector("#attends:has-text('Layer 2')")


def test_through_its_life(play: PlayPage, served: PlayServer) -> None:
    play.open_tab("Training")
    play.page.wait_for_selector("#curve .val", state="attached")
    guess = f"ln {served.get('/api/run').json()['vocab_size']}"
    assert guess in play.page.text_content("#curve")
    titles = play.page.locator("#ages h3").all_text_contents()
    assert titles == ["step 0 (untrained)", "step 8", "step 12"]
    play.page.fill("#life-prompt", "to be")
    play.page.get_by_role("button", name="Generate at every snapshot").click()
    play.page.wait_for_selector("#life-state:has-text('same seed')")
    texts = play.page.locator("#ages span").all_text_contents()
    assert all(text.startswith("to be") and len(text) > 20 for text in texts)
    assert len(set(texts)) == 3
    assert play.page.locator("#samples li").count() == 3


def test_a_training_is_seen_growing(browser: Any, tmp_path: Path, trained: Path) -> None:
    """Nobody reloads, and the trainer is asked nothing: these are its files."""
    folder = tmp_path / "young"
    shutil.copytree(trained / "runs" / "done", folder)
    for name in ("checkpoints", "snapshots", "samples.txt"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    with serve_run(folder) as server:
        play = PlayPage(browser, server)
        assert play.page.is_visible("#life"), "it can do nothing else yet"
        assert play.page.is_disabled("#go")
        play.page.wait_for_selector("#course-says:has-text('Step 2 of 12')")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(lines[1:3]))
        (folder / "samples.txt").write_text("--- step 4\nto be\n\n")
        play.page.wait_for_selector("#course-says:has-text('Step 6 of 12')")
        play.page.wait_for_selector("#samples:has-text('to be')")
        shutil.copytree(trained / "runs/done/checkpoints", folder / "checkpoints")
        play.page.wait_for_selector("#go:enabled", state="attached")
        assert "step 12" in play.page.text_content("#facts")
        assert play.page.is_visible("#life"), "it stays where it is"
        assert play.console_messages == []
        play.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1600, "light")])
def test_for_every_eye(
    browser: Any, bytes_served: PlayServer, width: int, scheme: str, tmp_path: Path
) -> None:
    """Names for screen readers, contrast, nothing that sticks out, and nothing fetched."""
    play = PlayPage(browser, bytes_served, width, scheme)
    play.write("Grüße, ação 🙂 \v\x1f\u200b\xa0", 40)
    for name, selector in (
        ("Generate", "#next li"),
        ("Inspect", "#lens tbody tr"),
        ("Training", "#ages li"),
    ):
        play.open_tab(name)
        play.page.wait_for_selector(selector, state="attached")
        assert play.page.evaluate("document.documentElement.scrollWidth") <= width
        play.page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
        results = axe.Axe().run(play.page)
        assert results.violations_count == 0, results.generate_report()
    assert {url.split("/")[2] for url in play.requested_urls if not url.startswith("data:")} == {
        f"127.0.0.1:{bytes_served.port}"
    }
    assert KEY not in "".join(play.requested_urls)
    assert KEY not in play.page.url
    assert play.console_messages == []
    play.context.close()


@pytest.mark.parametrize(
    "prompt", ["Übermäßig große Straßen: ", "São Paulo não é aí, avó: ", "日本 🙂👩‍👩‍👧 "]
)
def test_any_text_in_the_world(browser: Any, bytes_served: PlayServer, prompt: str) -> None:
    play = PlayPage(browser, bytes_served)
    play.write(prompt, 10)
    prompt_tokens = "".join(play.page.locator("#story .token.given").all_text_contents())
    shown_text = "".join(part for part in prompt_tokens.split("<") if part)
    for character in prompt.strip():
        assert character in shown_text
    new_tokens = int(str(play.page.text_content("#state")).split()[0])  # fewer if it ends early
    assert 1 <= new_tokens <= 10
    assert play.page.locator("#story .token").count() == len(prompt.encode()) + 1 + new_tokens
    play.page.hover("#story .token:last-child")
    assert play.page.locator("#alternatives li").count() == 12
    assert play.console_messages == []
    play.context.close()


def test_characters_it_has_never_seen(browser: Any, served: PlayServer) -> None:
    play = PlayPage(browser, served)
    play.page.fill("#prompt", "Ж")
    play.page.click("#go")
    assert "does not know these characters: 'Ж'" in play.problem()
    assert play.write("to be", 3), "it still generates"
    assert play.page.text_content("#problem") == ""
    play.context.close()


def test_a_reload_in_the_middle(play: PlayPage) -> None:
    play.write("to be", 12)
    before = play.tokens()
    play.page.fill("#max-tokens", "4000")
    play.page.click("#more")
    play.page.wait_for_selector("#story .token:nth-child(40)")
    play.page.reload()
    play.page.wait_for_selector("body[data-ready]")
    assert play.tokens()[: len(before)] == before
    assert len(play.tokens()) >= 40
    assert play.page.input_value("#prompt") == "to be"
    play.page.fill("#max-tokens", "5")
    play.page.click("#more")
    play.wait_until_done()
    assert play.tokens()[: len(before)] == before


def test_stop_stops(play: PlayPage) -> None:
    play.page.fill("#prompt", "to")
    play.page.fill("#max-tokens", "4000")
    play.page.click("#go")
    play.page.wait_for_selector("#story .token:nth-child(20)")
    play.page.click("#stop")
    play.page.wait_for_selector("#state:has-text('stopped')")
    assert len(play.tokens()) < 3900


def test_a_run_that_is_deleted_under_it(browser: Any, tmp_path: Path, trained: Path) -> None:
    with serve_run_copy(trained, tmp_path / "doomed") as server:
        play = PlayPage(browser, server)
        play.write("to be", 3)
        shutil.rmtree(server.folder)
        play.open_tab("Training")
        assert "no longer exists" in play.problem()
        play.open_tab("Generate")
        assert play.write("or not", 3).startswith("or not"), "an open page continues"
    play.page.click("#go")
    play.page.wait_for_selector("#problem:has-text('is not responding')")
    play.context.close()


def test_without_the_key(browser: Any, served: PlayServer) -> None:
    page = browser.new_page()
    page.goto(served.address)
    page.wait_for_selector("#problem:has-text('needs its API key')")
    page.goto(f"{served.address}/#another")
    page.reload()
    page.wait_for_selector("#problem:has-text('the API key is missing or wrong')")
    page.close()


def test_what_is_in_a_run_is_text(browser: Any, tmp_path: Path, trained: Path) -> None:
    """Of a stranger's run nothing is taken for a part of the page."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(trained / "runs" / "done", folder)
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    (folder / "samples.txt").write_text(f"--- step 4\n{hostile}\n\n")
    lines = [{"step": 4, "loss": 1.0, hostile: hostile}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with serve_run(folder) as server:
        play = PlayPage(browser, server)
        play.page.on("dialog", lambda dialog: play.console_messages.append(dialog.message))
        play.open_tab("Training")
        play.page.wait_for_selector("#samples li")
        assert hostile in play.page.text_content("#samples")
        assert play.page.locator("img").count() == 0
        assert play.console_messages == []
        play.context.close()
