"""Fine-tuning: initialize a run from the weights of another run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgpt.config import Config, override_config, validate_config
from mlxgpt.config.resolve import resolve_config
from mlxgpt.data.chat_template import CHATML, IM_END, IM_START
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_rows import find_first_example, uses_template
from mlxgpt.data.examples import ExampleFormat
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.data.tokenizers.tokenizer_json import add_special_tokens
from mlxgpt.evaluation.loss import EvalDataset
from mlxgpt.model.parameters import add_vocab_rows, fit_positions, flatten_params
from mlxgpt.storage import checkpoint
from mlxgpt.storage.loading import load_model, open_run_dataset
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

# Config fields that are fixed by the weights.
ARCHITECTURE_FIELDS = (
    "n_layer",
    "n_head",
    "n_embd",
    "vocab_size",
    "bias",
    "position",
    "norm",
    "qk_norm",
    "mlp",
    "tied",
    "embedding_norm",
    "value_embeddings",
    "value_gate",
    "smear",
    "token_shift",
    "induction_head",
)


DEFAULT_BETA = 0.1  # of DPO, as in its paper and in TRL


@dataclass(frozen=True)
class InitWeights:
    """Initial weights from another run.

    Attributes:
        parameters: by dotted name.
        tokenizer: tokenizer of the other run; the data must use the same one.
        origin: run name, step and SHA-256 of the weights; part of the new run's identity.
        chat_template: chat template of the new run; None without one.
        examples: how the data's examples are encoded; None if it consists of text.
        parent: the other run.
    """

    parameters: dict[str, mx.array]
    tokenizer: Tokenizer
    origin: Mapping[str, Any]
    chat_template: str | None
    examples: ExampleFormat | None
    parent: Run

    @property
    def new_tokens(self) -> range:
        """Ids of tokens that the other run's tokenizer does not have."""
        return range(self.parent.tokenizer.vocab_size, self.tokenizer.vocab_size)

    @property
    def adds_bos(self) -> bool:
        """Whether the new run's texts start with an end-of-text token. Conversations start as the
        chat template does.
        """
        is_chat = self.examples is not None and self.examples.template is not None
        return self.tokenizer.end_of_text is not None and not is_chat


def choose_config(settings: Mapping[str, Any]) -> str:
    """The built-in config for settings that choose none: `dpo` for preference pairs, else `lora` if
    there is a `lora_rank`, else `finetune`.
    """
    _, config = resolve_config(None, "finetune", **settings)
    example = find_first_example(config.data)
    if example and example.is_pair:
        return "dpo"
    return "lora" if config.lora.lora_rank else "finetune"


def load_init_weights(
    run: Run, config: Config, explicit_settings: Mapping[str, Any]
) -> tuple[Config, InitWeights]:
    """Load a run's weights, and set `config` to the run's architecture. A smaller block size keeps
    the first position embeddings, as in nanoGPT.

    Args:
        config: all other settings.
        explicit_settings: settings that the user passed by name.

    Raises:
        UserError: if a setting conflicts with the run's weights.
    """
    model_config = run.config.model
    for name in ARCHITECTURE_FIELDS:
        value = getattr(model_config, name)
        if explicit_settings.get(name, value) != value:
            raise UserError(
                f"{name} = {explicit_settings[name]} conflicts with {run.name}, which has "
                f"{name} = {value}",
                f"omit it: a run initialized from {run.name} has the same architecture.",
            )
    block_size = explicit_settings.get("block_size", model_config.block_size)
    has_learned_positions = model_config.position == "learned"
    if has_learned_positions and block_size > model_config.block_size:
        raise UserError(
            f"block_size = {block_size} exceeds the block size of {run.name}, "
            f"{model_config.block_size}",
            f"use --block-size {model_config.block_size} or less.",
        )
    dropout = explicit_settings.get("dropout", config.model.dropout)
    config = validate_config(
        replace(config, model=replace(model_config, block_size=block_size, dropout=dropout))
    )
    config = replace(config, data=replace(config.data, tokenizer=run.config.data.tokenizer))
    model, saved_checkpoint = load_model(run)
    parameters = flatten_params(model.parameters())
    parameters = fit_positions(parameters, block_size)
    mx.eval(parameters)  # now, so that a failing GPU step cannot leave them unevaluated
    folder = checkpoint.checkpoint_folder(run.checkpoints, saved_checkpoint.step)
    sha256 = files.sha256_file(folder / checkpoint.MODEL_FILE)
    origin = {"run": run.name, "step": saved_checkpoint.step, "sha256": sha256}
    chat_template = run.chat_template() if run.has_chat_template else None
    weights = InitWeights(
        parameters, run.tokenizer, origin, chat_template, examples=None, parent=run
    )
    example = find_first_example(config.data)
    if example and example.is_pair:
        config = override_config(config, {"beta": config.train.beta or DEFAULT_BETA})
    elif config.train.beta:
        raise UserError(
            f"--beta is for DPO, and {', '.join(config.data.source)} has no preference pairs",
            "omit it, or use rows with the keys prompt, chosen and rejected.",
        )
    if example:
        weights = _prepare_for_examples(weights, config, uses_template(example, config.data))
        vocab_size = max(config.model.vocab_size, weights.tokenizer.vocab_size)
        config = override_config(config, {"vocab_size": vocab_size})
    return config, weights


def _prepare_for_examples(weights: InitWeights, config: Config, is_chat: bool) -> InitWeights:
    """Set the format of the examples, and add what the chat template needs.

    Raises:
        UserError: if the tokenizer has no tokens that could end an answer.
    """
    template = None
    if is_chat:
        if isinstance(weights.tokenizer, CharTokenizer):
            raise UserError(
                f"{weights.parent.name} has one token per character, and none for roles",
                "use strings for prompt and completion, or a model with --tokenizer bpe.",
            )
        template = weights.chat_template
        if template is None:
            template = CHATML
            weights = _add_special_tokens(weights, (IM_START, IM_END))
    examples = ExampleFormat(
        template,
        template_strings=config.data.template,
        last_only=config.data.mask == "last",
        max_tokens=config.model.block_size + 1,
    )
    return replace(weights, chat_template=template or weights.chat_template, examples=examples)


def _add_special_tokens(weights: InitWeights, names: Sequence[str]) -> InitWeights:
    """Add special tokens to a model, the last of which ends a text. Each gets the mean of all
    tokens' embeddings (Hewitt, Initializing New Word Embeddings, 2021).
    """
    tokenizer = add_special_tokens(weights.tokenizer, names)
    new_tokens = range(weights.tokenizer.vocab_size, tokenizer.vocab_size)
    parameters = add_vocab_rows(weights.parameters, new_tokens)
    mx.eval(parameters)
    return replace(weights, parameters=parameters, tokenizer=tokenizer)


def find_base_validation(parent: Run, dataset: Dataset, data_dir: Path) -> EvalDataset | None:
    """Validation data of the run that the initial weights are from, to show what is forgotten; None
    if it is not here, or is the same as the new run's.

    Args:
        dataset: data of the new run.
    """
    if not parent.data_name or parent.data_fingerprint == dataset.meta.fingerprint:
        return None
    try:
        base_dataset = open_run_dataset(parent, data_dir)
    except UserError as error:
        logger.info(f"not measuring what the model forgets: {error.problem}")
        return None
    return EvalDataset(base_dataset.val, base_dataset.tokenizer, parent.bos)
