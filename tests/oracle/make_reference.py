"""Write tests/oracle/reference.npz from independent implementations, transformers' GPT-2 and
PyTorch's AdamW. `make test` compares with the file, so it needs neither; .ci/run also recomputes
the arrays and compares them with the file.

    python tests/oracle/make_reference.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 12, "n_positions": 8, "vocab_size": 19}
ADAMW_STEPS = 5
ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gpt2_arrays() -> dict[str, np.ndarray]:
    """Weights, a batch, and its logits, loss and gradients, with our names and in our layout
    (GPT-2's Conv1D stores the transpose of a linear layer's weight).
    """
    torch.manual_seed(0)
    config = GPT2Config(
        **SHAPE,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,  # large, so that every part affects the logits
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("ln_" in name), std=0.2)
    ids = torch.randint(0, SHAPE["vocab_size"], (3, SHAPE["n_positions"] + 1))
    logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    arrays = {
        "ids": ids.numpy().astype(np.int32),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
    }
    for name, parameter in model.transformer.named_parameters():
        transposed = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert parameter.grad is not None
        for kind, value in (("weight", parameter), ("gradient", parameter.grad)):
            array = value.detach().numpy()
            arrays[f"{kind}:{name}"] = array.T if transposed else array
    return arrays


def adamw_arrays() -> dict[str, np.ndarray]:
    """AdamW steps of a matrix with weight decay and a vector without, for random gradients."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
    vector = torch.nn.Parameter(torch.randn(3, generator=generator))
    arrays = {
        "adamw:matrix:start": matrix.detach().numpy().copy(),
        "adamw:vector:start": vector.detach().numpy().copy(),
    }
    groups = [{"params": [matrix]}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    for step in range(ADAMW_STEPS):
        for name, parameter in (("matrix", matrix), ("vector", vector)):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            arrays[f"adamw:{name}:gradient:{step}"] = parameter.grad.numpy().copy()
        optimizer.step()
        for name, parameter in (("matrix", matrix), ("vector", vector)):
            arrays[f"adamw:{name}:after:{step}"] = parameter.detach().numpy().copy()
    return arrays


def clipping_arrays() -> dict[str, np.ndarray]:
    """Two gradients clipped by their global norm."""
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (5,))]
    arrays = {}
    for n, tensor in enumerate(tensors):
        tensor.grad = torch.randn(tensor.shape, generator=generator)
        arrays[f"clip:{n}:before"] = tensor.grad.numpy().copy()
    arrays["clip:norm"] = torch.nn.utils.clip_grad_norm_(tensors, 1.0).numpy()
    for n, tensor in enumerate(tensors):
        assert tensor.grad is not None
        arrays[f"clip:{n}:after"] = tensor.grad.numpy().copy()
    return arrays


def main() -> None:
    default = Path(__file__).with_name("reference.npz")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    arrays: dict[str, Any] = {**gpt2_arrays(), **adamw_arrays(), **clipping_arrays()}
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main()
