"""The same ids and text for a prompt in mlxgpt, transformers, mlx-lm and llama.cpp, and the same
training losses in PyTorch. Needs the extra `oracle`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxgpt
from mlxgpt.config import Config, ModelConfig, override_config
from mlxgpt.convert import exporting, huggingface, importing
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.data.token_array import Batch
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage.loading import load_model
from mlxgpt.training.step import TrainStep
from tests.oracle.test_oracle_gguf import LlamaServer, make_model, small_bpe

for name in ("torch", "transformers", "mlx_lm", "gguf", "xllamacpp"):
    pytest.importorskip(name, reason="the extra `oracle` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party warnings
    import mlx_lm
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # third-party warnings

PROMPT = "once upon a time there"
COUNT = 40  # tokens
QWEN3_PARTS = {"position": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu"}


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("parts", [{}, QWEN3_PARTS], ids=["GPT-2's parts", "Qwen3's"])
def test_greedy_text_is_the_same_in_all_four_libraries(
    tmp_path: Path, add_bos_token: bool, parts: dict
) -> None:
    tokenizer = small_bpe()
    model = make_model(tokenizer, bias=False, **parts)
    imported_model = ImportedModel(
        model.config, flatten_params(model.parameters()), tokenizer, add_bos_token
    )
    run = importing.create_imported_run(imported_model, tmp_path / "run")
    _, checkpoint = load_model(run)
    for to in ("hf", "gguf"):
        exporting.export_run(run, checkpoint.parameters, 0, tmp_path / to, to)
    ids = [*([run.bos] if run.bos is not None else []), *tokenizer.encode(PROMPT).tolist()]

    result = mlxgpt.generate(PROMPT, run=str(run.folder), temperature=0.0, max_tokens=COUNT)
    texts = {"mlxgpt": result.texts[0]}

    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    inputs = hf_tokenizer(PROMPT, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ids
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        output_ids = hf_model.generate(**inputs, do_sample=False, max_new_tokens=COUNT)[0]
    texts["transformers"] = hf_tokenizer.decode(output_ids, skip_special_tokens=True)

    mlx_model, mlx_tokenizer = mlx_lm.load(str(tmp_path / "hf"))
    assert mlx_tokenizer.encode(PROMPT) == ids
    # Compare tokens, since mlx-lm's text drops a space at the start of the continuation.
    token_ids = [
        r.token for r in mlx_lm.stream_generate(mlx_model, mlx_tokenizer, PROMPT, max_tokens=COUNT)
    ]
    texts["mlx-lm"] = PROMPT + tokenizer.decode(
        id for id in token_ids if id != tokenizer.end_of_text
    )

    llama = LlamaServer(tmp_path / "gguf" / "run.gguf")
    assert llama.ids(PROMPT, add_special=True) == ids
    texts["llama.cpp"] = PROMPT + llama.complete(PROMPT, COUNT)[1]

    assert len(result.texts[0]) > len(PROMPT) + 10
    assert texts == dict.fromkeys(texts, result.texts[0])


def test_training_matches_pytorch(tmp_path: Path) -> None:
    """20 steps from the same weights on the same batches."""
    shape = ModelConfig(2, 2, 32, 16, small_bpe().vocab_size, 0.0, True)
    settings = {"weight_decay": 0.1, "beta2": 0.95, "grad_clip": 1.0, "dtype": "float32"}
    config = override_config(Config(shape), settings)
    step = TrainStep(GPT(shape, 4), config)
    huggingface.write_gpt2_config(tmp_path, shape, None)
    huggingface.write_gpt2_parameters(tmp_path, shape, flatten_params(step.model.parameters()))
    torch_model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    groups = [
        {"params": [p for p in torch_model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in torch_model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    rng = np.random.default_rng(0)
    initial, losses = flatten_params(GPT(shape, 4).parameters()), []
    for n in range(20):
        batch = rng.integers(0, shape.vocab_size, (4, 17))
        x, y = mx.array(batch[None, :, :-1]), mx.array(batch[None, :, 1:])
        our_loss, _ = step(Batch(x, y), mx.array(1e-3), mx.random.key(n))
        logits = torch_model(torch.tensor(batch[:, :-1])).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(batch[:, 1:]).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 1.0)
        optimizer.step()
        losses.append((float(our_loss), float(loss)))
    assert all(our_loss == pytest.approx(loss, abs=1e-4) for our_loss, loss in losses)
    torch_model.save_pretrained(tmp_path / "after")
    torch_parameters = huggingface.read_gpt2_parameters(tmp_path / "after", shape)
    for name, value in flatten_params(step.model.parameters()).items():
        assert float(mx.abs(value - torch_parameters[name]).max()) < 1e-3, name
        assert float(mx.abs(value - initial[name]).max()) > 3e-3, "it has learned something"


def test_evaluation_loss_matches_transformers(tmp_path: Path) -> None:
    """In nats per token, over windows of the block size."""
    tokenizer = small_bpe()
    model = make_model(tokenizer, bias=True)
    imported_model = ImportedModel(
        model.config, flatten_params(model.parameters()), tokenizer, False
    )
    run = importing.create_imported_run(imported_model, tmp_path / "run")
    (tmp_path / "text.txt").write_text("once upon a time there was the end. " * 30)
    result = mlxgpt.evaluate(run=str(run.folder), source=[tmp_path / "text.txt"])
    exporting.export_run(run, load_model(run)[1].parameters, 0, tmp_path / "hf", "hf")
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    text = (tmp_path / "text.txt").read_text()
    ids = torch.tensor([*tokenizer.encode(text).tolist(), tokenizer.end_of_text])
    block, total = model.config.block_size, 0.0
    for start in range(0, len(ids) - 1, block):
        window = ids[start : start + block + 1]
        with torch.no_grad():
            logits = hf_model(window[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert result.loss == pytest.approx(total / (len(ids) - 1), rel=1e-5)
