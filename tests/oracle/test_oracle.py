"""The committed reference arrays, sampling and character tokenizers match PyTorch, transformers and
tokenizers. Needs the extra `oracle`; .ci/run installs it.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import SamplingParams
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.inference.sampling import SamplerSpec, make_logits_processor, pack_sampling_params
from tests.oracle import reference

pytest.importorskip("torch", reason="the extra `oracle` is not installed")


def test_the_committed_arrays_can_be_reproduced(tmp_path: Path) -> None:
    script = Path(__file__).with_name("make_reference.py")
    subprocess.run([sys.executable, script, tmp_path / "new.npz"], check=True)
    new, old = reference.load_arrays(tmp_path / "new.npz"), reference.load_arrays()
    assert new.keys() == old.keys()
    for name, value in new.items():
        np.testing.assert_allclose(value, old[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"repetition_penalty": 1.7},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.8},
    ],
)
def test_processed_logits_match_transformers(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party warnings
        import torch
        from transformers.generation import logits_process as hf

    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(4, 20))).astype(np.float32)
    text = rng.integers(0, 20, (4, 6))
    seen_mask = np.zeros((4, 20), dtype=bool)
    np.put_along_axis(seen_mask, text, True, axis=1)
    sampling = SamplingParams(**{"temperature": 1.0, **settings})
    process = make_logits_processor(SamplerSpec.from_sampling(sampling, 20))
    actual = np.array(
        process(mx.array(logits), mx.array(seen_mask), pack_sampling_params(sampling))
    )

    expected = torch.tensor(logits)
    steps = [
        hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)),
        hf.TemperatureLogitsWarper(float(sampling.temperature)),
        hf.TopKLogitsWarper(sampling.top_k or 20),
        hf.TopPLogitsWarper(sampling.top_p),
        hf.MinPLogitsWarper(sampling.min_p),
    ]
    for step in steps:
        expected = step(torch.tensor(text), expected)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("end_of_text", [True, False])
def test_hugging_face_tokenizers_reads_our_tokenizer(end_of_text: bool) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = CharTokenizer('aÄé\n "\\🙂z', end_of_text=end_of_text)
    hf_tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert hf_tokenizer.get_vocab_size() == tokenizer.vocab_size
    text = 'z 🙂"aé\\\nÄ'
    assert hf_tokenizer.encode(text).ids == tokenizer.encode(text).tolist()
    assert hf_tokenizer.decode(tokenizer.encode(text).tolist()) == text
    if end_of_text:
        assert hf_tokenizer.token_to_id("<|endoftext|>") == tokenizer.end_of_text
