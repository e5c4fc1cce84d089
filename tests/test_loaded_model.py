from __future__ import annotations

import gc
import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest

import mlxgpt
from mlxgpt.cli import main as cli
from mlxgpt.config import Config
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.loaded_model import load
from mlxgpt.model.losses import token_losses
from mlxgpt.storage import checkpoint
from mlxgpt.storage.run import open_run
from mlxgpt.utils.errors import UserError


def test_loaded_model_generates_like_generate_without_its_files(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("done")
    assert (model.run.name, model.step) == ("done", model.run.steps()[-1])
    expected = mlxgpt.generate("to", run="done", seed=1, max_tokens=9)
    (place / "runs").rename(place / "elsewhere")
    for _ in range(2):
        result = model.generate("to", seed=1, max_tokens=9)
        assert result.texts == expected.texts
        assert "".join(model.stream("to", seed=1, max_tokens=9)) == expected.texts[0][2:]
    batch = model.generate(["to", "be"], samples=2, seed=1, max_tokens=9)
    assert batch.texts[0] == expected.texts[0]
    assert [text[:2] for text in batch.texts] == ["to", "to", "be", "be"]


def test_logits_match_the_model(place: Path) -> None:
    model = load()
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    logits = model.logits(ids)
    assert logits.shape == (2, 3, model.run.config.model.vocab_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, model._model(mx.array(ids)), atol=1e-5)
    np.testing.assert_array_equal(model.logits([4, 5, 6]), model.logits(ids[1:])[0])


def test_loss_of_a_text_is_the_mean_token_loss(place: Path) -> None:
    model, text = load(), "to be or not"
    ids = model.tokenizer.encode(text)
    windows = [ids[n : n + 9] for n in range(0, len(ids) - 1, 8)]  # block_size is 8
    losses = [
        float(loss)
        for window in windows
        for loss in token_losses(mx.array(model.logits(window[:-1])), mx.array(window[1:]))
    ]
    for _ in range(2):
        result = model.loss(text)
        assert result.tokens == len(losses) == len(ids) - 1
        assert result.loss == pytest.approx(np.mean(losses), abs=1e-5)
    with pytest.raises(UserError, match="too short"):
        model.loss("t")


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda m: m.generate([]), "there is no prompt"),
        (lambda m: m.generate("~"), "does not know these"),
        (lambda m: m.generate(["to", "~"]), "does not know these"),
        (lambda m: m.generate(temperature=-1), "temperature"),
        (lambda m: m.stream("to", samples=2), "only one sample"),
        (lambda m: m.stream("to", top_q=2), "top_q"),
        (lambda m: m.logits([]), "0 ids do not fit"),
        (lambda m: m.logits([1] * 9), "9 ids do not fit"),
        (lambda m: m.logits([1, 10_000]), "not in 0 to"),
        (lambda m: m.logits([-1]), "not in 0 to"),
        (lambda m: load(quantize=5), "5 bits"),
        (lambda m: load("none"), "no run named 'none'"),
    ],
)
def test_invalid_arguments_are_refused(place: Path, wrong, problem: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=problem):
        wrong(load())


def test_memory_is_freed_when_the_model_is_deleted(place: Path) -> None:
    gc.collect()
    active_bytes = mx.get_active_memory()
    gc.disable()
    try:
        model = load()
        model.generate("to", max_tokens=20, samples=3)
        model.loss("to be or not")
        model.logits([1, 2])
        model.trace_forward([1, 2]).logit_lens(1, 3)
        model.find_neighbors(1)
        assert mx.get_active_memory() > active_bytes + 1000
        del model
        assert mx.get_active_memory() <= active_bytes + 1000
    finally:
        gc.enable()


def test_quantization_reports_its_effect_on_the_loss(
    home: Path, text_file: Path, tiny: Config, no_check: None, notes: list[str]
) -> None:
    mlxgpt.train(config=tiny, source=text_file, run="wide", n_embd=64, max_steps=4)
    for bits in (16, 8, 4):
        notes.clear()
        model = load("wide", quantize=bits)
        assert len(model.generate("to", max_tokens=20, seed=1).texts[0]) == 22
        assert notes[1].startswith(f"quantized to {bits} bits per weight: validation loss ")
        before, after = (float(notes[1].split()[n]) for n in (8, 10))
        assert after == pytest.approx(before, abs=0.1)
        assert model.loss(text_file.read_text()[:400]).loss == pytest.approx(after, abs=1)
    (home / "data").rename(home / "elsewhere")
    notes.clear()
    load("wide", quantize=8)
    assert notes[1] == "quantized to 8 bits per weight", "no data to measure the loss on"


def test_char_run_loads_a_char_tokenizer(place: Path) -> None:
    assert isinstance(load().tokenizer, CharTokenizer)


def test_non_finite_logits_are_an_error_and_json_stays_valid(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(place / "runs" / "done")
    saved = checkpoint.load_checkpoint(run.checkpoint_path())
    large = {name: array * 1e30 for name, array in saved.parameters.items()}
    checkpoint.save_checkpoint(run.checkpoints, replace(saved, parameters=large))
    model = load("done")
    ids = model.encode("to").tolist()
    for use in (
        lambda: model.generate("to", max_tokens=3),
        lambda: list(model.stream("to", max_tokens=3)),
        lambda: list(model.iter_tokens("to", max_tokens=3, alternatives=2)),
        lambda: model.next_token_probs(ids),
        lambda: model.trace_forward(ids),
    ):
        with pytest.raises(UserError, match="logits are not finite"):
            use()
    assert cli.main(["generate", "to", "--run", "done", "--json"]) == 2
    assert "--checkpoint newest" in capsys.readouterr().err
    assert cli.main(["eval", "--run", "done", "--json"]) == 0

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    assert json.loads(capsys.readouterr().out, parse_constant=refuse)["loss"] is None


@pytest.mark.parametrize("temperature", ["1e-40", "1e-320", "1e-6"])
def test_a_tiny_temperature_is_greedy(
    place: Path, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    line = ["generate", "to", "--run", "done", "--max-tokens", "9"]
    assert cli.main([*line, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert cli.main([*line, "--temperature", temperature]) == 0
    assert capsys.readouterr().out == greedy
    assert load("done").generate("to", max_tokens=9, temperature=float(temperature)).texts == [
        greedy.rstrip("\n")
    ]


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory, tiny: Config, text: str) -> Path:
    """Folder with a BPE run and the text that it was trained on."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "words.txt").write_text(text, encoding="utf-8")
    mlxgpt.train(
        config=tiny,
        source=folder / "words.txt",
        tokenizer="bpe",
        vocab_size=290,
        run="bpe",
        runs_dir=folder / "runs",
        data_dir=folder / "data",
    )
    return folder


FORMS = ["\ufeff{}", "{}\r\n{}", "{}\r{}", "\ufeff{}\r\n{}\r"]


@pytest.mark.parametrize("form", FORMS)
def test_line_endings_and_byte_order_marks_are_normalized(bpe_folder: Path, form: str) -> None:
    """In losses, prompts, batches, streams and evaluated files."""
    model = load("bpe", runs_dir=bpe_folder / "runs")
    raw = form.format("to be, or not to be", "the rain in Spain")
    normalized = raw.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert model.loss(raw) == model.loss(normalized)
    assert model.encode(raw).tolist() == model.encode(normalized).tolist()
    settings: dict[str, Any] = {"seed": 1, "max_tokens": 9}
    assert (
        model.generate([raw, normalized], **settings).texts
        == model.generate([normalized] * 2, **settings).texts
    )
    assert list(model.stream(raw, **settings)) == list(model.stream(normalized, **settings))
    assert [d.id for d in model.iter_tokens(raw, **settings)] == [
        d.id for d in model.iter_tokens(normalized, **settings)
    ]
    (path := bpe_folder / "other.txt").write_text(raw * 3, encoding="utf-8", newline="")
    (bpe_folder / "plain.txt").write_text(normalized * 3, encoding="utf-8", newline="")
    if not raw.startswith("\ufeff"):
        losses = [
            mlxgpt.evaluate(run="bpe", source=file, runs_dir=bpe_folder / "runs").loss
            for file in (path, bpe_folder / "plain.txt")
        ]
        assert losses[0] == losses[1]


def test_stop_string_matches_with_any_line_ending(place: Path) -> None:
    model = load()
    settings: dict[str, Any] = {"seed": 1, "max_tokens": 200}
    text = model.generate("to", **settings).texts[0]
    assert "\n" in text[2:], "or this test shows nothing"
    for stop in ("\n", "\r\n", "\r"):
        assert model.generate("to", stop=(stop,), **settings).texts[0] == text.split("\n")[0]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_nfc_and_nfd_prompts_give_the_same_text(
    home: Path, tiny: Config, no_check: None, form: Literal["NFC", "NFD"]
) -> None:
    text = unicodedata.normalize(form, "Ménage à trois, déjà vu, garçon. " * 60)
    (home / "words.txt").write_text(text, encoding="utf-8")
    mlxgpt.train(config=tiny, source="words.txt", run="done", max_steps=2)
    model = load("done")
    prompts = [unicodedata.normalize(unicode_form, "déjà") for unicode_form in ("NFC", "NFD")]
    texts = model.generate(prompts, seed=1, max_tokens=9).texts
    assert texts[0] == texts[1]
    assert texts[0].startswith(unicodedata.normalize(form, "déjà"))
    assert model.loss(prompts[0]) == model.loss(prompts[1])
    stops = [
        model.generate("d", seed=1, max_tokens=99, stop=(unicodedata.normalize(unicode_form, "é"),))
        for unicode_form in ("NFC", "NFD")
    ]
    assert stops[0].texts == stops[1].texts
    losses = []
    for unicode_form in ("NFC", "NFD"):
        (home / "other.txt").write_text(
            unicodedata.normalize(unicode_form, "déjà vu"), encoding="utf-8"
        )
        losses.append(mlxgpt.evaluate(run="done", source="other.txt"))
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="does not know these characters: 'ö'"):
        model.generate("o\u0308")
