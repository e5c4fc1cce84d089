"""One prompt, the same ids and the same text in all four places; and a training that goes the same
way in PyTorch. Needs the extra `oracle`.
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
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage.loading import load_model
from mlxgpt.training.step import TrainStep
from tests.oracle.test_oracle_gguf import Llama, lively, small_bpe

for name in ("torch", "transformers", "mlx_lm", "gguf", "xllamacpp"):
    pytest.importorskip(name, reason="the extra `oracle` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's
    import mlx_lm
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's

PROMPT = "once upon a time there"
COUNT = 40  # tokens
QWEN3S = {"position": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu"}


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("parts", [{}, QWEN3S], ids=["GPT-2's parts", "Qwen3's"])
def test_one_prompt_becomes_one_text_in_all_four_places(
    tmp_path: Path, add_bos_token: bool, parts: dict
) -> None:
    tokenizer = small_bpe()
    model = lively(tokenizer, bias=False, **parts)
    foreign = ImportedModel(
        model.config, flatten_params(model.parameters()), tokenizer, add_bos_token
    )
    run = importing.create_imported_run(foreign, tmp_path / "run")
    _, saved = load_model(run)
    for to in ("hf", "gguf"):
        exporting.export_run(run, saved.parameters, 0, tmp_path / to, to)
    ids = [*([run.bos] if run.bos is not None else []), *tokenizer.encode(PROMPT).tolist()]

    made = mlxgpt.generate(PROMPT, run=str(run.folder), temperature=0.0, max_tokens=COUNT)
    texts = {"mlxgpt": made.texts[0]}

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    given = theirs(PROMPT, return_tensors="pt")
    assert given["input_ids"][0].tolist() == ids
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        found = hf.generate(**given, do_sample=False, max_new_tokens=COUNT)[0]
    texts["transformers"] = theirs.decode(found, skip_special_tokens=True)

    mlx, mlx_tokenizer = mlx_lm.load(str(tmp_path / "hf"))
    assert mlx_tokenizer.encode(PROMPT) == ids
    # By its tokens: its text leaves out a space at the beginning of the continuation.
    drawn = [r.token for r in mlx_lm.stream_generate(mlx, mlx_tokenizer, PROMPT, max_tokens=COUNT)]
    texts["mlx-lm"] = PROMPT + tokenizer.decode(id for id in drawn if id != tokenizer.end_of_text)

    llama = Llama(tmp_path / "gguf" / "run.gguf")
    assert llama.ids(PROMPT, add_special=True) == ids
    texts["llama.cpp"] = PROMPT + llama.continuation(PROMPT, COUNT)[1]

    assert len(made.texts[0]) > len(PROMPT) + 10
    assert texts == dict.fromkeys(texts, made.texts[0])


def test_a_training_goes_the_same_way_in_pytorch(tmp_path: Path) -> None:
    """Twenty steps from the same weights, on the same batches."""
    shape = ModelConfig(2, 2, 32, 16, small_bpe().vocab_size, 0.0, True)
    settings = {"weight_decay": 0.1, "beta2": 0.95, "grad_clip": 1.0, "dtype": "float32"}
    config = override_config(Config(shape), settings)
    step = TrainStep(GPT(shape, 4), config)
    huggingface.write_gpt2_config(tmp_path, shape, None)
    huggingface.write_gpt2_parameters(tmp_path, shape, flatten_params(step.model.parameters()))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    draw = np.random.default_rng(0)
    first, losses = flatten_params(GPT(shape, 4).parameters()), []
    for n in range(20):
        batch = draw.integers(0, shape.vocab_size, (4, 17))
        x, y = mx.array(batch[None, :, :-1]), mx.array(batch[None, :, 1:])
        ours, _ = step(x, y, mx.array(1e-3), mx.random.key(n))
        logits = theirs(torch.tensor(batch[:, :-1])).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(batch[:, 1:]).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        losses.append((float(ours), float(loss)))
    assert all(ours == pytest.approx(loss, abs=1e-4) for ours, loss in losses)
    theirs.save_pretrained(tmp_path / "after")
    after = huggingface.read_gpt2_parameters(tmp_path / "after", shape)
    for name, value in flatten_params(step.model.parameters()).items():
        assert float(mx.abs(value - after[name]).max()) < 1e-3, name
        assert float(mx.abs(value - first[name]).max()) > 3e-3, "it has learned something"


def test_our_loss_is_theirs(tmp_path: Path) -> None:
    """The same nats per token of a text, in windows of the block."""
    tokenizer = small_bpe()
    model = lively(tokenizer, bias=True)
    foreign = ImportedModel(model.config, flatten_params(model.parameters()), tokenizer, False)
    run = importing.create_imported_run(foreign, tmp_path / "run")
    (tmp_path / "text.txt").write_text("once upon a time there was the end. " * 30)
    found = mlxgpt.evaluate(run=str(run.folder), source=[tmp_path / "text.txt"])
    exporting.export_run(run, load_model(run)[1].parameters, 0, tmp_path / "hf", "hf")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    text = (tmp_path / "text.txt").read_text()
    ids = torch.tensor([*tokenizer.encode(text).tolist(), tokenizer.end_of_text])
    block, total = model.config.block_size, 0.0
    for start in range(0, len(ids) - 1, block):
        window = ids[start : start + block + 1]
        with torch.no_grad():
            logits = hf(window[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert found.loss == pytest.approx(total / (len(ids) - 1), rel=1e-5)
