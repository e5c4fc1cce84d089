"""HellaSwag losses match transformers' GPT-2 with the same weights, computed as in build-nanogpt.
Needs the extra `oracle`.
"""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import ModelConfig
from mlxgpt.data.tokenizers import bpe
from mlxgpt.evaluation.hellaswag import HellaSwagExample, ending_losses, evaluate_hellaswag
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import load_parameters
from tests.helpers.hellaswag_examples import CASES, EXAMPLES_JSONL

pytest.importorskip("torch", reason="the extra `oracle` is not installed")
pytest.importorskip("transformers", reason="the extra `oracle` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party warnings
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # in Conv1D


def test_the_losses_of_the_four_endings_match_transformers() -> None:
    tokenizer = bpe.train_bpe([EXAMPLES_JSONL], 300)
    torch.manual_seed(1)
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_positions=128,
        vocab_size=300,
        activation_function="gelu_new",
        initializer_range=0.3,  # large, for predictions far from uniform
    )
    hf_model = GPT2LMHeadModel(config).eval()
    model = GPT(ModelConfig(2, 2, 16, 128, 300, dropout=0.0, bias=True))
    arrays = {name: p.detach().numpy() for name, p in hf_model.transformer.named_parameters()}
    load_parameters(
        model,
        {
            name: mx.array(np.ascontiguousarray(value.T if name.endswith(TRANSPOSED) else value))
            for name, value in arrays.items()
        },
    )
    examples = [
        HellaSwagExample(context, tuple(endings), label) for context, label, *endings in CASES
    ]
    correct = correct_norm = 0
    for scored in sorted(
        ending_losses(model, tokenizer, examples), key=lambda scored: scored.example_index
    ):
        example = examples[scored.example_index]
        context = tokenizer.encode(example.context).tolist()
        endings = [tokenizer.encode(f" {ending}").tolist() for ending in example.endings]
        ids = torch.zeros((4, len(context) + max(map(len, endings))), dtype=torch.long)
        labels = torch.full_like(ids, -100)  # ignored by PyTorch's cross entropy
        for n, ending in enumerate(endings):
            end = len(context) + len(ending)
            ids[n, :end] = torch.tensor(context + ending)
            labels[n, len(context) : end] = torch.tensor(ending)
        with torch.no_grad():
            logits = hf_model(ids).logits
        nats = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
        )
        sums, counts = nats.sum(1), (labels != -100).sum(1)
        assert scored.token_counts.tolist() == counts.tolist()
        np.testing.assert_allclose(scored.losses, sums.numpy(), atol=1e-4)
        correct += sums.argmin().item() == example.label
        correct_norm += (sums / counts).argmin().item() == example.label
    result = evaluate_hellaswag(model, tokenizer, examples)
    assert (result.accuracy, result.accuracy_norm) == (correct / 12, correct_norm / 12)
