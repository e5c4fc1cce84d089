"""Export to an HTML file: packed weights, joined modules, and the page's program in Node."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxgpt
from mlxgpt import api
from mlxgpt.cli.main import main
from mlxgpt.config import Config, override_config
from mlxgpt.convert import html
from mlxgpt.data.chat_template import CHATML, IM_END, IM_START, encode_chat, split_conversation
from mlxgpt.data.normalize import normalize_text
from mlxgpt.data.tokenizers.base import AddedToken, Tokenizer
from mlxgpt.data.tokenizers.bpe import BPETokenizer, train_bpe
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.data.tokenizers.tokenizer_json import add_special_tokens
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.model.parameters import flatten_params, load_parameters
from mlxgpt.storage import run as runs
from mlxgpt.storage.loading import load_model
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import Capture
from tests.helpers.tiny_models import create_random_run
from tests.helpers.training_runs import MODERN_PARTS, QWEN3_PARTS, train_fox_model

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
ENGINE = Path(__file__).parents[1] / "helpers" / "page_engine.mjs"
PARTS: dict[str, dict[str, Any]] = {
    "classic": {},
    "biased": {"bias": True, "tied": False},
    "relu2": {"mlp": "relu2", "value_embeddings": True},
    "modern": QWEN3_PARTS,
    "racing": MODERN_PARTS,
}
BPE = train_bpe(["the quick brown fox jumps over the lazy dog, naïve café 日本語! " * 30], 300)


def make_run(
    folder: Path, tiny: Config, tokenizer: Tokenizer, template: str | None = None, **settings: Any
) -> runs.Run:
    """Create an imported run with random weights, and a few rows more than tokens."""
    sizes = {"vocab_size": tokenizer.vocab_size + 3, "block_size": 32, "n_embd": 32, "dropout": 0.0}
    config = override_config(tiny, {**sizes, **settings})
    return create_random_run(folder, config, tokenizer, template)


def run_in_node(page: Path, tasks: list[dict[str, Any]], folder: Path) -> list[Any]:
    """Results of tasks for the program of a page; see page_engine.mjs."""
    modules = folder / "modules"
    if not modules.exists():
        shutil.copytree(html.STATIC_DIR, modules)
        (modules / "package.json").write_text('{"type": "module"}')
    command = ["node", str(ENGINE), str(page), str(modules)]
    output = subprocess.run(
        command, input=json.dumps(tasks), capture_output=True, text=True, check=True
    )
    results: list[Any] = json.loads(output.stdout)
    return results


@needs_node
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_logits_and_greedy_tokens_are_those_of_mlx(
    name: str, bits: int, tiny: Config, tmp_path: Path
) -> None:
    """With the same rounded weights."""
    run = make_run(tmp_path / "random", tiny, BPE, **PARTS[name])
    page = api.export_html(run=str(run.folder), quantize=bits, output=tmp_path / "m.html")
    gpt, _ = load_model(run)
    load_parameters(gpt, html.pack_weights(flatten_params(gpt.parameters()), bits).rounded)
    model = LoadedModel(run, gpt, 0)
    ids = np.random.default_rng(0).integers(0, BPE.vocab_size, 24)
    tasks: list[dict[str, Any]] = [{"logits": ids.tolist()}, {"greedy": "the fox", "count": 12}]
    logits, greedy = run_in_node(page.folder, tasks, tmp_path)
    expected = model.logits(ids)[:, : BPE.vocab_size]
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert np.ptp(expected) > 0.5
    outputs = model.iter_tokens("the fox", temperature=0.0, max_tokens=12)
    assert greedy == [output.id for output in outputs]


@needs_node
@pytest.mark.parametrize("name", ["classic", "modern", "racing"])
def test_texts_longer_than_the_context_are_those_of_mlx(
    name: str, tiny: Config, tmp_path: Path
) -> None:
    """A full context slides with rotary positions, and is read again from its middle without."""
    run = make_run(tmp_path / "random", tiny, BPE, **PARTS[name])
    page = api.export_html(run=str(run.folder), quantize=32, output=tmp_path / "m.html")
    (greedy,) = run_in_node(page.folder, [{"greedy": "the fox", "count": 90}], tmp_path)
    outputs = mlxgpt.load(str(run.folder)).iter_tokens("the fox", temperature=0.0, max_tokens=90)
    assert greedy == [output.id for output in outputs]
    assert len(greedy) > 32


@needs_node
def test_texts_generated_at_the_same_time_do_not_mix(tiny: Config, tmp_path: Path) -> None:
    """As in two tabs of the page."""
    run = make_run(tmp_path / "random", tiny, BPE, **PARTS["racing"])
    page = api.export_html(run=str(run.folder), output=tmp_path / "m.html")
    tasks = [{"greedy": text, "count": 20} for text in ("the quick brown fox", "jumps", "lazy dog")]
    *separate, together = run_in_node(page.folder, [*tasks, {"together": tasks}], tmp_path)
    assert together == separate


WHITE_SPACE = " \n\t\r\u0085\u00a0\u2003\u3000\ufeff"
CHARACTERS = [
    *map(chr, range(32, 127)),
    *"éñßçøÅ",
    "e\u0301",
    *"日本語한국어हिन्दीالعربيةελληνικά",
    *"😀👩\u200d🚀",
    *"½²Ⅷ٣",
    *WHITE_SPACE,
    "'s",
    "'LL",
    "\r\n",
]


def random_strings(count: int) -> list[str]:
    draw = random.Random(1)
    return ["".join(draw.choices(CHARACTERS, k=draw.randrange(25))) for _ in range(count)]


@needs_node
def test_texts_are_encoded_as_by_tiktoken(tiny: Config, tmp_path: Path) -> None:
    tokens = [AddedToken(300, "<|endoftext|>"), AddedToken(301, "fox!", special=False)]
    with_added = BPETokenizer(
        BPE.merges[:43],
        added_tokens=[replace(token, id=299 + n) for n, token in enumerate(tokens)],
        end_of_text=299,
    )
    for n, tokenizer in enumerate((BPE, with_added)):
        run = make_run(tmp_path / f"run{n}", tiny, tokenizer)
        page = api.export_html(run=str(run.folder), output=tmp_path / f"{n}.html")
        texts = [*random_strings(2000), "a fox! <|endoftext|>", " " * 50, "\ufeffa\r\nb\rc"]
        encoded = run_in_node(page.folder, [{"encode": text} for text in texts], tmp_path)
        for text, ids in zip(texts, encoded, strict=True):
            assert ids == tokenizer.encode(normalize_text(text)).tolist(), repr(text)


@needs_node
def test_characters_are_encoded_in_either_form(tiny: Config, tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abcé \n", end_of_text=False)
    run = make_run(tmp_path / "chars", tiny, tokenizer)
    page = api.export_html(run=str(run.folder), quantize=32, output=tmp_path / "m.html")
    tasks: list[dict[str, Any]] = [{"encode": "a e\u0301\r\nb"}]
    tasks += [{"greedy": "", "count": 3}]
    ids, greedy = run_in_node(page.folder, tasks, tmp_path)
    assert ids == tokenizer.encode("a é\nb").tolist()
    outputs = mlxgpt.load(str(run.folder)).iter_tokens("", temperature=0.0, max_tokens=3)
    assert greedy == [output.id for output in outputs]


@needs_node
def test_conversations_are_rendered_as_by_the_template(tiny: Config, tmp_path: Path) -> None:
    tokenizer = add_special_tokens(BPE, (IM_START, IM_END))
    run = make_run(tmp_path / "chat", tiny, tokenizer, CHATML, block_size=128)
    page = api.export_html(run=str(run.folder), quantize=32, output=tmp_path / "m.html")
    roles = ("user", "assistant", "user")
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, ("Hi!", f"a {IM_END} fox", "the\ndog?"), strict=True)
    ]
    (greedy,) = run_in_node(page.folder, [{"messages": messages, "count": 10}], tmp_path)
    model = mlxgpt.load(str(run.folder))
    ids = encode_chat(CHATML, messages, tokenizer)
    outputs = model.iter_tokens(ids, temperature=0.0, max_tokens=10)
    assert greedy == [output.id for output in outputs]


def test_templates_that_depend_on_other_messages_are_not_split() -> None:
    tokenizer = add_special_tokens(BPE, (IM_START, IM_END))
    pieces = split_conversation(CHATML, tokenizer)
    assert pieces is not None
    assert pieces["reply"].endswith("assistant\n")
    only_last = CHATML.replace("message['content']", "(message['content'] if loop.last else '')")
    numbered = CHATML.replace("message['role']", "message['role'] + loop.index|string")
    for template in (only_last, numbered, "{{ raise_exception('no') }}", "constant"):
        assert split_conversation(template, tokenizer) is None


@pytest.mark.parametrize("bits", html.HTML_BITS)
def test_weights_are_rounded_by_at_most_half_a_step(bits: int) -> None:
    matrix = np.random.default_rng(0).normal(0, 1, (5, 7)).astype(np.float32)
    matrix[2] = 0
    vector = matrix[0].copy()
    packed = html.pack_weights({"a": mx.array(matrix), "b": mx.array(vector)}, bits)
    rounded = np.array(packed.rounded["a"])
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    step = {32: 0.0, 16: 2**-10, 8: 1 / 127, 4: 1 / 7}[bits]
    assert (np.abs(rounded - matrix) <= largest * step / 2 + 1e-7).all()
    np.testing.assert_array_equal(np.array(packed.rounded["b"]), vector)
    sizes = {32: 140, 16: 72, 8: 20 + 36, 4: 20 + 20}
    assert len(packed.content) == sizes[bits] + 28


def test_the_policy_allows_only_the_pages_own_script(tiny: Config, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", tiny, BPE)
    text = api.export_html(run=str(run.folder), output=tmp_path / "m.html").folder.read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert not re.search(r"^(import|export) ", script, flags=re.MULTILINE)
    for word in ("fetch(", "XMLHttpRequest", "d3.", "localStorage", "https://"):
        assert word not in script, word


def test_hostile_names_and_samples_stay_text(tiny: Config, tmp_path: Path) -> None:
    name = "a<b></script><script>alert(1)<"
    run = make_run(tmp_path / name.replace("/", "∕"), tiny, BPE)
    run.add_sample(1, "</script><img src=x onerror=alert(1)>")
    text = api.export_html(run=str(run.folder), output=tmp_path / "m.html").folder.read_text()
    assert text.count("<script") == text.count("</script>") == 4
    assert "<img" not in text


def test_a_trained_run_says_what_it_is(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    train_fox_model(tmp_path, override_config(tiny, {"snapshots": True, "max_steps": 12}))
    assert main(["export", "fox", "--to", "html", "--snapshots", "3"]) == 0
    printed = capsys.readouterr()
    assert "exports/fox.html: the model after" in printed.out
    assert "nats per token" in printed.out
    assert "open it in a browser: file:///" in printed.err
    text = Path("exports/fox.html").read_text()
    (content,) = re.findall(r'id="model-info">(.*?)</script>', text)
    info = json.loads(content)
    about = dict(info["about"])
    assert about["trained on"] == "fox.txt"
    assert about["weights"].startswith("8 bits, ")
    loss = api.evaluate(run="fox").loss
    assert float(about["loss with 32 bits"]) == pytest.approx(loss, abs=1e-3)
    assert float(about["loss of these weights"]) == pytest.approx(loss, abs=0.05)
    assert str(tmp_path) not in text
    steps = [step for step, _ in info["texts"]]
    saved = runs.open_run(Path("runs/fox")).saved_steps()
    assert len(steps) == 3
    assert steps[0] == saved[0]
    assert steps[-1] == saved[-1]
    assert all(snapshot.startswith(info["example_prompt"]) for _, snapshot in info["texts"])


def test_refusals(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run = make_run(tmp_path / "r", tiny, BPE)
    options: dict[str, Any] = {"run": str(run.folder), "output": tmp_path / "m.html"}
    with pytest.raises(UserError, match="--quantize 5 is not one of 8, 4, 16, 32"):
        api.export_html(quantize=5, **options)
    with pytest.raises(UserError, match="is not one of hf, mlx-lm, gguf") as caught:
        api.export(to="html", **options)
    assert caught.value.remedy == "for html, use export_html."
    for flags, problem in (
        (["--to", "gguf", "--snapshots", "2"], "--snapshots is for --to html"),
        (["--to", "html", "--adapters"], "--to html does not support --adapters"),
    ):
        assert main(["export", str(run.folder), *flags]) == 2
        assert problem in capsys.readouterr().err
    gpt, _ = load_model(run)
    gpt.wte.weight = gpt.wte.weight * 1e6
    with pytest.raises(UserError, match=r"wte.weight contains values that 16 bits cannot"):
        html.pack_weights(flatten_params(gpt.parameters()), 16)
    api.export_html(**options)
    before = (tmp_path / "m.html").read_bytes()
    with pytest.raises(UserError, match=r"m.html already exists"):
        api.export_html(**options)
    assert (tmp_path / "m.html").read_bytes() == before
    monkeypatch.setattr(html, "MAX_HTML_BYTES", 1000)
    with pytest.raises(UserError, match=r"the file would have .* MB") as caught:
        api.export_html(run=str(run.folder), output=tmp_path / "n.html")
    assert "--quantize 4" in caught.value.remedy
