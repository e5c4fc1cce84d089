"""A run prepared for examples, and the same model and tokenizer in transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxgpt import api
from mlxgpt.config import DataConfig, override_config
from mlxgpt.data.example_rows import read_examples
from mlxgpt.data.examples import encode_example
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import load_parameters
from mlxgpt.storage import run as runs
from mlxgpt.training.finetune import load_init_weights
from tests.helpers.example_rows import write_rows

# As in TRL with a constant rate and no weight decay.
LEARNING_RATE = 1e-3
SETTINGS = {
    "learning_rate": LEARNING_RATE,
    "min_lr_ratio": 1.0,
    "warmup_steps": 0,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "grad_clip": 1.0,
    "dtype": "float32",
}


class ExportedExamples:
    """Rows encoded for a base run, with its model on both sides.

    Attributes:
        config: of the run that would be trained on the rows.
        examples: of all rows; of a pair the chosen and the rejected answer.
        model: of the base.
        torch_model, tokenizer: from its export.
    """

    def __init__(
        self,
        base: runs.Run,
        rows: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        folder: Path,
    ) -> None:
        import transformers

        source = write_rows(folder / "rows.jsonl", *rows)
        config = override_config(base.config, settings)
        config = replace(config, data=DataConfig(source=(source,)))
        config, weights = load_init_weights(base, config, {"dropout": 0.0})
        self.config = override_config(config, {"dropout": 0.0})
        assert weights.examples is not None
        self.examples = [
            encode_example(answer, weights.examples, weights.tokenizer)
            for row in read_examples([source])
            for answer in row.answers()
        ]
        self.model = GPT(self.config.model)
        load_parameters(self.model, weights.parameters)
        run = replace(
            base,
            folder=folder / "runs" / "tuned",
            config=self.config,
            tokenizer=weights.tokenizer,
            add_bos_token=weights.adds_bos,
        )
        runs.create_run(run, weights.chat_template)
        run.save(run.checkpoints, 0, dict(weights.parameters), {})
        exported = folder / "exported"
        api.export(to="hf", run="tuned", runs_dir=folder / "runs", output=exported)
        self.torch_model = transformers.AutoModelForCausalLM.from_pretrained(exported)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
        self.tokenizer.pad_token = self.tokenizer.eos_token


def torch_gradients(torch_model: Any) -> dict[str, Any]:
    """Gradients of a GPT-2 of transformers, by our names and in our layout."""
    gradients = {}
    for name, parameter in torch_model.named_parameters():
        gradient = parameter.grad.numpy()
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            gradient = gradient.T  # transformers' Conv1D
        gradients[name.removeprefix("transformer.")] = gradient
    return gradients
