"""The corpus, pairs and table of `python benchmarks/preferences.py`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preferences
import pytest

from mlxgpt.data.synthetic import generate_story
from tests.helpers.commands import Capture


def test_the_share_of_questions_is_controlled() -> None:
    stories = (generate_story(n, 3) for n in itertools.count())
    corpus = list(itertools.islice(preferences._with_share(stories), 500))
    assert 0.095 <= sum("?" in story for story in corpus) / 500 <= 0.1


def test_chosen_answers_have_the_property_and_rejected_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut and NUL answers are omitted, and prompts with the property."""

    def generate(prompts: list[str], **_: Any) -> SimpleNamespace:
        endings = [" Who?", " Me.", "\0?", " You?"]
        texts = [prompt + ending for prompt in prompts for ending in endings]
        texts[4:8] = [prompts[1] + " Me."] * 4
        return SimpleNamespace(texts=texts, ended=[True, True, True, False] * len(prompts))

    monkeypatch.setattr(preferences, "SAMPLES", 4)
    monkeypatch.setattr(preferences, "PAIR_PROMPTS", 3)
    monkeypatch.setattr(
        preferences.mlxgpt, "load", lambda *_, **__: SimpleNamespace(generate=generate)
    )
    monkeypatch.setattr(preferences, "measure", lambda task, run: {"share": 0.0})
    task = preferences.Task(tmp_path / "seed1", 1, tmp_path)
    task.path.mkdir()
    sentences = ["A.", "B.", "A.", "Why?", "C.", "D."]
    preferences.make_pairs(task, sentences, sentences, r"\?")
    pairs = [json.loads(line) for line in (task.path / "pairs.jsonl").read_text().splitlines()]
    assert pairs == [
        {"prompt": prompt, "chosen": " Who?", "rejected": " Me."} for prompt in ("A.", "C.")
    ]
    assert task.read()["test_prompts"] == ["D."]


def test_table_and_plots(tmp_path: Path, capsys: Capture) -> None:
    quality = dict.fromkeys(preferences.QUALITY, 1.0)
    records = [
        {"beta": beta, "rate": beta and 1e-4, "share": share, "kl": kl, "tokens": 9.0, "loss": 1.0}
        | {"val_loss": 0.5, "quality": quality, "seed": seed}
        for beta, kl in ((None, 0.0), (1.0, 2.0), (0.1, 8.0))
        for seed, share in enumerate((0.9, 0.2, 0.4))  # rates were swept with seed 0
    ]
    (tmp_path / preferences.RESULTS).write_text("".join(json.dumps(r) + "\n" for r in records))
    preferences.print_table(tmp_path, tmp_path)
    rows = [
        [cell.strip() for cell in line.split("|")[1:]]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert [row[0] for row in rows[2:]] == ["base", "0.1", "1"]
    assert rows[2][3] == "0.300 ± 1.271"  # t = 12.7 for two seeds
    for name in ("dpo-share-over-beta", "dpo-share-over-kl"):
        assert "</svg>" in (tmp_path / f"{name}.svg").read_text()
