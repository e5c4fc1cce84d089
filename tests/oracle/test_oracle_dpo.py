"""DPO by us and by TRL: masks, loss, rewards, gradients, 20 steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import override_config
from mlxgpt.data.example_array import PairArray, pack_examples
from mlxgpt.data.token_array import Batch
from mlxgpt.evaluation.preferences import compute_logprobs
from mlxgpt.model.lora import add_lora
from mlxgpt.storage import run as runs
from mlxgpt.training.step import TrainStep
from tests.helpers.exported_examples import (
    LEARNING_RATE,
    SETTINGS,
    ExportedExamples,
    torch_gradients,
)

torch = pytest.importorskip("torch", reason="torch is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

# TRL's own use of a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TEXTS = [
    ("There were", " two foxes.", " dogs"),
    (
        "There were three foxes, and then",
        " the dog ran.",
        " the dog saw a fox, or a dog, or a cat.",
    ),
    ("Who", " is there?", "?"),
    ("The quick brown fox jumps over the", " lazy dog", " moon and over the sun."),
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "strings": [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in TEXTS],
    "messages": [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in TEXTS
    ],
}
BETA = 0.3
RUN_SETTINGS = {**SETTINGS, "beta": BETA, "batch_size": 4, "gradient_accumulation_steps": 1}


class Sides:
    """Both sides of the comparison, with the same weights, pairs and settings. The weights are not
    those of the reference, for which the rewards would be 0.
    """

    def __init__(self, bpe_run: runs.Run, kind: str, folder: Path) -> None:
        exported = ExportedExamples(bpe_run, ROWS[kind], RUN_SETTINGS, folder)
        self.config, self.model = exported.config, exported.model
        self.torch_model = exported.torch_model
        pairs = PairArray(pack_examples(exported.examples), self.config.model.vocab_size)
        self.reference = compute_logprobs(self.model, pairs, self.config)
        self.pairs = PairArray(pairs.array, pairs.vocab_size, self.reference)
        reference_model = copy.deepcopy(self.torch_model)
        self.trainer = trl.DPOTrainer(
            self.torch_model,
            reference_model,
            args=trl.DPOConfig(
                output_dir=str(folder / "trl"),
                beta=BETA,
                max_length=128,
                per_device_train_batch_size=4,
                max_steps=20,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                disable_dropout=True,
            ),
            train_dataset=datasets.Dataset.from_list(ROWS[kind]),
            processing_class=exported.tokenizer,
        )

    def move_away(self) -> None:
        """Change the same weights on both sides."""
        self.model.wte.weight = self.model.wte.weight * 1.05
        with torch.no_grad():
            self.torch_model.transformer.wte.weight.mul_(1.05)

    def our_batch(self) -> Batch:
        sizes = {"batch_size": 4, "block_size": 128}
        return Batch(*map(mx.array, self.pairs.get_batch(0, seed=0, **sizes)))

    def their_batch(self) -> Any:
        return next(iter(self.trainer.get_train_dataloader()))


@pytest.fixture(params=ROWS)
def sides(request: pytest.FixtureRequest, bpe_run: runs.Run, tmp_path: Path) -> Sides:
    return Sides(bpe_run, request.param, tmp_path)


def test_answers_have_the_same_ids_and_masks(sides: Sides) -> None:
    """By hand as well: what is trained is the answer and its end, whatever the prompt's length."""
    batch = sides.their_batch()
    theirs = set()
    for ids, mask, attention in zip(
        batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True
    ):
        size = int(attention.sum())
        theirs.add((tuple(ids[:size].tolist()), tuple(mask[1:size].bool().tolist())))
    windows = [sides.pairs.example(n) for n in range(len(sides.pairs))]
    assert {(tuple(ids.tolist()), tuple(trained.tolist())) for ids, trained in windows} == theirs
    assert len(theirs) == 2 * len(TEXTS)
    tokenizer = sides.trainer.processing_class
    for (_, *answers), n in zip(TEXTS, range(0, len(windows), 2), strict=True):
        for answer, (ids, trained) in zip(answers, windows[n : n + 2], strict=True):
            assert tokenizer.decode(ids[1:][trained], skip_special_tokens=True).rstrip() in answer


def test_loss_rewards_and_gradients_match(sides: Sides) -> None:
    sides.move_away()
    batch = sides.our_batch()
    loss, gradients = TrainStep(sides.model, sides.config).compute_gradients(
        batch, mx.random.key(0)
    )
    torch_loss = sides.trainer.compute_loss(sides.torch_model, sides.their_batch())
    torch_loss.backward()
    assert float(loss) == pytest.approx(torch_loss.item(), abs=1e-5)
    assert abs(float(loss) - np.log(2)) > 0.01
    theirs = torch_gradients(sides.torch_model)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(np.array(gradient), theirs[name], atol=1e-4, err_msg=name)
    rewards = BETA * (compute_logprobs(sides.model, sides.pairs, sides.config) - sides.reference)
    measured = sides.trainer._metrics["eval"]
    for column, name in enumerate(("chosen", "rejected")):
        (reward,) = measured[f"rewards/{name}"]
        assert rewards[:, column].mean() == pytest.approx(reward, abs=1e-4)
    (accuracy,) = measured["rewards/accuracies"]
    assert (rewards[:, 0] > rewards[:, 1]).mean() == pytest.approx(accuracy)
    (margin,) = measured["rewards/margins"]
    assert (rewards[:, 0] - rewards[:, 1]).mean() == pytest.approx(margin, abs=1e-4)


def test_twenty_steps_match(sides: Sides) -> None:
    step, losses = TrainStep(sides.model, sides.config), []
    for n in range(20):
        loss, _ = step(sides.our_batch(), mx.array(LEARNING_RATE), mx.random.key(n))
        mx.eval(loss, step.state)
        losses.append(float(loss))
    sides.trainer.train()
    records: list[dict[str, Any]] = sides.trainer.state.log_history
    theirs = [record["loss"] for record in records if "loss" in record]
    np.testing.assert_allclose(losses, theirs, atol=2e-3)
    assert losses[-1] < 0.3


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_shifted_by_a_token_is_noticed(sides: Sides, shift: int) -> None:
    """The comparisons would fail with the most common bug of such masks."""
    sides.move_away()
    batch = sides.our_batch()
    shifted = batch._replace(weights=mx.roll(batch.weights, shift, -1))
    step = TrainStep(sides.model, sides.config)
    losses = [float(step.compute_gradients(b, mx.random.key(0))[0]) for b in (batch, shifted)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_loss_of_adapters_is_that_of_all_weights(sides: Sides) -> None:
    """With a frozen head, logits are computed in chunks."""
    sides.move_away()
    loss, _ = TrainStep(sides.model, sides.config).compute_gradients(
        sides.our_batch(), mx.random.key(0)
    )
    config = override_config(sides.config, {"lora_rank": 2})
    add_lora(sides.model, config.lora)
    adapted, gradients = TrainStep(sides.model, config).compute_gradients(
        sides.our_batch(), mx.random.key(0)
    )
    assert float(adapted) == pytest.approx(float(loss), abs=1e-5)
    assert max(float(mx.abs(gradient).max()) for gradient in gradients.values()) > 1e-3
