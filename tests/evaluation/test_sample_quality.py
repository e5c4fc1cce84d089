from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.cli import main as cli
from mlxgpt.config import Config
from mlxgpt.data.readers import END_OF_TEXT
from mlxgpt.evaluation import sample_quality
from mlxgpt.evaluation.text_metrics import METRICS
from mlxgpt.storage.loading import load_model
from mlxgpt.storage.run import find_run

pytestmark = pytest.mark.usefixtures("no_check")


@pytest.fixture
def stories(home: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on the synthetic stories, with a BPE."""
    monkeypatch.setattr(sample_quality, "NUM_STORIES", 3)
    monkeypatch.setattr(sample_quality, "MAX_STORY_TOKENS", 300)
    api.prepare("synthetic", vocab_size=400, megabytes=0.1, name="s")
    api.train(config=tiny, source="s", run="r", max_steps=4, block_size=160, sample_tokens=0)
    return home


def test_quality_has_four_columns_and_is_saved(
    stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = api.appraise()
    assert list(quality.columns) == ["model", "real", "shuffled words", "n-gram"]
    for column in quality.columns.values():
        assert set(column) == {metric.name for metric in METRICS}
    real, shuffled = quality.columns["real"], quality.columns["shuffled words"]
    assert real["dictionary words"] is not None
    assert real["dictionary words"] > 0.9
    assert real["complete sentences"] == 1
    assert shuffled["complete sentences"] is not None
    assert shuffled["complete sentences"] < 0.7
    assert len(quality.texts) == 3
    assert all(text.startswith("Once upon a time") for text in quality.texts)
    assert quality.order_preference is not None
    file = json.loads((stories / "runs/r/quality.json").read_text())
    assert file["columns"] == quality.columns
    assert file["step"] == 4
    assert api.appraise() == quality, "the same again"
    capsys.readouterr()
    assert cli.main(["eval", "--quality", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["columns"] == quality.columns
    assert cli.main(["eval", "--quality"]) == 0
    assert "shuffled words" in capsys.readouterr().out


def test_quality_of_a_run_on_a_single_text(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_quality, "WINDOW_TOKENS", 50)
    quality = api.appraise()
    assert quality.prompt == ""
    assert quality.order_preference is None
    assert quality.columns["real"]["ended"] is None
    assert quality.columns["real"]["dictionary words"] is not None


def test_log_likelihoods_match_evaluation(stories: Path) -> None:
    run = find_run("r", Path("runs"))
    model, _ = load_model(run)
    texts = ["Once upon a time, a girl named Mia found a ball.", "It was red."]
    scores = sample_quality.log_likelihoods(model, run.tokenizer, texts)
    for text, score in zip(texts, scores, strict=True):
        Path("one.txt").write_text(text)
        result = api.evaluate(source=["one.txt"])
        assert score == pytest.approx(-result.loss * result.tokens, rel=1e-5)
    assert all(math.isfinite(score) for score in scores)


def test_held_out_documents_come_from_the_validation_text(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_quality, "MAX_STORY_TOKENS", 10_000)
    dataset = api.prepare("s")
    texts, complete = zip(
        *sample_quality._sample_held_out(dataset.val, dataset.tokenizer, 0), strict=True
    )
    assert all(complete)
    everything = dataset.tokenizer.decode(dataset.val.ids.tolist()).split(END_OF_TEXT)
    assert len(set(texts)) == len(texts) == 3
    assert set(texts) <= set(everything)


def test_real_texts_are_truncated_at_the_length_limit_of_samples(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the shares of texts that ended could not be compared."""
    dataset = api.prepare("s")
    monkeypatch.setattr(sample_quality, "MAX_STORY_TOKENS", 10_000)
    lengths = sorted(
        len(dataset.tokenizer.encode(text))
        for text, _ in sample_quality._sample_held_out(dataset.val, dataset.tokenizer, 0)
    )
    monkeypatch.setattr(sample_quality, "MAX_STORY_TOKENS", lengths[1])
    samples = list(sample_quality._sample_held_out(dataset.val, dataset.tokenizer, 0))
    assert sorted(len(dataset.tokenizer.encode(text)) for text, _ in samples)[-1] == lengths[1]
    assert sum(complete for _, complete in samples) == 2
    assert len(set(lengths)) == 3


def test_the_training_text_is_decoded_completely_and_split_between_words(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = api.prepare("s")
    expected = dataset.tokenizer.decode(dataset.train.ids.tolist()).replace(END_OF_TEXT, "\0")
    monkeypatch.setattr(sample_quality, "DECODE_CHUNK_TOKENS", 97)
    pieces = list(sample_quality._decode_training_text(dataset.train, dataset.tokenizer))
    assert "".join(pieces) == expected
    assert all(piece[-1:] in (" ", "\n", "\0", "") for piece in pieces[:-1])
    prefix = "".join(sample_quality._decode_training_text(dataset.train, dataset.tokenizer, 1000))
    assert expected.startswith(prefix)
    assert 1000 < len(prefix) < 2000


def test_quality_and_source_are_mutually_exclusive(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--quality", "--source", "words.txt"]) == 2
    assert "argument --source: not allowed with argument --quality" in capsys.readouterr().err
