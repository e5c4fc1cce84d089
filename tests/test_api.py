from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mlxgpt
from mlxgpt import UserError, api
from mlxgpt.bench import report, speed
from mlxgpt.config import Config
from mlxgpt.config.resolve import resolve_config
from mlxgpt.data import prepare as preparation
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.model.stats import count_parameters


def test_public_names_are_callable_after_importing_every_module() -> None:
    code = (
        "import importlib, pkgutil, mlxgpt\n"
        "for module in pkgutil.walk_packages(mlxgpt.__path__, 'mlxgpt.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "for name in mlxgpt.__all__: assert callable(getattr(mlxgpt, name)), name\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    with pytest.raises(AttributeError, match="fly"):
        mlxgpt.fly  # noqa: B018


def test_prepare_train_generate_and_evaluate_from_python(
    home: Path, text_file: Path, tiny: Config
) -> None:
    dataset = mlxgpt.prepare(text_file)
    assert dataset.folder == Path("data/words")
    summary = mlxgpt.train(config=tiny, source=text_file, run="r")
    result = mlxgpt.generate("to", run="r", max_tokens=5, seed=1)
    assert result.texts[0].startswith("to")
    evaluation = mlxgpt.evaluate(run="r")
    assert evaluation.loss == pytest.approx(summary.val_loss, rel=1e-6)
    assert [line.name for line in mlxgpt.runs()] == ["r"]
    assert mlxgpt.info(run="r").step == 12
    assert all(check.ok is not False for check in mlxgpt.check(config=tiny))


def test_evaluating_a_file_equals_evaluating_its_tokens(trained: Path, text: str) -> None:
    val = trained / "val.txt"
    val.write_text(text[int(len(text) * 0.9) :], encoding="utf-8")
    folders: dict[str, Any] = {"runs_dir": trained / "runs", "data_dir": trained / "data"}
    by_source = api.evaluate(source=[val], **folders)
    assert by_source == api.evaluate(**folders)


def test_evaluate_requires_the_dataset_of_the_run(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the dataset of done is not in") as error:
        api.evaluate(runs_dir=trained / "runs", data_dir=tmp_path)
    assert "--source" in error.value.remedy
    source = tmp_path / "words.txt"
    source.write_text("to be or not to be " * 20)
    api.prepare(source, data_dir=tmp_path / "data")
    with pytest.raises(UserError, match="is not the dataset that"):
        api.evaluate(runs_dir=trained / "runs", data_dir=tmp_path / "data")


def test_single_document_run_cannot_evaluate_several_documents(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "two.txt").write_text("to be<|endoftext|>or not")
    with pytest.raises(UserError, match="was trained on a single document"):
        api.evaluate(source=[tmp_path / "two.txt"], runs_dir=trained / "runs")


def test_evaluate_counts_the_end_of_text_of_each_document(home: Path, tiny: Config) -> None:
    stories = "<|endoftext|>".join(f"story {n} ends.\n" for n in range(300))
    Path("stories.txt").write_text(stories)
    api.train(config=tiny, source="stories.txt", run="s")
    held_out = api.evaluate()
    Path("val.txt").write_text("story 1 ends.<|endoftext|>story 2 ends.")
    two_stories = api.evaluate(source=["val.txt"])
    assert two_stories.tokens == 2 * (13 + 1), "each letter, and each end-of-text"
    assert held_out.tokens > 13
    assert api.generate("story", max_tokens=3).texts[0].startswith("story")


@pytest.mark.parametrize("settings", [{"tier": 1}, {"config": "gpt2-124m"}, {"n_layer": 2}])
def test_info_refuses_a_run_with_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot be combined"):
        api.info(run="mine", **settings)


def test_info_refuses_settings_without_a_config() -> None:
    with pytest.raises(UserError, match="no config given"):
        api.info(n_layer=2)


def test_info_parameter_counts_add_up_to_the_total() -> None:
    info = api.info(tier=1)
    assert info.parameters["all"] == count_parameters(info.config.model) <= 1_100_000
    assert sum(info.parameters.values()) == 2 * info.parameters["all"]
    assert info.training_tokens == 5000 * 16 * 128


def test_copied_run_folder_generates_the_same_text(trained: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(trained / "runs" / "done", tmp_path / "mine"))
    copied = api.generate("to", run=str(moved), seed=1, max_tokens=9, runs_dir=tmp_path / "none")
    original = api.generate("to", seed=1, max_tokens=9, runs_dir=trained / "runs")
    assert copied.texts == original.texts


def test_a_benchmark_is_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[Any] = []

    def measure(configs: dict[str, Config]) -> str:
        names.extend(configs)
        return "measured"

    monkeypatch.setattr(speed, "benchmark_configs", measure)
    monkeypatch.setattr(
        report, "write_benchmark_report", lambda measured, folder: (measured, folder)
    )
    result: Any = api.benchmark(output=tmp_path / "a" / "b")
    assert result == ("measured", ("measured", tmp_path / "a" / "b"))
    assert names == ["tier1", "tier2"]
    api.benchmark(tier=2, output=tmp_path)
    assert names.pop() == "tier2"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        api.benchmark(output=tmp_path / "file")
    assert len(names) == 2, "before minutes of measuring"


def test_default_tokenizer_depends_on_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, bool]] = []

    def prepare(request: PrepareRequest, *_: Any) -> None:
        calls.append((request.data.tokenizer, request.vocab_size, request.strict))

    monkeypatch.setattr(preparation, "find_or_prepare", prepare)
    api.prepare()
    api.prepare("tinystories")
    api.prepare("openwebtext")
    api.prepare("a.txt", vocab_size=500)
    api.prepare("tinystories", tokenizer="gpt2")
    assert calls == [
        ("char", 0, False),
        ("bpe", 0, False),
        ("gpt2", 0, False),
        ("bpe", 500, True),
        ("gpt2", 0, False),
    ]
    with pytest.raises(UserError, match="does not support --vocab-size"):
        api.prepare("a.txt", tokenizer="char", vocab_size=500)


def test_training_on_nanogpt_arrays(home: Path, tiny: Config, gpt2: BPETokenizer) -> None:
    Path("arrays").mkdir()
    for split, count in (("train", 60), ("val", 9)):
        stream = "".join(f"Story {n} ends.\0" for n in range(count))
        gpt2.encode_documents(stream).astype("<u2").tofile(f"arrays/{split}.bin")
    summary = api.train(config=tiny, source="arrays", run="r", max_steps=2, vocab_size=50304)
    assert summary.step == 2
    evaluation = api.evaluate(data_dir=".")
    assert evaluation.tokens == len(
        gpt2.encode_documents("".join(f"Story {n} ends.\0" for n in range(9)))
    )
    assert evaluation.loss == pytest.approx(summary.val_loss, rel=1e-5)


def test_tier_1_config() -> None:
    name, config = resolve_config(tier=1)
    assert name == "tier1"
    assert config.train.max_steps == 5000
    assert config.data.source == ("shakespeare",)
