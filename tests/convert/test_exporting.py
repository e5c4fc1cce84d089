"""Exported folders. tests/oracle checks that other runtimes can run them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxgpt
from mlxgpt.cli import main as cli
from mlxgpt.config import Config
from mlxgpt.convert import exporting, importing, mlx_lm, qwen3
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.storage.loading import load_model
from mlxgpt.storage.run import open_run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import Capture, expect_error
from tests.helpers.external_models import (
    MODEL_CONFIG,
    random_parameters,
    train_small_bpe,
    write_gpt2_folder,
)
from tests.helpers.failing_files import failing_sync


def test_exported_run_can_be_imported_again(place: Path, capsys: Capture) -> None:
    """The imported model has the same weights."""
    assert cli.main(["export", "--to", "hf"]) == 0
    assert capsys.readouterr().out == "exports/done-hf: the model after 12 steps\n"
    folder = Path("exports/done-hf")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    card = (folder / "README.md").read_text()
    for part in (
        "# done",
        "2 layers, 2 heads, embedding dimension 16",
        "words.txt",
        "12 steps",
        "nats per token",
    ):
        assert part in card
    assert str(place) not in card, "where somebody's files lie is nobody's business"
    run, imported = open_run(Path("runs/done")), mlxgpt.import_model(folder)
    assert imported.tokenizer.fingerprint == run.tokenizer.fingerprint
    assert imported.bos == run.bos
    weights = [load_model(source)[1].parameters for source in (run, imported)]
    assert all(mx.array_equal(value, weights[1][name]) for name, value in weights[0].items())
    losses = [mlxgpt.evaluate(run=name, source=["words.txt"]).loss for name in ("done", "done-hf")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-7), "batches of another size: another order"
    texts = [mlxgpt.generate("to be", run=r, seed=3).texts for r in ("done", "done-hf")]
    assert texts[0] == texts[1]


def test_unused_vocabulary_rows_are_not_exported(home: Path) -> None:
    config = replace(MODEL_CONFIG, vocab_size=300)
    imported_model = ImportedModel(
        config, random_parameters(config), train_small_bpe(), True, {"hub": "owner/name"}
    )
    importing.create_imported_run(imported_model, Path("runs/wide"))
    mlxgpt.export(to="hf", run="wide")
    imported = mlxgpt.import_model("exports/wide-hf")
    assert imported.config.model.vocab_size == imported.tokenizer.vocab_size == 280
    _, original = load_model(open_run(Path("runs/wide")))
    _, restored = load_model(imported)
    assert mx.array_equal(
        restored.parameters["wte.weight"], original.parameters["wte.weight"][:280]
    )
    assert "owner/name" in Path("exports/wide-hf/README.md").read_text()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_are_within_one_quantization_step(bits: int) -> None:
    config = MODEL_CONFIG
    parameters = random_parameters(config)
    rounded = mlx_lm.fake_quantize_mlx_lm(config, parameters, bits)
    assert rounded.keys() == parameters.keys()
    for name, value in parameters.items():
        error = float(mx.abs(rounded[name] - value).max())
        quantized = name == "wte.weight" or (value.ndim == 2 and "c_" in name)
        assert (error > 0) == quantized, name
        value_range = float(value.max() - value.min())
        assert error <= value_range / (2**bits - 1)


def test_quantized_export_reports_its_perplexity(home: Path) -> None:
    (home / "text.txt").write_text("once upon a time there was a cat. " * 60)
    shape: dict[str, Any] = {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 32,
        "block_size": 16,
        "batch_size": 4,
    }
    mlxgpt.train(tier=1, source="text.txt", run="small", max_steps=30, warmup_steps=1, **shape)
    exports = {bits: mlxgpt.export(to="mlx-lm", run="small", quantize=bits) for bits in (8, 4)}
    perplexity = mlxgpt.evaluate(run="small").loss
    for bits, result in exports.items():
        assert result.folder == Path(f"exports/small-mlx-lm-{bits}bit")
        assert result.loss == perplexity
        assert result.quantized_loss == pytest.approx(perplexity, rel=0.1)
        assert result.quantized_loss != perplexity
        tree = json.loads((result.folder / "config.json").read_text())
        assert tree["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
        names = mx.load(str(result.folder / "model.safetensors"))
        assert "model.h.0.attn.c_attn.scales" in names
        assert "model.wpe.weight" in names


def test_invalid_export_arguments_are_refused(place: Path, capsys: Capture) -> None:
    assert "--to onnx is not one of hf, mlx-lm, gguf" in expect_error(
        capsys, "export", "--to", "onnx"
    )
    assert "--quantize 3 is not one of 8, 4" in expect_error(
        capsys, "export", "--to", "hf", "--quantize", "3"
    )
    assert "--to hf does not support --quantize" in expect_error(
        capsys, "export", "--to", "hf", "--quantize", "8"
    )
    assert "n_embd = 16 cannot be quantized" in expect_error(
        capsys, "export", "--to", "mlx-lm", "--quantize", "8"
    )
    Path("taken").mkdir()
    assert (
        expect_error(capsys, "export", "--to", "hf", "--output", "taken") == "taken already exists"
    )


@pytest.mark.parametrize("to", ["hf", "mlx-lm", "gguf"])
def test_model_without_an_equivalent_architecture_is_refused(
    home: Path, text_file: Path, tiny: Config, no_check: None, capsys: Capture, to: str
) -> None:
    options: dict[str, Any] = {"position": "rope", "mlp": "relu2", "optimizer": "muon"}
    mlxgpt.train(config=tiny, source=text_file, run="modern", max_steps=4, **options)
    problem = expect_error(capsys, "export", "--to", to)
    assert "because of norm = layer, qk_norm = false, mlp = relu2, bias = true" in problem


def test_model_with_qwen3_architecture_is_exported_as_qwen3(
    home: Path, text_file: Path, tiny: Config, no_check: None, capsys: Capture
) -> None:
    options: dict[str, Any] = {**qwen3.QWEN3_REQUIREMENTS, "optimizer": "muon"}
    mlxgpt.train(config=tiny, source=text_file, run="modern", max_steps=4, **options)
    folder = mlxgpt.export(to="hf").folder
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
    assert "Qwen3: rotary embeddings" in (folder / "README.md").read_text()
    assert "--to mlx-lm supports GPT-2 only" in expect_error(
        capsys, "export", "--to", "mlx-lm", "--quantize", "8"
    )


def test_fine_tuning_a_rope_model_with_a_larger_block_size(
    home: Path, text_file: Path, tiny: Config, no_check: None
) -> None:
    options: dict[str, Any] = {"source": text_file, "max_steps": 4}
    mlxgpt.train(config=tiny, run="modern", position="rope", **options)
    mlxgpt.train(init_from="modern", run="longer", block_size=16, warmup_steps=0, **options)
    assert mlxgpt.evaluate(run="longer").tokens > 0
    with pytest.raises(UserError, match="position = learned conflicts with modern"):
        mlxgpt.train(init_from="modern", run="other", position="learned", **options)


def test_failed_export_leaves_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.tokenizers, "write_hf_tokenizer", raise_disk_full)
    with pytest.raises(UserError, match="cannot write exports/done-hf: No space left"):
        mlxgpt.export(to="hf")
    assert list(Path("exports").iterdir()) == []


def test_export_can_be_repeated_after_a_failed_sync(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_sync(monkeypatch, "exports")
    with pytest.raises(UserError, match="cannot write exports"):
        mlxgpt.export(to="hf")
    assert list(Path("exports").iterdir()) == []
    mlxgpt.export(to="hf")


def test_export_removes_leftovers_of_a_killed_export(place: Path) -> None:
    leftover = Path("exports/.done-hf.new")
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").touch()
    mlxgpt.export(to="hf")
    assert [path.name for path in Path("exports").iterdir()] == ["done-hf"]


def test_two_exports_to_one_folder_exclude_each_other(place: Path) -> None:
    with (
        files.file_lock(Path("exports/done-hf"), "exporting to"),
        pytest.raises(UserError, match="another process is already exporting to exports/done-hf"),
    ):
        mlxgpt.export(to="hf")


def test_fine_tuning_starts_from_the_weights_of_the_other_run(home: Path) -> None:
    parameters = write_gpt2_folder(home / "small")
    mlxgpt.import_model("small")
    (home / "text.txt").write_text("once upon a time there was a cat. " * 60)
    options: dict[str, Any] = {
        "source": "text.txt",
        "max_steps": 4,
        "eval_interval": 2,
        "learning_rate": 0.0,
    }
    mlxgpt.train(init_from="small", weight_decay=0.0, block_size=8, **options)
    (folder,) = (path for path in (home / "runs").iterdir() if path.name != "small")
    tuned = open_run(folder)
    assert tuned.origin["run"] == "small"
    assert (tuned.config.model.block_size, tuned.config.model.n_embd) == (8, 32)
    assert tuned.bos == 279, "texts that are trained on here begin with a token"
    _, checkpoint = load_model(tuned, "newest")
    for name, value in parameters.items():
        expected = value[:8] if name == "wpe.weight" else value
        assert mx.array_equal(checkpoint.parameters[name], expected), name


def test_resumed_fine_tuning_is_bit_exact_and_requires_the_same_weights(home: Path) -> None:
    write_gpt2_folder(home / "small")
    mlxgpt.import_model("small")
    (home / "text.txt").write_text("once upon a time there was a cat. " * 60)
    options: dict[str, Any] = {
        "source": "text.txt",
        "eval_interval": 2,
        "decay_steps": 6,
        "dropout": 0.1,
    }
    uninterrupted = mlxgpt.train(init_from="small", run="whole", max_steps=6, **options)
    mlxgpt.train(init_from="small", run="parts", max_steps=4, **options)
    assert mlxgpt.train(init_from="small", run="parts", max_steps=6, **options).resumed
    weights = [
        load_model(open_run(Path(f"runs/{name}")), "newest")[1] for name in ("whole", "parts")
    ]
    for name, value in weights[0].parameters.items():
        assert mx.array_equal(value, weights[1].parameters[name]), name
    assert uninterrupted.val_loss is not None
    with pytest.raises(UserError, match="was initialized from different weights"):
        mlxgpt.train(init_from="whole", run="parts", max_steps=8, **options)


def test_settings_that_conflict_with_the_weights_are_refused(home: Path, capsys: Capture) -> None:
    write_gpt2_folder(home / "small")
    mlxgpt.import_model("small")
    (home / "text.txt").write_text("once upon a time")
    line = ("train", "--init-from", "small", "--source", "text.txt")
    assert "n_layer = 3 conflicts with small, which has n_layer = 2" in expect_error(
        capsys, *line, "--n-layer", "3"
    )
    assert "exceeds the block size of small, 16" in expect_error(
        capsys, *line, "--block-size", "17"
    )


def test_adapters_are_exported_and_imported_again(place: Path, capsys: Capture) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.1, "warmup_steps": 0}
    mlxgpt.train(init_from="done", source="data/words", run="tuned", lora_rank=2, **settings)
    ids = list(range(8))
    expected = mlxgpt.load("tuned").logits(ids)
    for runtime in ("peft", "mlx-lm"):
        assert cli.main(["export", "tuned", "--adapters", "--to", runtime]) == 0
        folder = f"exports/tuned-{runtime}"
        assert capsys.readouterr().out == f"{folder}: the model after 2 steps\n"
        card = Path(folder, "README.md").read_text()
        for part in (
            "LoRA, rank 2, alpha 16, in 2 of 2 blocks",
            "`mlxgpt export done --to hf`",
            "done-hf",
        ):
            assert part in card
        name = f"from-{runtime}"
        assert cli.main(["import", folder, "--base", "done", "--run", name]) == 0
        assert capsys.readouterr().out.startswith(f"runs/{name}: ")
        assert (mlxgpt.load(name).logits(ids) == expected).all()
    assert cli.main(["export", "tuned", "--to", "hf"]) == 0
    fused = mlxgpt.import_model("exports/tuned-hf")
    assert abs(mlxgpt.load(fused.name).logits(ids) - expected).max() < 1e-5


def test_errors_about_adapters(place: Path, capsys: Capture) -> None:
    mlxgpt.train(init_from="done", source="data/words", run="tuned", lora_rank=2, max_steps=1)
    export = ("export", "tuned", "--to")
    assert "--to hf is not one of peft, mlx-lm" in expect_error(capsys, *export, "hf", "--adapters")
    assert "--to peft is not one of hf" in expect_error(capsys, *export, "peft")
    line: tuple[str, ...] = (*export, "mlx-lm", "--adapters", "--quantize", "4")
    assert "--adapters does not support --quantize" in expect_error(capsys, *line)
    line = ("export", "done", "--to", "peft", "--adapters")
    assert "done has no adapter" in expect_error(capsys, *line)
    assert cli.main(["export", "tuned", "--to", "peft", "--adapters"]) == 0
    assert "already exists" in expect_error(capsys, *export, "peft", "--adapters")
    line = ("import", "exports/tuned-peft")
    assert "contains adapters (LoRA), not a model" in expect_error(capsys, *line)
    line = ("import", "exports/tuned-peft", "--base", "done", "--run", "other/tuned")
    assert "must be next to its base" in expect_error(capsys, *line)
    line = ("import", "exports/tuned-peft", "--base", "done", "--run", "tuned")
    assert "already exists" in expect_error(capsys, *line)
