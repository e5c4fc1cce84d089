"""Model folders in external formats, written without the libraries that define them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.config import ModelConfig
from mlxgpt.convert import huggingface, tokenizers
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params

MODEL_CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=280, dropout=0.1
)


def train_small_bpe() -> BPETokenizer:
    words = ["once", "upon", "a", "time", "there", "was", "cat", "Grüße", "the", "sea"]
    return bpe.train_bpe([" ".join(random.Random(0).choices(words, k=400))], 280)


def random_parameters(config: ModelConfig) -> dict[str, mx.array]:
    """Return random parameters, including biases and norms."""
    initial = flatten_params(GPT(config, 1).parameters())
    return {
        name: value + 0.1 * mx.random.normal(value.shape, key=mx.random.key(n))
        for n, (name, value) in enumerate(initial.items())
    }


def write_gpt2_folder(folder: Path, tokenizer: Tokenizer | None = None) -> dict[str, mx.array]:
    """Write a folder laid out as gpt2 on the hub; return its parameters under mlxgpt's names."""
    tokenizer = tokenizer or train_small_bpe()
    config = replace(MODEL_CONFIG, vocab_size=tokenizer.vocab_size)
    parameters = random_parameters(config)
    folder.mkdir(parents=True, exist_ok=True)
    huggingface.write_gpt2_config(folder, config, tokenizer.end_of_text)
    huggingface.write_gpt2_parameters(folder, config, parameters)
    tokenizers.write_hf_tokenizer(folder, tokenizer, config.block_size, add_bos_token=False)
    return parameters
