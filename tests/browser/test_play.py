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
from tests.helpers.play_server import KEY, Served, playing, serving
from tests.helpers.tiny_models import lively

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[Served]:
    with playing(trained, tmp_path_factory.mktemp("played") / "done") as there:
        yield there


@pytest.fixture(scope="module")
def bytes_served(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Iterator[Served]:
    """A model of bytes, with any text in the world; a character is up to four of its tokens."""
    folder = tmp_path_factory.mktemp("bytes") / "bytes"
    config = override_config(tiny, {"vocab_size": 257, "block_size": 64, "n_layer": 3}).model
    model = lively(override_config(tiny, {"vocab_size": 257, "block_size": 64, "n_layer": 3}))
    parameters = dict(tree_flatten(model.parameters()))
    create_imported_run(ImportedModel(config, parameters, BPETokenizer([]), True), folder)
    with serving(folder) as there:
        yield there


class Seen:
    """A page, and what it said that a person does not see."""

    def __init__(self, browser: Any, at: Served, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(f"{at.address}/#{KEY}")
        self.page.wait_for_selector("body[data-ready]")

    def write(self, prompt: str, tokens: int = 30) -> str:
        """Let it write, to the end; the text."""
        self.page.fill("#prompt", prompt)
        self.page.fill("#max-tokens", str(tokens))
        self.page.click("#go")
        self.ended()
        return self.text()

    def ended(self) -> None:
        self.page.wait_for_selector("#state:has-text('seed')")
        self.page.wait_for_selector("#stop:disabled")

    def text(self) -> str:
        return str(self.page.text_content("#story"))

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def problem(self) -> str:
        self.page.wait_for_selector("#problem:not(:empty)")
        return str(self.page.text_content("#problem"))

    def tokens(self) -> list[str]:
        return list(self.page.locator("#story .token").all_text_contents())


@pytest.fixture
def seen(browser: Any, served: Served) -> Iterator[Seen]:
    made = Seen(browser, served)
    yield made
    assert made.said == []
    made.context.close()


def test_another_branch_by_mouse(seen: Seen) -> None:
    before = seen.write("to be")
    assert before.startswith("to be")
    tokens = seen.tokens()
    assert len(tokens) == 35
    seen.page.hover("#story .token:nth-child(12)")
    others = seen.page.locator("#alternatives button")
    assert others.count() == 12
    assert "could have been" in seen.page.text_content("#other-title")
    names = seen.page.locator("#alternatives code").all_text_contents()
    other = next(n for n, name in enumerate(names) if name not in (tokens[11], "␣", "⏎"))
    others.nth(other).click()
    seen.ended()
    after = seen.tokens()
    assert after[:11] == tokens[:11]
    assert after[11] == names[other] != tokens[11]
    assert len(after) == 12 + 30
    assert seen.page.get_attribute("#story .token:nth-child(3)", "aria-label")
    seen.page.hover("#story .token:nth-child(2)")
    assert "given" in seen.page.text_content("#other-hint")


def test_all_of_it_by_keys(seen: Seen) -> None:
    keyboard = seen.page.keyboard
    seen.page.focus("#prompt")
    seen.page.fill("#max-tokens", "20")
    seen.page.focus("#prompt")
    keyboard.press("Control+A")
    keyboard.type("or not")
    keyboard.press("Tab")
    keyboard.press("Enter")
    seen.ended()
    assert seen.text().startswith("or not")
    active = "document.activeElement"
    for _ in range(8):
        keyboard.press("Tab")
        if seen.page.locator(".token:focus").count():
            break
    assert seen.page.locator(".token:focus").count() == 1
    keyboard.press("End")
    keyboard.press("ArrowLeft")
    assert seen.page.evaluate(f"{active}.dataset.n") == "24"
    keyboard.press("Enter")
    assert seen.page.evaluate(f"{active}.parentElement.parentElement.id") == "alternatives"
    keyboard.press("ArrowDown")
    chosen = seen.page.evaluate(f"{active}.querySelector('code').textContent")
    keyboard.press("Escape")
    assert seen.page.evaluate(f"{active}.dataset.n") == "24"
    keyboard.press("Enter")
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    seen.ended()
    assert seen.tokens()[24].replace(" ", "␣").replace("\n", "") == chosen
    seen.page.focus("#tab-write")
    keyboard.press("ArrowRight")
    assert seen.page.is_visible("#inside")
    keyboard.press("End")
    assert seen.page.is_visible("#life")
    seen.page.wait_for_selector("#age-says:has-text('after')")  # its ages are there
    seen.page.focus("#age")
    keyboard.press("Home")
    seen.page.wait_for_selector("#age-says:has-text('before the first step')")


def test_settings_show_what_they_leave(seen: Seen) -> None:
    seen.write("to be")
    assert seen.page.locator("#next li").count() == 12
    seen.page.focus("#top_k")
    seen.page.keyboard.press("Home")
    seen.page.keyboard.press("ArrowRight")
    seen.page.wait_for_selector("#next li:nth-child(1):has-text('→ 100 %')")
    shares = seen.page.locator("#next li span:last-child").all_text_contents()
    assert [share.split("→ ")[1] for share in shares] == ["100 %"] + ["0.0 %"] * 11


def test_no_answer_waits_for_another_one(seen: Seen) -> None:
    seen.write("to be", 2)
    seen.page.route("**/api/lens", lambda route: None)  # never answered
    seen.tab("Look inside")
    seen.page.wait_for_selector("#neighbours li:nth-child(12)")
    assert seen.page.locator("#lens tbody tr").count() == 0


def test_looking_inside(seen: Seen) -> None:
    seen.write("to be", 2)
    seen.tab("Look inside")
    seen.page.wait_for_selector("#seen .token:nth-child(7)")
    assert seen.page.locator(".head").count() == 2
    seen.page.hover("#seen .token:nth-child(6)")
    seen.page.wait_for_selector("#lines path", state="attached")
    says = seen.page.text_content("#attends")
    assert says.startswith("Layer 1, head 1: ")
    seen.page.wait_for_selector("#lens tbody tr:nth-child(3)")
    assert seen.page.locator("#lens th[scope=row]").all_text_contents() == [
        "embedding",
        "layer 1",
        "layer 2",
    ]
    seen.page.wait_for_selector("#neighbours li:nth-child(12)")
    seen.page.get_by_role("radio", name="a heat map").check()
    assert seen.page.locator("#lines path").count() == 0
    shades = seen.page.evaluate(
        "[...document.querySelectorAll('#seen .token')].map(t => t.style.background !== '')"
    )
    assert any(shades[:6])
    assert not any(shades[6:]), "nobody looks ahead"
    usual = seen.page.locator("#without li").all_text_contents()
    seen.page.get_by_role("checkbox", name="head 2 of layer 1 off").check()
    seen.page.wait_for_selector("#without .before", state="attached")
    assert seen.page.locator("#without li").all_text_contents() != usual
    seen.page.get_by_role("radio", name="2", exact=True).check()
    seen.page.wait_for_selector("#attends:has-text('Layer 2')")


def test_through_its_life(seen: Seen, served: Served) -> None:
    seen.tab("Through its life")
    seen.page.wait_for_selector("#curve .val", state="attached")
    guess = f"ln {served.get('/api/run').json()['vocab_size']}"
    assert guess in seen.page.text_content("#curve")
    titles = seen.page.locator("#ages h3").all_text_contents()
    assert titles == ["before the first step", "after 8 steps", "after 12 steps"]
    seen.page.fill("#life-prompt", "to be")
    seen.page.get_by_role("button", name="Write at every age").click()
    seen.page.wait_for_selector("#life-state:has-text('same seed')")
    texts = seen.page.locator("#ages span").all_text_contents()
    assert all(text.startswith("to be") and len(text) > 20 for text in texts)
    assert len(set(texts)) == 3
    assert seen.page.locator("#samples li").count() == 3


def test_a_training_is_seen_growing(browser: Any, tmp_path: Path, trained: Path) -> None:
    """Nobody reloads, and the trainer is asked nothing: these are its files."""
    folder = tmp_path / "young"
    shutil.copytree(trained / "runs" / "done", folder)
    for name in ("checkpoints", "snapshots", "samples.txt"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    with serving(folder) as at:
        seen = Seen(browser, at)
        assert seen.page.is_visible("#life"), "it can do nothing else yet"
        assert seen.page.is_disabled("#go")
        seen.page.wait_for_selector("#course-says:has-text('Step 2 of 12')")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(lines[1:3]))
        (folder / "samples.txt").write_text("--- step 4\nto be\n\n")
        seen.page.wait_for_selector("#course-says:has-text('Step 6 of 12')")
        seen.page.wait_for_selector("#samples:has-text('to be')")
        shutil.copytree(trained / "runs/done/checkpoints", folder / "checkpoints")
        seen.page.wait_for_selector("#go:enabled", state="attached")
        assert "after 12 steps" in seen.page.text_content("#facts")
        assert seen.page.is_visible("#life"), "it stays where it is"
        assert seen.said == []
        seen.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1600, "light")])
def test_for_every_eye(
    browser: Any, bytes_served: Served, width: int, scheme: str, tmp_path: Path
) -> None:
    """Names for screen readers, contrast, nothing that sticks out, and nothing fetched."""
    seen = Seen(browser, bytes_served, width, scheme)
    seen.write("Grüße, ação 🙂 \v\x1f\u200b\xa0", 40)
    for name, there in (
        ("Write", "#next li"),
        ("Look inside", "#lens tbody tr"),
        ("Through its life", "#ages li"),
    ):
        seen.tab(name)
        seen.page.wait_for_selector(there, state="attached")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        seen.page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
        results = axe.Axe().run(seen.page)
        assert results.violations_count == 0, results.generate_report()
    assert {url.split("/")[2] for url in seen.asked if not url.startswith("data:")} == {
        f"127.0.0.1:{bytes_served.port}"
    }
    assert KEY not in "".join(seen.asked)
    assert KEY not in seen.page.url
    assert seen.said == []
    seen.context.close()


@pytest.mark.parametrize(
    "prompt", ["Übermäßig große Straßen: ", "São Paulo não é aí, avó: ", "日本 🙂👩‍👩‍👧 "]
)
def test_any_text_in_the_world(browser: Any, bytes_served: Served, prompt: str) -> None:
    seen = Seen(browser, bytes_served)
    seen.write(prompt, 10)
    given = "".join(seen.page.locator("#story .token.given").all_text_contents())
    shown = "".join(part for part in given.split("<") if part)
    for character in prompt.strip():
        assert character in shown
    written = int(str(seen.page.text_content("#state")).split()[0])  # fewer if it ends early
    assert 1 <= written <= 10
    assert seen.page.locator("#story .token").count() == len(prompt.encode()) + 1 + written
    seen.page.hover("#story .token:last-child")
    assert seen.page.locator("#alternatives li").count() == 12
    assert seen.said == []
    seen.context.close()


def test_characters_it_has_never_seen(browser: Any, served: Served) -> None:
    seen = Seen(browser, served)
    seen.page.fill("#prompt", "Ж")
    seen.page.click("#go")
    assert "never seen: 'Ж'" in seen.problem()
    assert seen.write("to be", 3), "and it goes on"
    assert seen.page.text_content("#problem") == ""
    seen.context.close()


def test_a_reload_in_the_middle(seen: Seen) -> None:
    seen.write("to be", 12)
    before = seen.tokens()
    seen.page.fill("#max-tokens", "4000")
    seen.page.click("#more")
    seen.page.wait_for_selector("#story .token:nth-child(40)")
    seen.page.reload()
    seen.page.wait_for_selector("body[data-ready]")
    assert seen.tokens()[: len(before)] == before
    assert len(seen.tokens()) >= 40
    assert seen.page.input_value("#prompt") == "to be"
    seen.page.fill("#max-tokens", "5")
    seen.page.click("#more")
    seen.ended()
    assert seen.tokens()[: len(before)] == before


def test_stop_stops(seen: Seen) -> None:
    seen.page.fill("#prompt", "to")
    seen.page.fill("#max-tokens", "4000")
    seen.page.click("#go")
    seen.page.wait_for_selector("#story .token:nth-child(20)")
    seen.page.click("#stop")
    seen.page.wait_for_selector("#state:has-text('stopped')")
    assert len(seen.tokens()) < 3900


def test_a_run_that_is_deleted_under_it(browser: Any, tmp_path: Path, trained: Path) -> None:
    with playing(trained, tmp_path / "doomed") as at:
        seen = Seen(browser, at)
        seen.write("to be", 3)
        shutil.rmtree(at.folder)
        seen.tab("Through its life")
        assert "is gone" in seen.problem()
        seen.tab("Write")
        assert seen.write("or not", 3).startswith("or not"), "what was read goes on"
    seen.page.click("#go")
    seen.page.wait_for_selector("#problem:has-text('does not answer')")
    seen.context.close()


def test_without_the_key(browser: Any, served: Served) -> None:
    page = browser.new_page()
    page.goto(served.address)
    page.wait_for_selector("#problem:has-text('needs its key')")
    page.goto(f"{served.address}/#another")
    page.reload()
    page.wait_for_selector("#problem:has-text('the key is missing or another one')")
    page.close()


def test_what_is_in_a_run_is_text(browser: Any, tmp_path: Path, trained: Path) -> None:
    """Of a stranger's run nothing is taken for a part of the page."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(trained / "runs" / "done", folder)
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    (folder / "samples.txt").write_text(f"--- step 4\n{hostile}\n\n")
    lines = [{"step": 4, "loss": 1.0, hostile: hostile}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    with serving(folder) as at:
        seen = Seen(browser, at)
        seen.page.on("dialog", lambda dialog: seen.said.append(dialog.message))
        seen.tab("Through its life")
        seen.page.wait_for_selector("#samples li")
        assert hostile in seen.page.text_content("#samples")
        assert seen.page.locator("img").count() == 0
        assert seen.said == []
        seen.context.close()
