"""Portuguese texts of the web UI, served and in an exported file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlxgpt.cli import main as cli
from mlxgpt.config import Config, override_config
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.playground import server
from mlxgpt.playground.ui_api import STATIC_DIR, _explain_first_loss
from tests.helpers.play_server import serve_run
from tests.helpers.tiny_models import create_random_run

TEMPLATE = re.compile(r"\bt`((?:[^`$]|\$\{(?:[^{}`]|`[^`]*`)*\}|\$)*)`")
VALUE = re.compile(r"\$\{(?:[^{}]|\{[^{}]*\})*\}")
PRODUCT = {"mlxgpt play", "mlxgpt play:"}
ABOUT = {
    *("architecture", "trained on", "training steps", "training tokens", "weights"),
    *("initialized from", "loss of these weights", "loss with 32 bits", "exported"),
    *(f"validation loss, nats per {item}" for item in ("token", "pair")),
}


def read_sources() -> dict[str, str]:
    paths = (path for path in STATIC_DIR.glob("*.js") if not path.name.startswith("d3-"))
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def read_table(source: str) -> dict[str, str]:
    lines = re.findall(r'^  "(?:[^"\\]|\\.)*": "(?:[^"\\]|\\.)*",$', source, flags=re.MULTILINE)
    table = [json.loads(f"{{{line[:-1]}}}") for line in lines]
    merged = {key: text for entry in table for key, text in entry.items()}
    assert len(merged) == len(table), "no key twice"
    return merged


def find_page_texts() -> set[str]:
    """Texts and labels of index.html, with the parts that only a server or a file has."""
    page = (STATIC_DIR / "index.html").read_text(encoding="utf-8")
    page = re.sub(r"<!-- /?server -->|<!-- file|/file -->", "", page)
    page = re.sub(r"<(script)\b.*?</\1>", "", page, flags=re.DOTALL)
    labels = re.findall(r'(?:aria-label|placeholder|title|alt)="([^"]*)"', page)
    texts = [" ".join(text.split()) for text in re.findall(r">([^<]+)<", page)]
    return {text for text in (*labels, *texts) if re.search("[a-z]{2}", text)} - PRODUCT


def find_server_texts(config: Config) -> set[str]:
    """Texts from the server or the file that the page translates."""
    config = override_config(config, {"vocab_size": 65})
    paired = override_config(config, {"beta": 0.1})
    texts = ABOUT | {config.loss_unit, paired.loss_unit}
    for first_loss in map(_explain_first_loss, (config, paired)):
        texts |= {first_loss["label"], first_loss["reason"]}
    return texts


def test_every_text_of_the_page_has_a_translation(tiny: Config) -> None:
    """And no translation is left over."""
    sources = read_sources()
    table = read_table(sources.pop("language.js"))
    used = {
        VALUE.sub("{}", template).replace("\\n", "\n")
        for source in sources.values()
        for template in TEMPLATE.findall(source)
    }
    assert len(used) > 45
    texts = used | find_page_texts() | find_server_texts(tiny)
    assert texts == set(table), texts ^ set(table)
    for text, translation in table.items():
        assert translation.count("{}") == text.count("{}"), text


def test_scripts_have_no_other_english_texts() -> None:
    """Literals with two words or more go through t, except code."""
    sources = read_sources()
    del sources["language.js"]
    for name, source in sources.items():
        code = re.sub(r"(^|\s)//.*", "", TEMPLATE.sub("", source))
        literals = re.findall(r'"([^"\n]*)"|`([^`]*)`', code)
        texts = {VALUE.sub("", text) for pair in literals for text in pair}
        english = {text for text in texts if re.search(r"[A-Za-z]{2,}[,;:]? [a-z]{2,}", text)}
        assert english <= {"mlxgpt play: "}, (name, english)


def test_the_page_has_the_chosen_language(tiny: Config, tmp_path: Path) -> None:
    create_random_run(
        tmp_path / "run", override_config(tiny, {"vocab_size": 257}), BPETokenizer([])
    )
    for lang, tag in ((None, '<html lang="en">'), ("pt", '<html data-lang="pt" lang="en">')):
        with serve_run(tmp_path / "run", lang) as play_server:
            assert tag in play_server.get("/").text


def test_lang_is_passed_to_the_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    languages: list[str | None] = []
    monkeypatch.setattr(server, "create_app", lambda *args: languages.append(args[-1]))
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: None)
    for flags in ([], ["--lang", "en"], ["--lang", "pt"]):
        assert cli.main(["play", "--no-browser", "--port", "0", *flags]) == 0
    assert languages == [None, "en", "pt"]
    assert cli.main(["play", "--lang", "de"]) == 2
