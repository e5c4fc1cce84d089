"""Adapters in the layouts of PEFT and mlx-lm; tests/oracle/ compares with the libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.backend.safetensors_io import load_arrays, save_arrays
from mlxgpt.config import LoRAConfig, ModelConfig
from mlxgpt.convert.adapters import (
    ADAPTER_CONFIG,
    AdapterModel,
    read_adapters,
    write_mlx_lm_adapters,
    write_peft_adapters,
)
from mlxgpt.model.gpt import GPT
from mlxgpt.model.lora import add_lora, fuse_adapters
from mlxgpt.model.parameters import flatten_params
from mlxgpt.utils.errors import UserError
from tests.helpers.training_runs import QWEN3_PARTS

SIZES: dict[str, Any] = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 40}
CLASSIC = ModelConfig(**SIZES)
MODERN = ModelConfig(**SIZES, **{**QWEN3_PARTS, "bias": False})
WRITERS = {"peft": write_peft_adapters, "mlx-lm": write_mlx_lm_adapters}


@pytest.fixture(params=[CLASSIC, MODERN], ids=["classic", "modern"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


@pytest.fixture(params=WRITERS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_adapters(config: ModelConfig, lora: LoRAConfig) -> dict[str, mx.array]:
    model = GPT(config)
    add_lora(model, lora)
    return {
        name: value + 0.3 * mx.random.normal(value.shape, key=mx.random.key(n))
        for n, (name, value) in enumerate(flatten_params(model.trainable_parameters()).items())
    }


def write(folder: Path, config: ModelConfig, layout: str, **options: Any) -> dict[str, mx.array]:
    lora = LoRAConfig(lora_rank=4, lora_alpha=6.0, **options)
    arrays = make_adapters(config, lora)
    WRITERS[layout](folder, AdapterModel(config, lora, arrays, range(0), "exports/base-hf"))
    return arrays


def parameters_of(config: ModelConfig) -> dict[str, mx.array]:
    return flatten_params(GPT(config).parameters())


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"lora_layers": 2}])
def test_adapters_come_back_unchanged(
    tmp_path: Path, config: ModelConfig, layout: str, options: dict[str, Any]
) -> None:
    arrays = write(tmp_path, config, layout, **options)
    lora, restored = read_adapters(tmp_path, config, parameters_of(config))
    assert lora == LoRAConfig(lora_rank=4, lora_alpha=6.0, **options)
    assert restored.keys() == arrays.keys()
    for name, value in restored.items():
        np.testing.assert_array_equal(np.array(value), np.array(arrays[name]))


def drop(folder: Path, part: str) -> None:
    """Delete the adapters of a layer from a PEFT folder, and give q and v different a."""
    file = folder / "adapter_model.safetensors"
    arrays = {
        name: mx.array(np.array(value)) * (2 if ".q_proj.lora_A" in name else 1)
        for name, value in load_arrays(file).items()
        if part not in name
    }
    save_arrays(file, arrays)


@pytest.mark.parametrize("dora", [False, True])
def test_separate_adapters_are_joined(tmp_path: Path, dora: bool) -> None:
    """Queries and values with their own a, keys without: one of twice the rank, the same W."""
    arrays = write(tmp_path, MODERN, "peft", dora=dora)
    drop(tmp_path, "k_proj")
    parameters = parameters_of(MODERN)
    lora, joined = read_adapters(tmp_path, MODERN, parameters)
    assert lora.lora_rank == 8
    assert lora.lora_scale == 1.5
    fused = GPT(MODERN)
    fuse_adapters(fused, lora, joined)
    for n in range(3):
        name = f"h.{n}.attn.c_attn"
        weight = np.array(parameters[f"{name}.weight"])
        delta = 1.5 * np.array(arrays[f"{name}.lora_a"] @ arrays[f"{name}.lora_b"]).T
        delta[:32] *= 2
        delta[32:64] = 0
        expected = weight + delta
        if dora:
            norms = np.array(arrays[f"{name}.m"])
            norms[32:64] = np.linalg.norm(weight[32:64], axis=1)
            expected *= (norms / np.linalg.norm(expected, axis=1))[:, None]
        np.testing.assert_allclose(np.array(fused.h[n].attn.c_attn.weight), expected, atol=1e-5)


def edit(folder: Path, **values: Any) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("layout", "values", "problem"),
    [
        ("peft", {"peft_type": "IA3"}, "peft_type is 'IA3', which is not supported"),
        ("peft", {"bias": "all"}, "bias is 'all'"),
        ("peft", {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ("peft", {"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ("peft", {"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is"),
        ("peft", {"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ("peft", {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ("peft", {"r": 0}, "does not contain valid adapters"),
        ("peft", {"lora_alpha": -1}, "its scale is -0.25"),
        ("peft", {"lora_alpha": "many"}, "does not contain valid adapters"),
        ("mlx-lm", {"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ("mlx-lm", {"lora_parameters": {"rank": 4}}, "does not contain valid adapters: 'scale'"),
    ],
)
def test_unsupported_adapters_are_refused(
    tmp_path: Path, layout: str, values: dict[str, Any], problem: str
) -> None:
    write(tmp_path, CLASSIC, layout)
    edit(tmp_path, **values)
    with pytest.raises(UserError, match=problem):
        read_adapters(tmp_path, CLASSIC, parameters_of(CLASSIC))


def test_adapters_of_another_model_are_refused(tmp_path: Path, layout: str) -> None:
    write(tmp_path, CLASSIC, layout)
    with pytest.raises(UserError, match="is not a layer of the model") as caught:
        read_adapters(tmp_path, MODERN, parameters_of(MODERN))
    assert "--base RUN" in caught.value.remedy
    wide = ModelConfig(**{**SIZES, "n_embd": 64})
    with pytest.raises(UserError, match="does not fit the model"):
        read_adapters(tmp_path, wide, parameters_of(wide))
    shallow = ModelConfig(**{**SIZES, "n_layer": 2})
    with pytest.raises(UserError, match="is not a layer of the model"):
        read_adapters(tmp_path, shallow, parameters_of(shallow))


def test_rsloras_scale(tmp_path: Path) -> None:
    write(tmp_path, CLASSIC, "peft")
    edit(tmp_path, use_rslora=True)
    lora, _ = read_adapters(tmp_path, CLASSIC, parameters_of(CLASSIC))
    assert lora.lora_scale == pytest.approx(6 / 2)


# As PEFT 0.19 writes them, without those that our own export writes.
PEFT_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("auto_mapping", "corda_config", "eva_config", "exclude_modules"), None),
    **dict.fromkeys(("layer_replication", "layers_pattern", "layers_to_transform"), None),
    **dict.fromkeys(("lora_ga_config", "megatron_config", "modules_to_save", "revision"), None),
    **dict.fromkeys(("target_parameters", "trainable_token_indices", "use_bdlora"), None),
    **dict.fromkeys(("ensure_weight_tying", "lora_bias", "use_qalora", "use_rslora"), False),
    **{"alpha_pattern": {}, "loftq_config": {}, "rank_pattern": {}, "init_lora_weights": True},
    **{"megatron_core": "megatron.core", "peft_version": "0.19.1", "qalora_group_size": 16},
    "target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
}


def test_all_settings_of_peft_are_understood(tmp_path: Path, config: ModelConfig) -> None:
    arrays = write(tmp_path, config, "peft")
    edit(tmp_path, **PEFT_SETTINGS)
    _, restored = read_adapters(tmp_path, config, parameters_of(config))
    assert restored.keys() == arrays.keys()


def test_converted_adapters_are_mlx_lms_by_their_file(tmp_path: Path) -> None:
    """Converters leave PEFT's settings in mlx-lm's config."""
    write(tmp_path, MODERN, "mlx-lm")
    edit(tmp_path, peft_type="LORA", r=4, lora_alpha=100, target_modules=["q_proj"])
    lora, _ = read_adapters(tmp_path, MODERN, parameters_of(MODERN))
    assert lora.lora_scale == 1.5


def test_damaged_folders_are_refused(tmp_path: Path, layout: str) -> None:
    write(tmp_path, CLASSIC, layout)
    parameters = parameters_of(CLASSIC)
    (file,) = tmp_path.glob("*.safetensors")
    contents = file.read_bytes()
    for damage in (contents[:-10], b"", b"\xff" * 100):
        file.write_bytes(damage)
        with pytest.raises(UserError):
            read_adapters(tmp_path, CLASSIC, parameters)
    file.write_bytes(contents)
    arrays = {name: mx.array(np.array(value)) for name, value in load_arrays(file).items()}
    save_arrays(file, {name: value * mx.nan for name, value in arrays.items()})
    with pytest.raises(UserError, match="contains non-finite values"):
        read_adapters(tmp_path, CLASSIC, parameters)
    file.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(contents)
    with pytest.raises(UserError, match="has neither adapter_model") as caught:
        read_adapters(tmp_path, CLASSIC, parameters)
    assert "pickle" in caught.value.remedy
    save_arrays(file, {})
    with pytest.raises(UserError, match="contains no adapters"):
        read_adapters(tmp_path, CLASSIC, parameters)
    (tmp_path / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(UserError, match="does not contain valid adapters"):
        read_adapters(tmp_path, CLASSIC, parameters)


def test_mlx_lm_has_no_place_for_new_tokens(tmp_path: Path) -> None:
    lora = LoRAConfig(lora_rank=4)
    model = AdapterModel(CLASSIC, lora, make_adapters(CLASSIC, lora), range(38, 40), "base")
    with pytest.raises(UserError, match="2 new tokens were trained") as caught:
        write_mlx_lm_adapters(tmp_path, model)
    assert "leave out --adapters" in caught.value.remedy
