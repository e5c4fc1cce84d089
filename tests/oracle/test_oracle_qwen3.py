"""Modern models compared with transformers' Qwen3, which has the same parts: RMSNorm, rotary
positions, normalized queries and keys, SwiGLU, no biases, and a tied or untied output head. Needs
PyTorch and transformers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxgpt.config import Config, ModelConfig, override_config
from mlxgpt.convert import huggingface, qwen3
from mlxgpt.data.token_array import Batch
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.step import TrainStep

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # third-party warnings

SHAPE = ModelConfig(
    n_layer=3,
    n_head=2,
    n_embd=32,
    block_size=24,
    vocab_size=50,
    dropout=0.0,
    bias=False,
    position="rope",
    norm="rms",
    qk_norm=True,
    mlp="swiglu",
)


HEADS: list[dict[str, Any]] = [
    {},
    {"tied": False},
    {"embedding_norm": True},
    {"tied": False, "embedding_norm": True},
]


def make_model(shape: ModelConfig = SHAPE) -> GPT:
    """A model with large weights, so that every part affects the logits."""
    model = GPT(shape, 1)
    rng = np.random.default_rng(0)

    def random(p: mx.array) -> mx.array:
        return mx.array(rng.normal(float(p.ndim == 1), 0.2, p.shape).astype(np.float32))

    model.update(tree_map(random, model.parameters()))
    return model


def load_in_transformers(model: GPT, folder: Path) -> Any:
    """Save the model, and load it with transformers."""
    huggingface.write_config_json(folder, qwen3.make_qwen3_config(model.config, None))
    arrays = qwen3.convert_to_qwen3(model.config, flatten_params(model.parameters()))
    mx.save_safetensors(str(folder / huggingface.WEIGHTS_FILE), arrays, {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("heads", HEADS)
def test_logits_match_transformers(tmp_path: Path, heads: dict[str, Any]) -> None:
    model = make_model(dataclasses.replace(SHAPE, **heads))
    ids = np.random.default_rng(1).integers(0, 50, (2, SHAPE.block_size))
    result = load_in_transformers(model, tmp_path)(torch.tensor(ids)).logits
    np.testing.assert_allclose(model(mx.array(ids)), result.detach(), atol=1e-4)


def test_loss_and_gradients_match_transformers(tmp_path: Path) -> None:
    model = make_model()
    hf_model = load_in_transformers(model, tmp_path)
    ids = np.random.default_rng(1).integers(0, 50, (2, SHAPE.block_size + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    result = hf_model(torch.tensor(inputs)).logits
    config = override_config(Config(model=SHAPE), {"dtype": "float32"})
    loss, gradients = TrainStep(model, config).compute_gradients(
        Batch(mx.array(inputs)[None], mx.array(targets)[None]), mx.random.key(0)
    )
    expected = torch.nn.functional.cross_entropy(
        result.reshape(-1, 50), torch.tensor(targets).reshape(-1)
    )
    assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-5)
    expected.backward()
    names = qwen3.convert_to_qwen3(SHAPE, flatten_params(gradients))
    expected_gradients = {name: p.grad for name, p in hf_model.named_parameters()}
    compared = [
        name for name in expected_gradients if "norm" not in name or name == "model.norm.weight"
    ]
    assert len(compared) == 2 + 7 * SHAPE.n_layer
    for name in compared:
        np.testing.assert_allclose(names[name], expected_gradients[name], atol=1e-4, err_msg=name)
