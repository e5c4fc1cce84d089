from __future__ import annotations

import gc
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxgpt
from mlxgpt import cli
from mlxgpt.corpus.tokenizer import CharTokenizer
from mlxgpt.errors import UserError
from mlxgpt.loaded import load
from mlxgpt.model.losses import token_losses
from mlxgpt.storage import checkpoint
from mlxgpt.storage.run import open_run


def test_a_model_is_read_once_and_writes_what_generate_does(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("done")
    assert (model.run.name, model.step) == ("done", model.run.steps()[-1])
    again = mlxgpt.generate("to", run="done", seed=1, max_tokens=9)
    (place / "runs").rename(place / "elsewhere")
    for _ in range(2):
        found = model.generate("to", seed=1, max_tokens=9)
        assert found.texts == again.texts
        assert "".join(model.stream("to", seed=1, max_tokens=9)) == again.texts[0][2:]
    several = model.generate(["to", "be"], samples=2, seed=1, max_tokens=9)
    assert several.texts[0] == again.texts[0]
    assert [text[:2] for text in several.texts] == ["to", "to", "be", "be"]


def test_logits_are_the_models(place: Path) -> None:
    model = load()
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    found = model.logits(ids)
    assert found.shape == (2, 3, model.run.config.model.vocab_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model._model(mx.array(ids)), atol=1e-5)
    np.testing.assert_array_equal(model.logits([4, 5, 6]), model.logits(ids[1:])[0])


def test_the_loss_of_a_text(place: Path) -> None:
    model, text = load(), "to be or not"
    ids = model.tokenizer.encode(text)
    windows = [ids[n : n + 9] for n in range(0, len(ids) - 1, 8)]  # its block is 8
    losses = [
        float(loss)
        for one in windows
        for loss in token_losses(mx.array(model.logits(one[:-1])), mx.array(one[1:]))
    ]
    for _ in range(2):
        found = model.loss(text)
        assert found.tokens == len(losses) == len(ids) - 1
        assert found.loss == pytest.approx(np.mean(losses), abs=1e-5)
    with pytest.raises(UserError, match="too short"):
        model.loss("t")


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda m: m.generate([]), "there is no prompt"),
        (lambda m: m.generate("~"), "never seen"),
        (lambda m: m.generate(["to", "~"]), "never seen"),
        (lambda m: m.generate(temperature=-1), "temperature"),
        (lambda m: m.stream("to", samples=2), "only one text"),
        (lambda m: m.stream("to", top_q=2), "top_q"),
        (lambda m: m.logits([]), "0 ids do not fit"),
        (lambda m: m.logits([1] * 9), "9 ids do not fit"),
        (lambda m: m.logits([1, 10_000]), "outside of 0 to"),
        (lambda m: m.logits([-1]), "outside of 0 to"),
        (lambda m: load(quantize=5), "5 bits"),
        (lambda m: load("none"), "no run 'none'"),
    ],
)
def test_what_cannot_be_is_refused(place: Path, wrong, problem: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=problem):
        wrong(load())


def test_its_memory_is_free_when_it_goes(place: Path) -> None:
    gc.collect()
    before = mx.get_active_memory()
    gc.disable()
    try:
        model = load()
        model.generate("to", max_tokens=20, samples=3)
        model.loss("to be or not")
        model.logits([1, 2])
        model.look([1, 2]).lens(1, 3)
        model.neighbours(1)
        assert mx.get_active_memory() > before + 1000
        del model
        assert mx.get_active_memory() <= before + 1000
    finally:
        gc.enable()


def test_fewer_bits_and_what_they_cost(home: Path, text_file: Path, tiny, no_check: None) -> None:  # type: ignore[no-untyped-def]
    mlxgpt.train(config=tiny, source=text_file, run="wide", n_embd=64, max_steps=4)
    for bits in (16, 8, 4):
        notes: list[str] = []
        model = load("wide", quantize=bits, note=notes.append)
        assert len(model.generate("to", max_tokens=20, seed=1).texts[0]) == 22
        assert notes[1].startswith(f"{bits} bits a weight: loss ")
        before, after = (float(notes[1].split()[n]) for n in (5, 7))
        assert after == pytest.approx(before, abs=0.1)
        assert model.loss(text_file.read_text()[:400]).loss == pytest.approx(after, abs=1)
    (home / "data").rename(home / "elsewhere")
    notes.clear()
    load("wide", quantize=8, note=notes.append)
    assert notes[1] == "8 bits a weight", "without the data nothing is known of the cost"


def test_characters_stay_characters(place: Path) -> None:
    assert isinstance(load().tokenizer, CharTokenizer)


def test_weights_that_overflow_end_in_an_error_and_in_valid_json(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(place / "runs" / "done")
    saved = checkpoint.load(run.checkpoint_path())
    large = {name: array * 1e30 for name, array in saved.parameters.items()}
    checkpoint.save(
        run.checkpoints, saved.step, large, {}, model=saved.model, tokenizer=saved.tokenizer
    )
    model = load("done")
    ids = model.ids("to").tolist()
    for use in (
        lambda: model.generate("to", max_tokens=3),
        lambda: list(model.stream("to", max_tokens=3)),
        lambda: list(model.tokens("to", max_tokens=3, alternatives=2)),
        lambda: model.next(ids),
        lambda: model.look(ids),
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
