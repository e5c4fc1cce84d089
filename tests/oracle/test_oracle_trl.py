"""Fine-tuning on prompts and answers, by us and by TRL: masks, loss, gradients, 20 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.data.chat_template import CHATML
from mlxgpt.data.example_array import ExampleArray, pack_examples
from mlxgpt.data.token_array import Batch
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

USER = [{"role": "user", "content": text} for text in ("Who is there?", "Really?", "And then?")]
ANSWER = [
    {"role": "assistant", "content": text} for text in ("A fox.", "Yes, a fox!", "It ran\n\n away.")
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "strings": [{"prompt": f"There were {n}", "completion": " foxes." * n} for n in range(1, 5)],
    "prompt and completion": [
        {"prompt": [USER[0], ANSWER[0], USER[n]], "completion": [ANSWER[n]]} for n in (1, 2)
    ]
    + [{"prompt": [USER[n]], "completion": [ANSWER[n]]} for n in (0, 2)],
    "messages": [{"messages": [USER[0], ANSWER[0], USER[n], ANSWER[n]]} for n in (1, 2)]
    + [{"messages": [USER[n], ANSWER[n]]} for n in (0, 1)],
}
# TRL finds the answers of `messages` with these tags.
CHATML_WITH_TAGS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RUN_SETTINGS = {**SETTINGS, "batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(params=ROWS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Sides:
    """Both sides of the comparison, with the same weights, examples and settings."""

    def __init__(self, bpe_run: runs.Run, kind: str, folder: Path) -> None:
        rows = ROWS[kind]
        exported = ExportedExamples(bpe_run, rows, RUN_SETTINGS, folder)
        self.config, self.examples, self.model = exported.config, exported.examples, exported.model
        self.torch_model, tokenizer = exported.torch_model, exported.tokenizer
        if kind == "messages":
            assert tokenizer.chat_template == CHATML
            tokenizer.chat_template = CHATML_WITH_TAGS
        self.trainer = trl.SFTTrainer(
            self.torch_model,
            args=trl.SFTConfig(
                output_dir=str(folder / "trl"),
                loss_type="nll",
                assistant_only_loss=kind == "messages",
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
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    def our_batch(self) -> Batch:
        array = ExampleArray(pack_examples(self.examples), self.config.model.vocab_size)
        batch = array.get_batch(0, seed=0, batch_size=2, micro_batches=2, block_size=128)
        return Batch(*map(mx.array, batch[:3]))


@pytest.fixture
def sides(bpe_run: runs.Run, kind: str, tmp_path: Path) -> Sides:
    return Sides(bpe_run, kind, tmp_path)


def test_examples_have_the_same_ids_and_masks(sides: Sides) -> None:
    batch = next(iter(sides.trainer.get_train_dataloader()))
    theirs = set()
    for ids, labels, attention in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        size = int(attention.sum())
        theirs.add((tuple(ids[:size].tolist()), tuple((labels[:size] != -100).tolist())))
    ours = {(tuple(ids.tolist()), tuple(trained.tolist())) for ids, trained in sides.examples}
    assert ours == theirs


def test_loss_and_gradients_match(sides: Sides) -> None:
    step = TrainStep(sides.model, sides.config)
    loss, gradients = step.compute_gradients(sides.our_batch(), mx.random.key(0))
    batch = next(iter(sides.trainer.get_train_dataloader()))
    torch_loss = sides.trainer.compute_loss(sides.torch_model, batch)
    torch_loss.backward()
    assert float(loss) == pytest.approx(torch_loss.item(), abs=1e-4)
    theirs = torch_gradients(sides.torch_model)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(np.array(gradient), theirs[name], atol=1e-4, err_msg=name)


def test_twenty_steps_match(sides: Sides) -> None:
    step, losses = TrainStep(sides.model, sides.config), []
    for n in range(20):
        rate = mx.array(LEARNING_RATE)
        loss, _ = step(sides.our_batch(), rate, mx.random.key(n))
        mx.eval(loss, step.state)
        losses.append(float(loss))
    sides.trainer.train()
    records: list[dict[str, Any]] = sides.trainer.state.log_history
    theirs = [record["loss"] for record in records if "loss" in record]
    np.testing.assert_allclose(losses, theirs, atol=1e-3)
    assert losses[-1] < losses[0] - 0.1, "both learn"


def test_a_mask_shifted_by_a_token_is_noticed(sides: Sides) -> None:
    """The comparisons would fail with the most common bug of such masks."""
    batch = sides.our_batch()
    shifted = batch._replace(weights=mx.roll(batch.weights, 1, -1))
    step = TrainStep(sides.model, sides.config)
    losses = [float(step.compute_gradients(b, mx.random.key(0))[0]) for b in (batch, shifted)]
    assert abs(losses[0] - losses[1]) > 1e-3
