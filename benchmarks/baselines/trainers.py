"""Trainers with one interface: a step on given windows, and the loss of every token. The model and
the optimizer of a trainer are its project's own code, imported from a checkout.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxgpt.config import Config
from mlxgpt.data.token_array import Batch
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.stats import count_parameters, flops_per_token
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.training.step import TrainStep
from mlxgpt.utils.errors import UserError


class Trainer(Protocol):
    """A model with its optimizer and its schedule over the config's `max_steps`.

    Attributes:
        parameters: number of parameters.
        flops: training FLOPs per token: 6 per parameter of a matrix product, plus attention.
    """

    parameters: int
    flops: int

    def step(self, step: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Take a step, from 0, on ids[B, T], and wait for it."""

    def losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Loss of each token in nats, [B, T]."""


class MlxgptTrainer:
    """mlxgpt's own step, without what a run adds: records, checkpoints, checks."""

    def __init__(self, config: Config) -> None:
        self.parameters = count_parameters(config.model)
        self.flops = flops_per_token(config.model)
        self._model = GPT(config.model, seed=config.train.seed)
        self._step = TrainStep(self._model, config)
        self._schedule = learning_rate_schedule(config)

    def step(self, step: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        batch = Batch(mx.array(inputs[None]), mx.array(targets[None]))
        mx.eval(self._step(batch, self._schedule(step), mx.random.key(0)), self._step.state)

    def losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.array(token_losses(self._model(mx.array(inputs)), mx.array(targets)))


class Nanochat:
    """karpathy/nanochat: its model and MuonAdamW in PyTorch, with base_train.py's schedules.

    Args:
        rates: factor for all of its learning rates, after its own rule for the batch size; the
            weight decay is divided by it, since it acts through the learning rate.
    """

    # Of scripts/base_train.py.
    EMBEDDING_RATE, HEAD_RATE, MATRIX_RATE, SCALAR_RATE = 0.3, 0.008, 0.02, 0.5
    WEIGHT_DECAY, WARMUP, WARMDOWN, FINAL = 0.28, 40, 0.65, 0.05
    REFERENCE_BATCH, REFERENCE_DEPTH = 2**19, 12

    def __init__(self, code: Path, config: Config, rates: float) -> None:
        sys.path.insert(0, str(code))
        import torch
        from nanochat.gpt import GPT as NanochatGPT
        from nanochat.gpt import GPTConfig

        self._torch = torch
        m = config.model

        def build(depth: int, width: int, heads: int, vocab_size: int) -> Any:
            settings = GPTConfig(
                m.block_size, vocab_size, n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=width
            )
            return NanochatGPT(settings)

        def scaling_parameters(model: Any) -> int:
            counts = model.num_scaling_params()
            return counts["transformer_matrices"] + counts["lm_head"]

        torch.manual_seed(config.train.seed)
        self._model = build(m.n_layer, m.n_embd, m.n_head, m.vocab_size)
        self._model.init_weights()
        with torch.device("meta"):
            depth = self.REFERENCE_DEPTH
            reference = build(depth, 64 * depth, depth // 2, m.vocab_size)
        batch_scale = math.sqrt(config.tokens_per_step / self.REFERENCE_BATCH)
        scale = rates * batch_scale
        self._weight_decay = (
            self.WEIGHT_DECAY
            * batch_scale
            / rates
            * scaling_parameters(reference)
            / scaling_parameters(self._model)
        )
        self._optimizer = self._model.setup_optimizer(
            unembedding_lr=self.HEAD_RATE * scale,
            embedding_lr=self.EMBEDDING_RATE * scale,
            matrix_lr=self.MATRIX_RATE * scale,
            scalar_lr=self.SCALAR_RATE * scale,
            weight_decay=self._weight_decay,
        )
        self._steps = config.train.max_steps
        self.parameters = self._model.num_scaling_params()["total"]
        self.flops = self._model.estimate_flops()

    def step(self, step: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        warmdown = round(self.WARMDOWN * self._steps)
        start = self._steps - warmdown
        cooled = (step - start) / warmdown
        if step < self.WARMUP:
            rate = (step + 1) / self.WARMUP
        else:
            rate = 1.0 if cooled <= 0 else 1 - cooled * (1 - self.FINAL)
        if step < 400:
            momentum = 0.85 + 0.12 * step / 400
        else:
            momentum = 0.97 if cooled < 0 else 0.97 - 0.07 * cooled
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"] = momentum
                decay = 0.5 * (1 + math.cos(math.pi * step / self._steps))
                group["weight_decay"] = self._weight_decay * decay
        ids = self._torch.from_numpy
        loss = self._model(ids(inputs).long(), ids(targets).long())
        loss.backward()
        self._optimizer.step()
        self._model.zero_grad(set_to_none=True)

    def losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        ids = self._torch.from_numpy
        with self._torch.inference_mode():
            losses = self._model(ids(inputs).long(), ids(targets).long(), loss_reduction="none")
        return losses.reshape(inputs.shape).numpy()


class AutoresearchMlx:
    """trevin-creator/autoresearch-mlx: model, AdamW and schedule of its train.py, in float32 (its
    weights are created in bfloat16, which a CPU only emulates).
    """

    def __init__(self, code: Path, config: Config, rates: float) -> None:
        names = ("MAX_SEQ_LEN", "TIME_BUDGET", "Tokenizer", "evaluate_bpb", "make_dataloader")
        project = _load_source(
            code / "train.py", before="\nt_start = time.time()", modules={"prepare": names}
        )
        m = config.model
        mx.random.seed(config.train.seed)
        self._project = project
        self._model = project["GPT"](
            project["GPTConfig"](
                m.block_size, m.vocab_size, m.n_layer, m.n_head, m.n_head, m.n_embd
            )
        )
        self._model.init_weights()
        self._model.set_dtype(mx.float32)
        self._optimizer = project["AdamW"](
            self._model,
            unembedding_lr=project["UNEMBEDDING_LR"] * rates,
            embedding_lr=project["EMBEDDING_LR"] * rates,
            matrix_lr=project["MATRIX_LR"] * rates,
            weight_decay=project["WEIGHT_DECAY"],
            adam_betas=project["ADAM_BETAS"],
            scalar_lr=project["SCALAR_LR"] * rates,
        )
        self._value_and_grad = mx.compile(
            nn.value_and_grad(self._model, lambda x, y: self._model(x, targets=y)),
            inputs=self._model.state,
            outputs=self._model.state,
        )
        self._steps = config.train.max_steps
        parameters = flatten_params(self._model.parameters())
        self.parameters = sum(p.size for p in parameters.values())
        matrices = sum(
            p.size
            for name, p in parameters.items()
            if p.ndim == 2 and not name.startswith(("wte", "value_embeds"))
        )
        self.flops = 6 * matrices + 12 * m.n_layer * m.n_embd * m.block_size

    def step(self, step: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        _, gradients = self._value_and_grad(mx.array(inputs), mx.array(targets))
        self._optimizer.set_lr_multiplier(self._project["get_lr_multiplier"](step / self._steps))
        self._optimizer.update(self._model, gradients)
        mx.eval(self._model.parameters(), *self._optimizer.state)

    def losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.array(self._model(mx.array(inputs), mx.array(targets), reduction="none"))


class ParameterGolf:
    """openai/parameter-golf: train_gpt_mlx.py's model, optimizers and warmdown, in float32. Its
    head is the token embedding; as many key and value heads as queries.
    """

    WARMDOWN = 0.6  # share of the steps, chosen here; its own is 1,200 of 20,000 steps

    def __init__(self, code: Path, config: Config, rates: float) -> None:
        project = _load_source(
            code / "train_gpt_mlx.py",
            before="\ndef main() -> None:",
            modules={"sentencepiece": ("SentencePieceProcessor",)},
        )
        project["COMPUTE_DTYPE"] = mx.float32
        m, settings = config.model, project["Hyperparameters"]()
        for name in ("tied_embed_lr", "matrix_lr", "scalar_lr"):
            setattr(settings, name, getattr(settings, name) * rates)
        mx.random.seed(config.train.seed)
        self._project, self._settings = project, settings
        self._model = project["GPT"](
            vocab_size=m.vocab_size,
            num_layers=m.n_layer,
            dim=m.n_embd,
            num_heads=m.n_head,
            num_kv_heads=m.n_head,
            mlp_mult=4,
            logit_chunk_tokens=0,
            logit_softcap=settings.logit_softcap,
            rope_base=settings.rope_base,
            tied_embed_init_std=settings.tied_embed_init_std,
            qk_gain_init=settings.qk_gain_init,
        )
        self._optimizer = project["SplitOptimizers"](self._model, settings)
        self._value_and_grad = mx.compile(
            nn.value_and_grad(self._model, self._model.loss),
            inputs=self._model.state,
            outputs=self._model.state,
        )
        self._steps = config.train.max_steps
        parameters = flatten_params(self._model.parameters())
        self.parameters = sum(p.size for p in parameters.values())
        matrices = sum(p.size for name, p in parameters.items() if name.endswith("weight"))
        self.flops = 6 * matrices + 12 * m.n_layer * m.n_embd * m.block_size

    def step(self, step: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        _, gradients = self._value_and_grad(mx.array(inputs), mx.array(targets))
        rate = min(1.0, (self._steps - step) / (self.WARMDOWN * self._steps))
        self._optimizer.step(self._model, gradients, step=step, lr_mul=rate)
        mx.eval(self._model.state)

    def losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        x = self._model(mx.array(inputs))
        logits = self._model.softcap(x @ self._model.tok_emb.weight.T)
        return np.array(token_losses(logits, mx.array(targets)))


PROJECTS: dict[str, Callable[[Path, Config, float], Trainer]] = {
    "nanochat": Nanochat,
    "autoresearch-mlx": AutoresearchMlx,
    "parameter-golf": ParameterGolf,
}


def _load_source(path: Path, *, before: str, modules: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Execute a script up to a line, where it would begin to train, and return its names.

    Args:
        modules: names that it imports from modules which only its data needs: replaced by None.
    """
    source, marker, _ = path.read_text(encoding="utf-8").partition(before)
    if not marker:
        raise UserError(
            f"{path} has no line {before.strip()!r}", "use the version that was current in 2026-11."
        )
    for name, attributes in modules.items():
        stand_in = types.ModuleType(name)
        vars(stand_in).update(dict.fromkeys(attributes))
        sys.modules[name] = stand_in
    script = types.ModuleType("other_project")
    sys.modules[script.__name__] = script  # dataclasses look their module up
    exec(compile(source, str(path), "exec"), vars(script))
    return vars(script)
