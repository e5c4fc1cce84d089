"""Importing nanoGPT checkpoints, written with PyTorch as nanoGPT does. Needs PyTorch."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import mlxgpt
from mlxgpt.config import ModelConfig
from mlxgpt.convert.nanogpt import read_nanogpt_checkpoint
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import load_parameters
from mlxgpt.utils.errors import UserError
from tests.helpers.hostile_files import BYTE_EDITS, apply_edits

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

SHAPE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 12,
    "block_size": 8,
    "bias": True,
    "vocab_size": 64,
    "dropout": 0.1,
}


def make_state_dict(shape: dict[str, Any], std: float = 0.3) -> dict[str, Any]:
    """Random weights with nanoGPT's names, shapes and order, large enough that each matters."""
    generator = torch.Generator().manual_seed(0)
    C, names = shape["n_embd"], {}

    def add(name: str, *size: int, mean: float = 0.0, bias: bool = shape["bias"]) -> None:
        names[f"{name}.weight"] = mean + std * torch.randn(*size, generator=generator)
        if bias:
            names[f"{name}.bias"] = std * torch.randn(size[0], generator=generator)

    add("transformer.wte", shape["vocab_size"], C, bias=False)
    add("transformer.wpe", shape["block_size"], C, bias=False)
    for n in range(shape["n_layer"]):
        block = f"transformer.h.{n}"
        add(f"{block}.ln_1", C, mean=1.0)
        add(f"{block}.attn.c_attn", 3 * C, C)
        add(f"{block}.attn.c_proj", C, C)
        add(f"{block}.ln_2", C, mean=1.0)
        add(f"{block}.mlp.c_fc", 4 * C, C)
        add(f"{block}.mlp.c_proj", C, 4 * C)
    add("transformer.ln_f", C, mean=1.0)
    names["lm_head.weight"] = names["transformer.wte.weight"]
    return names


def reference_logits(
    shape: dict[str, Any], names: dict[str, Any], ids: Any, gelu: str
) -> np.ndarray:
    """Logits of ids [B, T] by nanoGPT's formulas in PyTorch, in float32."""
    F = torch.nn.functional
    C, H = shape["n_embd"], shape["n_head"]
    B, T = ids.shape

    def get(name: str) -> Any:
        value = names.get(f"transformer.{name}")
        return value if value is None else value.float()

    def linear(name: str, x: Any) -> Any:
        return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    def norm(name: str, x: Any) -> Any:
        return F.layer_norm(x, (C,), get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    x = F.embedding(ids, get("wte.weight")) + get("wpe.weight")[:T]
    for n in range(shape["n_layer"]):
        qkv = linear(f"h.{n}.attn.c_attn", norm(f"h.{n}.ln_1", x)).split(C, dim=2)
        q, k, v = (heads.view(B, T, H, C // H).transpose(1, 2) for heads in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(f"h.{n}.attn.c_proj", y.transpose(1, 2).reshape(B, T, C))
        inner = F.gelu(linear(f"h.{n}.mlp.c_fc", norm(f"h.{n}.ln_2", x)), approximate=gelu)
        x = x + linear(f"h.{n}.mlp.c_proj", inner)
    return (norm("ln_f", x) @ get("wte.weight").T).numpy()


def make_checkpoint(shape: dict[str, Any], names: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The dictionary that nanoGPT's train.py passes to torch.save."""
    parameters = [torch.nn.Parameter(value.clone()) for value in names.values()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {
        "model": names,
        "optimizer": optimizer.state_dict(),
        "model_args": shape,
        "iter_num": 250,
        "best_val_loss": torch.tensor([1.25, 1.75]).mean(),
        "config": {"dataset": "shakespeare_char", "device": "cuda", "compile": True, "lr": 1e-3},
        **changes,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


def our_logits(path: Path, ids: Any) -> np.ndarray:
    """Logits of the imported model."""
    imported = read_nanogpt_checkpoint(path)
    model = GPT(imported.config)
    load_parameters(model, imported.parameters)
    return np.array(model(mx.array(ids.numpy().astype(np.int32))))


def random_ids(shape: dict[str, Any]) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, shape["vocab_size"], (3, shape["block_size"]), generator=generator)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("masked", [True, False])
def test_logits_match_pytorch(
    path: Path, prefix: str, bias: bool, dtype: str, masked: bool
) -> None:
    shape = {**SHAPE, "bias": bias}
    names = {
        name: value.to(getattr(torch, dtype)) for name, value in make_state_dict(shape).items()
    }
    names["lm_head.weight"] = names["transformer.wte.weight"]
    tensors = dict(names)
    if masked:  # nanoGPT's mask buffers for PyTorch before 2.0
        for n in range(SHAPE["n_layer"]):
            tensors[f"transformer.h.{n}.attn.bias"] = torch.tril(torch.ones(1, 1, 8, 8))
    tensors = {prefix + name: value for name, value in tensors.items()}
    torch.save(make_checkpoint(shape, tensors), path)
    ids = random_ids(shape)
    expected = reference_logits(shape, names, ids, "tanh")
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(our_logits(path, ids), expected, atol=1e-4)


def test_characters_in_any_order_keep_their_ids(home: Path) -> None:
    """With the meta.pkl that nanoGPT's sample.py reads, also after an export."""
    order = "the cadogsn.,!?\n"
    shape = {**SHAPE, "vocab_size": len(order)}
    torch.save(make_checkpoint(shape, make_state_dict(shape)), home / "ckpt.pt")
    stoi = {character: id for id, character in enumerate(order)}
    meta = {"vocab_size": len(order), "itos": dict(enumerate(order)), "stoi": stoi}
    (home / "meta.pkl").write_bytes(pickle.dumps(meta))
    run = mlxgpt.import_model("ckpt.pt", meta="meta.pkl", run="mine")
    assert run.tokenizer.encode("the cat").tolist() == [0, 1, 2, 3, 4, 5, 0]
    greedy: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
    text = mlxgpt.generate("the cat", run="mine", **greedy).texts[0]
    ids = torch.tensor([[stoi[c] for c in "the cat"]])
    expected = reference_logits(shape, make_state_dict(shape), ids, "tanh")[0, -1]
    assert text == "the cat" + order[int(expected.argmax())]
    mlxgpt.export(to="hf", run="mine", output="exported")
    reimported = mlxgpt.import_model("exported", run="back")
    assert reimported.tokenizer.fingerprint == run.tokenizer.fingerprint
    assert mlxgpt.generate("the cat", run="back", **greedy).texts == [text]


def test_nonfinite_weights_are_refused(home: Path, gpt2: object) -> None:
    names = make_state_dict({**SHAPE, "vocab_size": 50304})
    names["transformer.h.1.mlp.c_fc.weight"][3, 4] = float("inf")
    torch.save(make_checkpoint({**SHAPE, "vocab_size": 50304}, names), home / "ckpt.pt")
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight contains non-finite values"):
        mlxgpt.import_model("ckpt.pt", run="mine")


def test_a_padded_vocabulary_is_kept(path: Path) -> None:
    shape = {**SHAPE, "vocab_size": 50304}
    names = make_state_dict(shape)
    torch.save(make_checkpoint(shape, names), path)
    assert read_nanogpt_checkpoint(path).parameters["wte.weight"].shape == (50304, 12)
    ids = random_ids(shape)
    np.testing.assert_allclose(
        our_logits(path, ids), reference_logits(shape, names, ids, "tanh"), atol=1e-4
    )


def test_the_exact_gelu_of_current_nanogpt_differs_little(path: Path) -> None:
    """With weights of the initial size; the file does not say which GELU was used."""
    names = make_state_dict(SHAPE, std=0.02)
    torch.save(make_checkpoint(SHAPE, names), path)
    ids = random_ids(SHAPE)
    np.testing.assert_allclose(
        our_logits(path, ids), reference_logits(SHAPE, names, ids, "none"), atol=1e-4
    )


def test_training_metadata_is_read(path: Path) -> None:
    torch.save(make_checkpoint(SHAPE, make_state_dict(SHAPE)), path)
    imported = read_nanogpt_checkpoint(path)
    assert imported.config == ModelConfig(**SHAPE)
    assert (imported.step, imported.dataset) == (250, "shakespeare_char")
    assert {value.dtype for value in imported.parameters.values()} == {mx.float32}


def test_missing_training_metadata_is_none(path: Path) -> None:
    """The oldest files have neither `bias` nor `config`."""
    shape = {name: value for name, value in SHAPE.items() if name not in ("bias", "dropout")}
    saved = make_checkpoint(shape, make_state_dict(SHAPE))
    del saved["config"]
    torch.save(saved, path)
    imported = read_nanogpt_checkpoint(path)
    assert imported.dataset is None
    assert (imported.config.bias, imported.config.dropout) == (True, 0.0)


Change = Callable[[dict[str, Any]], Any]
WTE, HEAD, C_FC = "transformer.wte.weight", "lm_head.weight", "transformer.h.0.mlp.c_fc.weight"


def change_tensors(**tensors: Any) -> Change:
    """Replace tensors of the model, named with __ for a dot; None removes one."""

    def change(saved: dict[str, Any]) -> None:
        for name, value in tensors.items():
            saved["model"].pop(name.replace("__", "."), None)
            if value is not None:
                saved["model"][name.replace("__", ".")] = value

    return change


def change_model_args(**values: Any) -> Change:
    return lambda saved: saved["model_args"].update(values)


def drop_key(part: str, name: str) -> Change:
    return lambda saved: (saved[part] if part else saved).pop(name)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop_key("", "model"), "it has no 'model'"),
        (drop_key("", "model_args"), "it has no 'model_args'"),
        (drop_key("", "iter_num"), "it has no 'iter_num'"),
        (drop_key("model_args", "n_embd"), "its model_args lack n_embd"),
        (lambda saved: saved.update(model_args=[1]), "its model_args are invalid"),
        (lambda saved: saved.update(model=[1]), "not a dictionary of tensors"),
        (lambda saved: saved["model"].update({1: 2}), "not a dictionary of tensors"),
        (lambda saved: saved.update(iter_num="9"), "not a valid step"),
        (lambda saved: saved.update(iter_num=-1), "not a valid step"),
        (change_model_args(n_layer=-1), "n_layer = -1 is too small"),
        (change_model_args(n_layer="2"), "n_layer = '2' has the wrong type"),
        (change_model_args(n_head=5), "is not divisible by n_head = 5"),
        (change_model_args(vocab_size=0), "vocab_size is 0"),
        (change_model_args(vocab_size=None), "vocab_size = None has the wrong type"),
        (change_model_args(n_layer=2_000_000_000), r"describe [\d,]+ parameters, but it has"),
        (change_model_args(bias=False), r"describe [\d,]+ parameters, but it has"),
        (change_tensors(lm_head__weight=None), "no token embedding or no output head"),
        (change_tensors(transformer__wte__weight=None), "no token embedding or no output head"),
        (change_tensors(lm_head__weight=torch.ones(64, 12)), "the output head is not tied"),
        (change_tensors(lm_head__weight=torch.ones(1, 12)), "the output head is not tied"),
        (
            change_tensors(lm_head__weight=torch.ones(64, 12).half()),
            "the output head is not tied",
        ),
        (change_tensors(transformer__ln_f__bias=None), r"describe [\d,]+ parameters, but it has"),
        (change_tensors(transformer__extra__weight=torch.ones(3)), r"describe [\d,]+ parameters"),
        (
            change_tensors(transformer__h__0__mlp__c_fc__weight=torch.ones(12, 48)),
            "its weights do not match its model_args",
        ),
        (change_tensors(_orig_mod__lm_head__weight=torch.ones(64, 12)), "'lm_head.weight' twice"),
        (
            change_tensors(transformer__ln_f__bias=torch.ones(12).double()),
            "has dtype torch.float64",
        ),
        (change_tensors(transformer__ln_f__bias=torch.ones(12).int()), "has dtype torch.int32"),
        (change_tensors(transformer__ln_f__bias=3), "not a plain tensor"),
        (change_tensors(transformer__ln_f__bias=torch.ones(12).to_sparse()), "not a plain tensor"),
        (
            change_tensors(transformer__ln_f__bias=torch.ones(12, device="meta")),
            "not a plain tensor",
        ),
    ],
)
def test_invalid_checkpoints_are_refused(path: Path, change: Change, problem: str) -> None:
    saved = make_checkpoint(dict(SHAPE), make_state_dict(SHAPE))
    change(saved)
    torch.save(saved, path)
    with pytest.raises(UserError, match=problem) as error:
        read_nanogpt_checkpoint(path)
    assert "\n" not in error.value.problem
    assert "\n" not in error.value.remedy


def test_tensors_larger_than_their_storage_are_refused(path: Path) -> None:
    """A file of a few kilobytes whose tensors would need terabytes."""
    wide = {**SHAPE, "vocab_size": 1 << 36}
    names = make_state_dict(SHAPE)
    names[WTE] = torch.zeros(1, 12).expand(1 << 36, 12)
    names[HEAD] = torch.zeros(1, 12).expand(1 << 36, 12)
    torch.save(make_checkpoint(wide, make_state_dict(SHAPE), model=names), path)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="its tensors overlap"):
        read_nanogpt_checkpoint(path)


class Trap:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_code_in_a_checkpoint_is_not_executed(path: Path, tmp_path: Path) -> None:
    torch.save(make_checkpoint(SHAPE, make_state_dict(SHAPE), more=Trap(tmp_path / "sprung")), path)
    with pytest.raises(UserError, match="contains more than weights and plain settings"):
        read_nanogpt_checkpoint(path)
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists(), "and it would have"


@pytest.mark.parametrize("kind", ["missing", "text", "list", "half", "legacy", "compressed"])
def test_other_files_are_refused(path: Path, kind: str) -> None:
    saved = make_checkpoint(SHAPE, make_state_dict(SHAPE))
    torch.save(saved, path)
    original = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "text":
        path.write_text("to be or not to be")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "half":
        path.write_bytes(original[: len(original) // 2])
    elif kind == "legacy":
        torch.save(saved, path, _use_new_zipfile_serialization=False)
    else:
        with zipfile.ZipFile(path) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    with pytest.raises(UserError, match=r"cannot read|is not a nanoGPT checkpoint") as error:
        read_nanogpt_checkpoint(path)
    assert "\n" not in error.value.problem


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damage_is_refused_or_harmless(path: Path, count: int) -> None:
    torch.save(make_checkpoint(SHAPE, make_state_dict(SHAPE)), path)
    original = path.read_bytes()

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(BYTE_EDITS)
    def check(edits: Any) -> None:
        path.write_bytes(apply_edits(original, edits))
        try:
            imported = read_nanogpt_checkpoint(path)
        except UserError:
            return
        load_parameters(GPT(imported.config), imported.parameters)

    check()
