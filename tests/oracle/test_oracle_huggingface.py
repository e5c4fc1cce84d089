"""Import and export between mlxgpt, transformers and mlx-lm. Needs the extra `oracle`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxgpt
from mlxgpt.config import ModelConfig
from mlxgpt.convert import exporting, importing
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params, load_parameters
from mlxgpt.storage.loading import load_model

pytest.importorskip("torch", reason="the extra `oracle` is not installed")
pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
pytest.importorskip("mlx_lm", reason="the extra `oracle` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party warnings
    import mlx_lm.utils
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.filterwarnings("ignore")  # third-party warnings

TEXT = "Once upon a time, there was a small cat. The cat liked to look at the sea. " * 40
PROMPT = "Once upon a time, the"


# Import of GPT-2 models saved by transformers, in all layouts found on the hub.


def save_hf_model(folder: Path, tokenizer: Tokenizer, **settings: Any) -> GPT2LMHeadModel:
    """Save a random GPT-2 with nonzero biases with transformers."""
    torch.manual_seed(0)
    size = tokenizer.vocab_size
    config = GPT2Config(vocab_size=size, n_positions=32, n_embd=24, n_layer=2, n_head=3, **settings)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return model


def rewrite_weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def strip_prefix(weights: dict[str, Any]) -> dict[str, Any]:
    """The layout of the hub's gpt2: no prefix, and a causal mask in each layer."""
    mask = torch.ones(32, 32).tril()[None, None]
    named = {name.removeprefix("transformer."): value for name, value in weights.items()}
    return named | {f"h.{n}.attn.bias": mask.clone() for n in range(2)}


def add_masks(weights: dict[str, Any]) -> dict[str, Any]:
    """The layout of distilgpt2: a causal mask and a masked_bias in each layer."""
    mask = torch.ones(32, 32).tril()[None, None]
    masked_bias = torch.tensor(-1e4)
    return (
        weights
        | {f"transformer.h.{n}.attn.bias": mask.clone() for n in range(2)}
        | {f"transformer.h.{n}.attn.masked_bias": masked_bias.clone() for n in range(2)}
    )


def add_head(weights: dict[str, Any]) -> dict[str, Any]:
    return weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}


def transpose_linear(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights [out, in], as in nanoGPT; the shape of the square c_proj does not show this."""
    suffixes = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {k: v.T.contiguous() if k.endswith(suffixes) else v for k, v in weights.items()}


def check_logits(folder: Path, model: GPT2LMHeadModel) -> ImportedModel:
    imported = importing.read_model(str(folder))
    our_model = GPT(imported.config)
    load_parameters(our_model, imported.parameters)
    ids = np.random.default_rng(0).integers(0, imported.tokenizer.vocab_size, (2, 32))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    actual = np.array(our_model(mx.array(ids)))
    assert np.abs(expected).max() > 1, "the logits are worth comparing"
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    return imported


@pytest.mark.parametrize(
    "change",
    [
        dict,
        strip_prefix,
        add_masks,
        add_head,
        transpose_linear,
        lambda w: strip_prefix(transpose_linear(w)),
    ],
)
def test_logits_of_every_layout_match_transformers(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    tokenizer = bpe.train_bpe([TEXT], 300)
    model = save_hf_model(tmp_path, tokenizer)
    rewrite_weights(tmp_path, change)
    imported = check_logits(tmp_path, model)
    assert imported.tokenizer.fingerprint == tokenizer.fingerprint
    assert not imported.add_bos_token, "nobody said that texts begin with a token"


def test_shards_are_joined(tmp_path: Path) -> None:
    model = save_hf_model(tmp_path, bpe.train_bpe([TEXT], 300))
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    check_logits(tmp_path, model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_are_imported_as_float32(tmp_path: Path, dtype: str) -> None:
    save_hf_model(tmp_path, bpe.train_bpe([TEXT], 300))
    kind = getattr(torch, dtype)
    rewrite_weights(tmp_path, lambda weights: {k: v.to(kind) for k, v in weights.items()})
    rounded = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    imported = check_logits(tmp_path, rounded)
    assert all(value.dtype == mx.float32 for value in imported.parameters.values())


# Export of our models, with each kind of tokenizer.


def make_imported_model(kind: str, bias: bool, room: int = 0) -> ImportedModel:
    """A random model whose vocabulary has `room` more ids than its tokenizer."""
    tokenizers: dict[str, Callable[[], Tokenizer]] = {
        "bpe": lambda: bpe.train_bpe([TEXT], 300),
        "characters": lambda: CharTokenizer(TEXT + "\n", end_of_text=False),
        "characters of many texts": lambda: CharTokenizer(TEXT, end_of_text=True),
    }
    tokenizer = tokenizers[kind]()
    config = ModelConfig(2, 2, 32, 64, tokenizer.vocab_size + room, 0.0, bias)
    model = GPT(config, 3)
    parameters = {
        name: value + 0.1 * mx.random.normal(value.shape, key=mx.random.key(n))
        for n, (name, value) in enumerate(flatten_params(model.parameters()).items())
    }
    return ImportedModel(config, parameters, tokenizer, tokenizer.end_of_text is not None)


@pytest.fixture(params=["bpe", "characters", "characters of many texts"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("bias", [True, False])
def test_exported_models_give_the_same_text(tmp_path: Path, kind: str, bias: bool) -> None:
    run = importing.create_imported_run(make_imported_model(kind, bias, room=5), tmp_path / "run")
    model, checkpoint = load_model(run)
    folder = tmp_path / "hf"
    exporting.export_run(run, checkpoint.parameters, 0, folder, "hf")
    ids = np.random.default_rng(0).integers(0, run.tokenizer.vocab_size, (2, 64))
    our_logits = np.array(model(mx.array(ids)))[..., : run.tokenizer.vocab_size]

    hf_model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        np.testing.assert_allclose(
            hf_model(torch.tensor(ids)).logits.numpy(), our_logits, atol=1e-4
        )
    mlx_model, mlx_tokenizer = mlx_lm.utils.load(str(folder))
    np.testing.assert_allclose(np.array(mlx_model(mx.array(ids))), our_logits, atol=1e-4)

    prompt = PROMPT[:12]
    start = [run.bos] if run.bos is not None else []
    expected = [*start, *run.tokenizer.encode(prompt).tolist()]
    assert tokenizer(prompt)["input_ids"] == expected
    assert mlx_tokenizer.encode(prompt) == expected
    assert tokenizer.decode(expected, skip_special_tokens=True) == prompt

    result = mlxgpt.generate(
        prompt, run=str(run.folder), temperature=0.0, max_tokens=50 - len(expected)
    )
    with torch.no_grad():
        input_ids = torch.tensor([expected])
        greedy = hf_model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_length=50
        )[0].tolist()
    greedy = greedy[: greedy.index(run.bos, 1)] if run.bos in greedy[1:] else greedy
    assert tokenizer.decode(greedy, skip_special_tokens=True) == result.texts[0]
    mlx_ids = list(expected)
    while len(mlx_ids) < len(greedy):
        mlx_ids.append(int(mlx_model(mx.array([mlx_ids]))[0, -1].argmax()))
    assert mlx_ids == greedy


def test_export_and_import_give_the_same_model(tmp_path: Path, kind: str) -> None:
    run = importing.create_imported_run(make_imported_model(kind, True), tmp_path / "run")
    _, checkpoint = load_model(run)
    exporting.export_run(run, checkpoint.parameters, 0, tmp_path / "hf", "hf")
    reimported = importing.create_imported_run(
        importing.read_model(str(tmp_path / "hf")), tmp_path / "back"
    )
    assert reimported.tokenizer.fingerprint == run.tokenizer.fingerprint
    assert reimported.add_bos_token == run.add_bos_token
    _, restored = load_model(reimported)
    for name, value in checkpoint.parameters.items():
        assert mx.array_equal(value, restored.parameters[name]), name
    text = tmp_path / "text.txt"
    text.write_text(TEXT.strip()[:800], encoding="utf-8")
    losses = [mlxgpt.evaluate(run=str(r.folder), source=[text]).loss for r in (run, reimported)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("bits", [8, 4])
def test_mlx_lm_runs_quantized_exports(tmp_path: Path, bits: int) -> None:
    run = importing.create_imported_run(make_imported_model("bpe", False), tmp_path / "run")
    _, checkpoint = load_model(run)
    exporting.export_run(run, checkpoint.parameters, 0, tmp_path / "q", "mlx-lm", bits)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    mlx_model, _ = mlx_lm.utils.load(str(tmp_path / "q"))
    rounded = exporting.fake_quantize(run.config.model, checkpoint.parameters, "mlx-lm", bits)
    our_model = GPT(run.config.model)
    load_parameters(our_model, rounded)
    ids = mx.array(np.random.default_rng(0).integers(0, 300, (1, 40)))
    np.testing.assert_allclose(np.array(mlx_model(ids)), np.array(our_model(ids)), atol=2e-3)
    assert (tmp_path / "q" / "model.safetensors").stat().st_size < sum(
        value.nbytes for value in checkpoint.parameters.values()
    )
