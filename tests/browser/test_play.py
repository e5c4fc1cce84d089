"""`mlxgpt play` in Chromium: mouse, keyboard and accessibility."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.config import Config, override_config
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from tests.helpers.play_page import PlayPage, axe
from tests.helpers.play_server import KEY, PlayServer, serve_run, serve_run_copy
from tests.helpers.tiny_models import create_random_run

pytestmark = pytest.mark.filterwarnings("ignore")  # from playwright and axe


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[PlayServer]:
    with serve_run_copy(trained, tmp_path_factory.mktemp("played") / "done") as server:
        yield server


@pytest.fixture(scope="module")
def bytes_served(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[PlayServer]:
    """Server of a byte-level model: it accepts any text; a character has up to four tokens."""
    folder = tmp_path_factory.mktemp("bytes") / "bytes"
    config = override_config(tiny, {"vocab_size": 257, "block_size": 64, "n_layer": 3})
    create_random_run(folder, config, BPETokenizer([]))
    with serve_run(folder) as server:
        yield server


@pytest.fixture
def play(browser: Any, served: PlayServer) -> Iterator[PlayPage]:
    page = PlayPage(browser, served)
    yield page
    assert page.console_messages == []
    page.context.close()


def test_tokens_within_a_ligature_have_a_width(play: PlayPage) -> None:
    """Fonts draw "fl" as one glyph."""
    play.generate("to befl")
    widths = play.page.locator("#generated-text .token").evaluate_all(
        "tokens => tokens.map((token) => token.getBoundingClientRect().width)"
    )
    assert len(widths) == 37
    assert min(widths[:7]) > 0


def test_a_run_without_a_reference_is_not_compared(play: PlayPage) -> None:
    assert not play.page.is_visible("#compare")


def test_selecting_an_alternative_with_the_mouse(play: PlayPage) -> None:
    before = play.generate("to be")
    assert before.startswith("to be")
    tokens = play.tokens()
    assert len(tokens) == 35
    play.page.hover("#generated-text .token:nth-child(12)")
    alternatives = play.page.locator("#alternatives button")
    assert alternatives.count() == 12
    assert "Alternatives to" in play.page.text_content("#alternatives-title")
    names = play.page.locator("#alternatives code").all_text_contents()
    index = next(n for n, name in enumerate(names) if name not in (tokens[11], "␣", "⏎"))
    alternatives.nth(index).click()
    play.wait_until_done()
    after = play.tokens()
    assert after[:11] == tokens[:11]
    assert after[11] == names[index] != tokens[11]
    assert len(after) == 12 + 30
    assert play.page.get_attribute("#generated-text .token:nth-child(3)", "aria-label")
    play.page.hover("#generated-text .token:nth-child(2)")
    assert "part of the prompt" in play.page.text_content("#alternatives-hint")


def test_keyboard_navigation(play: PlayPage) -> None:
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
    assert play.page.evaluate(f"{active}.dataset.index") == "24"
    keyboard.press("Enter")
    assert play.page.evaluate(f"{active}.parentElement.parentElement.id") == "alternatives"
    keyboard.press("ArrowDown")
    chosen = play.page.evaluate(f"{active}.querySelector('code').textContent")
    keyboard.press("Escape")
    assert play.page.evaluate(f"{active}.dataset.index") == "24"
    keyboard.press("Enter")
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    play.wait_until_done()
    assert play.tokens()[24].replace(" ", "␣").replace("\n", "") == chosen
    play.page.focus("#tab-generate")
    keyboard.press("ArrowRight")
    assert play.page.is_visible("#inspect")
    keyboard.press("End")
    assert play.page.is_visible("#training")
    play.page.wait_for_selector("#snapshot-label:has-text('step 12')")  # snapshots have loaded
    play.page.focus("#snapshot")
    keyboard.press("Home")
    play.page.wait_for_selector("#snapshot-label:has-text('untrained')")


def test_next_tokens_show_the_effect_of_sampling_settings(play: PlayPage) -> None:
    play.generate("to be")
    assert play.page.locator("#next-tokens li").count() == 12
    play.page.focus("#top_k")
    play.page.keyboard.press("Home")
    play.page.keyboard.press("ArrowRight")
    play.page.wait_for_selector("#next-tokens li:nth-child(1):has-text('→ 100%')")
    shares = play.page.locator("#next-tokens li span:last-child").all_text_contents()
    assert [share.split("→ ")[1] for share in shares] == ["100%"] + ["0.0%"] * 11


def test_panels_do_not_wait_for_each_other(play: PlayPage) -> None:
    play.generate("to be", 2)
    play.page.route("**/api/lens", lambda route: None)  # never responds
    play.open_tab("Inspect")
    play.page.wait_for_selector("#neighbors li:nth-child(12)")
    assert play.page.locator("#lens tbody tr").count() == 0


def test_inspect_tab(play: PlayPage) -> None:
    play.generate("to be", 2)
    play.open_tab("Inspect")
    play.page.wait_for_selector("#inspected-text .token:nth-child(7)")
    assert play.page.locator(".head").count() == 2
    play.page.hover("#inspected-text .token:nth-child(6)")
    play.page.wait_for_selector("#attention-lines path", state="attached")
    caption = play.page.text_content("#attention-summary")
    assert caption.startswith("Layer 1, head 1: ")
    play.page.wait_for_selector("#lens tbody tr:nth-child(3)")
    assert play.page.locator("#lens th[scope=row]").all_text_contents() == [
        "embedding",
        "layer 1",
        "layer 2",
    ]
    play.page.wait_for_selector("#neighbors li:nth-child(12)")
    play.page.get_by_role("radio", name="a heat map").check()
    assert play.page.locator("#attention-lines path").count() == 0
    is_shaded = play.page.evaluate(
        "[...document.querySelectorAll('#inspected-text .token')]"
        ".map((token) => token.style.background !== '')"
    )
    assert any(is_shaded[:6])
    assert not any(is_shaded[6:]), "attention is causal"
    next_tokens = play.page.locator("#ablated-next-tokens li").all_text_contents()
    play.page.get_by_role("checkbox", name="disable head 2 of layer 1").check()
    play.page.wait_for_selector("#ablated-next-tokens .thin", state="attached")
    assert play.page.locator("#ablated-next-tokens li").all_text_contents() != next_tokens
    play.page.get_by_role("radio", name="2", exact=True).check()
    play.page.wait_for_selector("#attention-summary:has-text('Layer 2')")


def test_training_tab(play: PlayPage, served: PlayServer) -> None:
    play.open_tab("Training")
    play.page.wait_for_selector("#loss-curve .val-loss", state="attached")
    uniform_loss = served.get("/api/curves").json()["start"]["label"]
    assert uniform_loss in play.page.text_content("#loss-curve")
    titles = play.page.locator("#snapshots h3").all_text_contents()
    assert titles == ["step 0 (untrained)", "step 8", "step 12"]
    play.page.fill("#snapshots-prompt", "to be")
    play.page.get_by_role("button", name="Generate at every snapshot").click()
    play.page.wait_for_selector("#snapshots-status:has-text('same seed')")
    texts = play.page.locator("#snapshots span").all_text_contents()
    assert all(text.startswith("to be") and len(text) > 20 for text in texts)
    assert len(set(texts)) == 3
    assert play.page.locator("#samples li").count() == 3


def test_training_tab_follows_a_run_in_progress(
    browser: Any, tmp_path: Path, trained: Path
) -> None:
    """Without a reload of the page; all data comes from the run's files."""
    folder = tmp_path / "unfinished"
    shutil.copytree(trained / "runs" / "done", folder)
    for name in ("checkpoints", "snapshots", "samples.txt"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    with serve_run(folder) as server:
        play = PlayPage(browser, server)
        assert play.page.is_visible("#training"), "the tab that works without a checkpoint"
        assert play.page.is_disabled("#generate-button")
        play.page.wait_for_selector("#training-progress:has-text('Step 2 of 12')")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(lines[1:3]))
        (folder / "samples.txt").write_text("--- step 4\nto be\n\n")
        play.page.wait_for_selector("#training-progress:has-text('Step 6 of 12')")
        play.page.wait_for_selector("#samples:has-text('to be')")
        shutil.copytree(trained / "runs/done/checkpoints", folder / "checkpoints")
        play.page.wait_for_selector("#generate-button:enabled", state="attached")
        assert "step 12" in play.page.text_content("#run-info")
        assert play.page.is_visible("#training"), "the tab does not change"
        assert play.console_messages == []
        play.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1600, "light")])
def test_accessibility_and_layout(
    browser: Any, bytes_served: PlayServer, width: int, scheme: str, tmp_path: Path
) -> None:
    """No axe violations, no horizontal overflow, no requests to other hosts."""
    play = PlayPage(browser, bytes_served, width, scheme)
    play.generate("Grüße, ação 🙂 \v\x1f\u200b\xa0", 40)
    for name, selector in (
        ("Generate", "#next-tokens li"),
        ("Inspect", "#lens tbody tr"),
        ("Training", "#snapshots li"),
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
def test_unicode_prompts(browser: Any, bytes_served: PlayServer, prompt: str) -> None:
    play = PlayPage(browser, bytes_served)
    play.generate(prompt, 10)
    prompt_tokens = "".join(play.page.locator("#generated-text .token.prompt").all_text_contents())
    shown_text = "".join(part for part in prompt_tokens.split("<") if part)
    for character in prompt.strip():
        assert character in shown_text
    new_tokens = int(
        str(play.page.text_content("#generate-status")).split()[0]
    )  # fewer after an end-of-text
    assert 1 <= new_tokens <= 10
    assert (
        play.page.locator("#generated-text .token").count() == len(prompt.encode()) + 1 + new_tokens
    )
    play.page.hover("#generated-text .token:last-child")
    assert play.page.locator("#alternatives li").count() == 12
    assert play.console_messages == []
    play.context.close()


def test_unknown_characters_are_reported(browser: Any, served: PlayServer) -> None:
    play = PlayPage(browser, served)
    play.page.fill("#prompt", "Ж")
    play.page.click("#generate-button")
    assert "does not know these characters: 'Ж'" in play.error()
    assert play.generate("to be", 3), "generation still works"
    assert play.page.text_content("#error") == ""
    play.context.close()


def test_text_survives_a_reload_during_generation(play: PlayPage) -> None:
    play.generate("to be", 12)
    before = play.tokens()
    play.page.fill("#max-tokens", "4000")
    play.page.click("#continue-button")
    play.page.wait_for_selector("#generated-text .token:nth-child(40)")
    play.page.reload()
    play.page.wait_for_selector("body[data-ready]")
    assert play.tokens()[: len(before)] == before
    assert len(play.tokens()) >= 40
    assert play.page.input_value("#prompt") == "to be"
    play.page.fill("#max-tokens", "5")
    play.page.click("#continue-button")
    play.wait_until_done()
    assert play.tokens()[: len(before)] == before


def test_stop_button(play: PlayPage) -> None:
    play.page.fill("#prompt", "to")
    play.page.fill("#max-tokens", "4000")
    play.page.click("#generate-button")
    play.page.wait_for_selector("#generated-text .token:nth-child(20)")
    play.page.click("#stop-button")
    play.page.wait_for_selector("#generate-status:has-text('stopped')")
    assert len(play.tokens()) < 3900


def test_run_deleted_while_it_is_served(browser: Any, tmp_path: Path, trained: Path) -> None:
    with serve_run_copy(trained, tmp_path / "deleted") as server:
        play = PlayPage(browser, server)
        play.generate("to be", 3)
        shutil.rmtree(server.folder)
        play.open_tab("Training")
        assert "no longer exists" in play.error()
        play.open_tab("Generate")
        assert play.generate("or not", 3).startswith("or not"), "cached models still generate"
    play.page.click("#generate-button")
    play.page.wait_for_selector("#error:has-text('is not responding')")
    play.context.close()


def test_wrong_or_missing_api_key(browser: Any, served: PlayServer) -> None:
    page = browser.new_page()
    page.goto(served.address)
    page.wait_for_selector("#error:has-text('needs its API key')")
    page.goto(f"{served.address}/#another")
    page.reload()
    page.wait_for_selector("#error:has-text('the API key is missing or wrong')")
    page.close()


def test_html_in_run_files_is_escaped(browser: Any, tmp_path: Path, trained: Path) -> None:
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


def test_a_run_without_a_chat_template_has_no_chat(play: PlayPage) -> None:
    tabs = play.page.get_by_role("tab")
    assert tabs.all_text_contents() == ["Generate", "Inspect", "Training"]
    play.page.focus("#tab-generate")
    play.page.keyboard.press("ArrowRight")
    assert play.page.locator("#inspect").is_visible()
