"""Folders in transformers' format. tests/oracle/test_oracle_huggingface.py compares them with
transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxgpt.convert import huggingface
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import load_parameters
from mlxgpt.utils.errors import UserError
from tests.helpers.external_models import MODEL_CONFIG, random_parameters, write_gpt2_folder

Arrays = dict[str, mx.array]


def load_weights(folder: Path) -> Arrays:
    return cast(Arrays, mx.load(str(folder / "model.safetensors")))


def save_weights(folder: Path, arrays: Arrays) -> None:
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def attention_masks() -> Arrays:
    mask = mx.tril(mx.ones((1, 1, 16, 16)))
    return {f"h.{n}.attn.bias": mask for n in range(2)} | {
        f"h.{n}.attn.masked_bias": mx.array(-1e4) for n in range(2)
    }


def transpose_matrices(arrays: Arrays) -> Arrays:
    suffixes = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {n: mx.contiguous(a.T) if n.endswith(suffixes) else a for n, a in arrays.items()}


LAYOUTS: dict[str, Callable[[Arrays], Arrays]] = {
    "plain": lambda a: a,
    "a prefix": lambda a: {f"transformer.{n}": v for n, v in a.items()},
    "masks": lambda a: a | attention_masks(),
    "a prefix and masks": lambda a: {
        f"transformer.{n}": v for n, v in (a | attention_masks()).items()
    },
    "a tied head": lambda a: a | {"lm_head.weight": a["wte.weight"] + 0},
    "matrices [out, in]": transpose_matrices,
    "of DistributedDataParallel": lambda a: {f"module.{n}": v for n, v in a.items()},
    "of torch.compile": lambda a: {f"_orig_mod.transformer.{n}": v for n, v in a.items()},
    "of both": lambda a: {
        f"module._orig_mod.transformer.{n}": v for n, v in (a | attention_masks()).items()
    },
    "of the other order": lambda a: {f"_orig_mod.module.{n}": v for n, v in a.items()},
    "compiled blocks": lambda a: {
        re.sub(r"^(h\.\d+)\.", r"transformer.\1._orig_mod.", n): v for n, v in a.items()
    },
    "of FSDP": lambda a: {
        "_fsdp_wrapped_module.transformer."
        + re.sub(r"^(h\.\d+)\.", r"\1._fsdp_wrapped_module.", n): v
        for n, v in a.items()
    },
    "of mlx-lm": lambda a: {f"model.{n}": v for n, v in transpose_matrices(a).items()},
    "float16": lambda a: {n: v.astype(mx.float16) for n, v in a.items()},
    "bfloat16": lambda a: {n: v.astype(mx.bfloat16) for n, v in a.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_parameters(tmp_path: Path, layout: str) -> None:
    expected = write_gpt2_folder(tmp_path)
    save_weights(tmp_path, LAYOUTS[layout](load_weights(tmp_path)))
    config = huggingface.read_gpt2_config(tmp_path)
    assert config == replace(MODEL_CONFIG, bias=True)
    actual = huggingface.read_gpt2_parameters(tmp_path, config)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == mx.float32
        kind = {"float16": mx.float16, "bfloat16": mx.bfloat16}.get(layout, mx.float32)
        assert mx.array_equal(value, expected[name].astype(kind).astype(mx.float32)), name


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    expected = write_gpt2_folder(tmp_path)
    arrays = list(load_weights(tmp_path).items())
    mx.eval(dict(arrays))
    (tmp_path / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for n in range(3):
        name = f"model-0000{n + 1}-of-00003.safetensors"
        mx.save_safetensors(str(tmp_path / name), dict(arrays[n::3]))
        weight_map |= dict.fromkeys((key for key, _ in arrays[n::3]), name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    actual = huggingface.read_gpt2_parameters(tmp_path, huggingface.read_gpt2_config(tmp_path))
    assert all(mx.array_equal(actual[name], value) for name, value in expected.items())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model-00002-of-00003.safetensors"):
        huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)
    index["weight_map"] = {"wte.weight": "../model.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="its index refers to files outside the folder"):
        huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)


@pytest.mark.parametrize("bias", [True, False])
def test_write_and_read_round_trip(tmp_path: Path, bias: bool) -> None:
    config = replace(MODEL_CONFIG, bias=bias)
    expected = random_parameters(config)
    huggingface.write_gpt2_config(tmp_path, config, 279)
    huggingface.write_gpt2_parameters(tmp_path, config, expected)
    read_config = huggingface.read_gpt2_config(tmp_path)
    actual = huggingface.read_gpt2_parameters(tmp_path, read_config)
    assert {name: actual[name].shape for name in expected} == {
        n: v.shape for n, v in expected.items()
    }
    ids = mx.arange(16)[None]
    models = GPT(config), GPT(read_config)
    load_parameters(models[0], expected)
    load_parameters(models[1], actual)
    assert mx.allclose(models[0](ids), models[1](ids), atol=1e-5)
    extra_biases = [value for name, value in actual.items() if name not in expected]
    assert all((value == 0).all() for value in extra_biases), (
        "biases that a model has not are zeros"
    )
    assert bool(extra_biases) != bias


UNSUPPORTED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "llama"}, "model_type is 'llama'"),
    "another activation": ({"activation_function": "relu"}, "activation_function is 'relu'"),
    "another epsilon": ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    "scaled by layer": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
    "another width inside": ({"n_inner": 100}, "n_inner is 100, not 4 × 32"),
    "no layers": ({"n_layer": 0}, "n_layer = 0"),
    "no number": ({"n_layer": "many"}, "n_layer = 'many'"),
    "no head fits": ({"n_head": 5}, "n_embd = 32"),
    "beyond all numbers": ({"n_embd": 10**30, "n_inner": None}, "n_embd"),
    "too large for the weights": ({"n_layer": 10**9}, "do not match its config.json"),
    "other positions": ({"n_positions": 17, "n_ctx": 17}, "do not match its config.json"),
}


@pytest.mark.parametrize("case", UNSUPPORTED_CONFIGS)
def test_unsupported_models_are_refused(tmp_path: Path, case: str) -> None:
    write_gpt2_folder(tmp_path)
    change, problem = UNSUPPORTED_CONFIGS[case]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as error:
        huggingface.read_gpt2_parameters(tmp_path, huggingface.read_gpt2_config(tmp_path))
    assert problem in error.value.problem


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any], mark: str = "") -> None:
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(mark + json.dumps(tree), encoding="utf-8")


MISSING_FIELDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda tree: None,
    "model_type": lambda tree: tree.pop("model_type"),
    "model_type and architectures": lambda tree: (
        tree.pop("model_type"),
        tree.pop("architectures"),
    ),
    "n_positions": lambda tree: tree.pop("n_positions"),
    "n_positions and n_ctx": lambda tree: (tree.pop("n_positions"), tree.pop("n_ctx")),
    "all but heads": lambda tree: [
        tree.pop(n) for n in ("n_layer", "n_embd", "vocab_size", "n_positions", "n_ctx")
    ],
    "transformers' common names": lambda tree: tree.update(
        hidden_size=tree.pop("n_embd"),
        num_attention_heads=tree.pop("n_head"),
        num_hidden_layers=tree.pop("n_layer"),
        max_position_embeddings=tree.pop("n_positions"),
    ),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("case", MISSING_FIELDS)
def test_missing_config_fields_are_inferred(tmp_path: Path, case: str, mark: str) -> None:
    write_gpt2_folder(tmp_path)
    change_config(tmp_path, MISSING_FIELDS[case], mark)
    assert huggingface.read_gpt2_config(tmp_path) == replace(MODEL_CONFIG, bias=True)


def test_fields_that_cannot_be_inferred_are_named(tmp_path: Path) -> None:
    write_gpt2_folder(tmp_path)
    change_config(tmp_path, lambda tree: tree.pop("n_head"))
    with pytest.raises(UserError, match=r"config\.json lacks n_head"):
        huggingface.read_gpt2_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["GPTJForCausalLM"], "n_embd": 8}')
    with pytest.raises(UserError, match=r"'missing \(architectures: GPTJForCausalLM\)'"):
        huggingface.read_gpt2_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(UserError, match=r"'missing \(architectures: missing\)'"):
        huggingface.read_gpt2_config(tmp_path)


@pytest.mark.parametrize("begin", huggingface.EXTRA_HEADS)
def test_extra_heads_are_skipped_with_a_log_line(
    tmp_path: Path, begin: str, notes: list[str]
) -> None:
    expected = write_gpt2_folder(tmp_path)
    head = {f"{begin}summary.weight": mx.ones((1, 32)), f"{begin}summary.bias": mx.ones((1,))}
    save_weights(tmp_path, load_weights(tmp_path) | head)
    actual = huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)
    assert actual.keys() == expected.keys()
    head_name = huggingface.EXTRA_HEADS[begin]
    assert sorted(notes) == sorted(f"skipped {name}: {head_name}" for name in head)


@pytest.mark.parametrize("begin", huggingface.OTHER_TASK_HEADS)
def test_models_for_other_tasks_are_refused(tmp_path: Path, begin: str, notes: list[str]) -> None:
    write_gpt2_folder(tmp_path)
    arrays = load_weights(tmp_path) | {f"{begin}weight": mx.ones((2, 32))}
    save_weights(tmp_path, {f"transformer.{name}": value for name, value in arrays.items()})
    with pytest.raises(UserError, match=r"is an? .*\(GPT2For.*, not a language model"):
        huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)
    save_weights(tmp_path, arrays | {"lm_head.weight": arrays["wte.weight"] + 0})
    huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)
    assert len(notes) == 1


OTHER_WEIGHTS: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "an adapter": (
        lambda a: a | {"h.0.attn.c_attn.lora_A.default.weight": mx.ones((2, 32))},
        "have 'h.0.attn.c_attn.lora_A.default.weight', which is not part of GPT-2",
    ),
    "integers": (
        lambda a: a | {"h.0.mlp.c_fc.weight": a["h.0.mlp.c_fc.weight"].astype(mx.int8)},
        "are quantized: h.0.mlp.c_fc.weight has dtype mlx.core.int8",
    ),
    "more rows than config.json says": (
        lambda a: a | {"wte.weight": mx.zeros((320, 32))},
        "wte.weight has 320 rows, but vocab_size is 280",
    ),
    "a name twice": (
        lambda a: a | {"transformer.wte.weight": a["wte.weight"] + 0},
        "have 'wte.weight' twice",
    ),
}


@pytest.mark.parametrize("case", OTHER_WEIGHTS)
def test_unsupported_weights_are_named(tmp_path: Path, case: str) -> None:
    write_gpt2_folder(tmp_path)
    change, problem = OTHER_WEIGHTS[case]
    save_weights(tmp_path, change(load_weights(tmp_path)))
    with pytest.raises(UserError) as error:
        huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)
    assert problem in error.value.problem


def test_weight_files_with_other_names_and_formats(tmp_path: Path) -> None:
    expected = write_gpt2_folder(tmp_path)
    path = tmp_path / "gpt2.fp32.safetensors"
    (tmp_path / "model.safetensors").rename(path)
    assert huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG).keys() == expected.keys()
    for name, remedy in (
        ("adapter_model.safetensors", "is a LoRA adapter"),
        ("tf_model.h5", "is not supported"),
        ("flax_model.msgpack", "is not supported"),
        ("pytorch_model-00001-of-00002.bin", "a pickle"),
    ):
        path = path.rename(tmp_path / name)
        with pytest.raises(UserError, match=r"has no model\.safetensors") as error:
            huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)
        assert remedy in error.value.remedy


def test_untied_output_head_is_refused(tmp_path: Path) -> None:
    write_gpt2_folder(tmp_path)
    arrays = load_weights(tmp_path)
    save_weights(tmp_path, arrays | {"lm_head.weight": arrays["wte.weight"] + 1e-3})
    with pytest.raises(UserError, match="the output head is not tied to the token embedding"):
        huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)


def test_unexpected_names_and_shapes_are_refused(tmp_path: Path) -> None:
    write_gpt2_folder(tmp_path)
    arrays = load_weights(tmp_path)
    for change in (
        {"wte.weight": arrays["wte.weight"].T},
        {"h.0.ln_1.bias": mx.zeros((31,)), "more": mx.zeros((1,))},
        {"h.0.ln_1.bias": mx.zeros((31,))},
        {"h.5.attn.bias": mx.zeros((4,)), "h.x.mlp.c_fc.weight": mx.zeros((9, 9))},
    ):
        save_weights(tmp_path, arrays | change)
        with pytest.raises(UserError):
            huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)


def test_truncated_file_and_pickle_are_refused(tmp_path: Path) -> None:
    write_gpt2_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="are damaged"):
        huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors") as error:
        huggingface.read_gpt2_parameters(tmp_path, MODEL_CONFIG)
    assert "a pickle, which can run code" in error.value.remedy
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="cannot read"):
        huggingface.read_gpt2_config(tmp_path)
