"""The baselines' tasks, and the PyTorch model compared with mlxgpt's. Needs the extra `oracle`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from baselines import runner
from baselines.records import TaskResult
from baselines.runner import BenchmarkModel, BenchmarkSettings
from baselines.tasks import Task

from mlxgpt.backend import execution
from mlxgpt.config import Config, ModelConfig, override_config
from mlxgpt.model.gpt import GPT

for name in ("torch", "transformers", "mlx_lm"):
    pytest.importorskip(name, reason="the extra `oracle` is not installed")

import torch  # noqa: E402
from baselines import pytorch  # noqa: E402

TINY = override_config(
    Config(ModelConfig(1, 2, 32, 16, 37, 0.0, False)), {"dtype": "float32", "batch_size": 2}
)
QUICK = BenchmarkSettings(
    rounds=1, training_seconds=0.01, max_batch_size=2, learning_steps=20, corpus_megabytes=0.05
)

# A stand-in for nanoGPT's model.py with its names, arguments and results; untied output head.
NANOGPT = """
from dataclasses import dataclass
import torch, torch.nn as nn
from torch.nn import functional as F
@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx))
        if targets is None:
            return logits[:, [-1], :], None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        assert device_type == "cpu"
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits, _ = self(idx)
            probs = F.softmax(logits[:, -1, :], dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, num_samples=1)), dim=1)
        return idx
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[TaskResult]:
    checkout = tmp_path_factory.mktemp("nanoGPT")
    (checkout / "model.py").write_text(NANOGPT)
    frameworks, missing = runner.installed_frameworks(checkout)
    assert not missing
    execution.compile_failure()  # installs mlxgpt's g++ wrapper, which PyTorch must not use
    models = [BenchmarkModel("tiny", TINY, batch_sizes=(1, 3))]
    return list(runner.run_tasks(models, frameworks, nanogpt=checkout, settings=QUICK))


def test_each_framework_runs_its_tasks(results: list[TaskResult]) -> None:
    assert [r.failed for r in results] == [{}] * len(results)
    assert {(r.task, framework) for r in results for framework in r.rounds} == {
        *(
            ("training", library)
            for library in ("mlxgpt", "PyTorch", "PyTorch, compiled", "mlx-lm")
        ),
        *(("generate", library) for library in ("mlxgpt", "transformers", "mlx-lm", "nanoGPT")),
        *(("learning", library) for library in ("mlxgpt", "PyTorch", "PyTorch, compiled")),
        *(("preparation", library) for library in ("mlxgpt", "datasets.map")),
        ("training", "nanoGPT"),
    }
    for r in results:
        for framework, (values,) in r.rounds.items():
            rates = [value for name, value in values.items() if name.endswith("_per_second")]
            assert all(rate > 0 for rate in rates), (r.task, framework)
            assert r.task == "learning" or len(rates) == 1
            assert values["peak_memory"] > 10e6
            assert set(r.made_with[framework]) == {
                "versions",
                "device",
                "threads",
                "BLAS",
                "compiler",
            }


def test_all_frameworks_reach_the_same_losses(results: list[TaskResult]) -> None:
    """Same weights, batches and formulas give the same losses."""
    (learning,) = [r for r in results if r.task == "learning"]
    losses = [[loss for _, loss in rounds[0]["curve"]] for rounds in learning.rounds.values()]
    assert losses[0][0] - losses[0][-1] > 0.1, "something is learned"
    for curve in losses[1:]:
        np.testing.assert_allclose(curve, losses[0], rtol=2e-3)


@contextmanager
def make_task(config: Config) -> Iterator[Task]:
    with runner._exported_weights(config) as folder:
        task: dict[str, Any] = runner._base_task(config, folder)
        yield Task(**task, framework="PyTorch", batch_size=2)


@pytest.mark.parametrize("bias", [False, True])
def test_pytorch_model_equals_mlxgpt_model(bias: bool) -> None:
    config = override_config(TINY, {"n_layer": 2, "bias": bias})
    ids = np.random.default_rng(1).integers(37, size=(3, 16))
    with make_task(config) as task, torch.no_grad():
        expected = pytorch.make_model(task)(torch.tensor(ids)).numpy()
    np.testing.assert_allclose(np.array(GPT(config.model)(mx.array(ids))), expected, atol=1e-5)
