"""Config dataclasses: all settings of a run, with their defaults and help texts.

The command line flags, the TOML files and the copy in each run's folder are all generated from
these fields. This module does not depend on MLX, data files or the terminal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from mlxgpt.config.fields import (
    check_bounds,
    coerce_types,
    config_field,
    iter_fields,
    unknown_name_error,
)
from mlxgpt.config.lora import LoRAConfig
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Model architecture, in GPT-2's terms (Radford et al., 2019). Defaults: GPT-2 small."""

    n_layer: int = config_field(12, "transformer blocks", low=1)
    n_head: int = config_field(12, "attention heads per block", low=1)
    n_embd: int = config_field(768, "embedding dimension", low=1)
    block_size: int = config_field(1024, "context length in tokens", low=1)
    vocab_size: int = config_field(
        0, "vocabulary size, also of a BPE tokenizer to train; 0: determined by the data", low=0
    )
    dropout: float = config_field(
        0.1,
        "dropout probability, except on attention weights",
        low=0.0,
        high=0.9,
    )
    bias: bool = config_field(True, "use biases in linear layers and layer norms, as GPT-2 does")
    position: str = config_field(
        "learned",
        "position encoding: learned, an embedding per position; rope, rotary embeddings",
        choices=("learned", "rope"),
    )
    norm: str = config_field(
        "layer",
        "normalization: layer, LayerNorm; rms, RMSNorm with a gain in the final norm only",
        choices=("layer", "rms"),
    )
    qk_norm: bool = config_field(False, "normalize queries and keys in each head")
    mlp: str = config_field(
        "gelu",
        "MLP activation: gelu; relu2, squared ReLU; swiglu, gated SiLU",
        choices=("gelu", "relu2", "swiglu"),
    )
    tied: bool = config_field(True, "tie the output head to the token embedding")
    embedding_norm: bool = config_field(False, "normalize token embeddings before the first block")
    value_embeddings: bool = config_field(
        False, "add a learned embedding of each token to the attention values in every block"
    )
    value_gate: bool = config_field(
        False, "value embeddings in every second block only, each with a gate per head"
    )
    smear: bool = config_field(
        False, "add a gated share of the previous token's embedding to each token's"
    )
    token_shift: bool = config_field(
        False,
        "attention reads a gated share of the previous token's vector, and half of each key is the "
        "previous token's",
    )
    induction_head: bool = config_field(
        False,
        "start with an induction head in the first two blocks, if there are two heads and rotary "
        "positions",
    )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings that, with the weights, determine the logits. Default values are
        omitted, so that adding a setting does not change it.
        """
        training_only = ("dropout", "induction_head")
        names = [f.name for f in fields(self) if f.name not in training_only]
        values = {name: getattr(self, name) for name in names}
        values = {
            name: value for name, value in values.items() if value != getattr(type(self), name)
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data, and the tokenizer."""

    source: tuple[str, ...] = config_field(
        ("shakespeare",),
        "training data: shakespeare, tinystories, tinystories-gpt4, openwebtext, synthetic "
        "(generated stories), a Hub dataset as hf:OWNER/NAME[:COLUMN], files, folders, or a "
        "prepared data folder",
    )
    val_source: tuple[str, ...] = config_field(
        (), "validation data; default: split from the source"
    )
    tokenizer: str = config_field(
        "char",
        "char, one token per character; bpe, byte-level BPE with vocab_size tokens, trained on the "
        "data; gpt2, the pretrained GPT-2 tokenizer",
        choices=("char", "bpe", "gpt2"),
    )
    template: bool = config_field(
        False, "render prompts and completions that are strings with the chat template, too"
    )
    mask: str = config_field(
        "all",
        "answers of a conversation that are trained: all; last, only the last one",
        choices=("all", "last"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule. Defaults: nanoGPT's for GPT-2, AdamW (Loshchilov &
    Hutter, 2019) with cosine decay.
    """

    optimizer: str = config_field(
        "adamw",
        "adamw; or muon, for the matrices of the blocks, with AdamW for all other parameters",
        choices=("adamw", "muon"),
    )
    learning_rate: float = config_field(6e-4, "peak learning rate of AdamW", low=0.0)
    embedding_learning_rate: float = config_field(
        0.0, "peak learning rate of AdamW for embeddings; 0: same as learning_rate", low=0.0
    )
    muon_learning_rate: float = config_field(0.02, "peak learning rate of Muon", low=0.0)
    schedule: str = config_field(
        "cosine",
        "learning rate decay: cosine, over all steps; wsd (warmup, stable, decay), linear over the "
        "final cooldown",
        choices=("cosine", "wsd"),
    )
    cooldown: float = config_field(
        0.5, "length of the linear decay of wsd as a fraction of all steps", low=0.0, high=1.0
    )
    min_lr_ratio: float = config_field(
        0.1, "final learning rate as a fraction of the peak", low=0.0, high=1.0
    )
    warmup_steps: int = config_field(2000, "steps of linear warmup", low=0)
    decay_steps: int = config_field(
        0, "steps until cosine decay reaches its minimum; 0: max_steps", low=0
    )
    weight_decay: float = config_field(
        0.1, "weight decay of parameters with two or more dimensions", low=0.0
    )
    beta1: float = config_field(
        0.9, "AdamW beta1, decay rate of the gradient average", low=0.0, high=0.9999
    )
    beta2: float = config_field(
        0.95, "AdamW beta2, decay rate of the squared gradient", low=0.0, high=0.999999
    )
    eps: float = config_field(1e-8, "AdamW epsilon", low=0.0)
    grad_clip: float = config_field(1.0, "maximum global gradient norm; 0: no clipping", low=0.0)


@dataclass(frozen=True)
class TrainConfig:
    """Batch size, number of steps, dtypes, evaluation, logging and checkpoints."""

    batch_size: int = config_field(12, "sequences per micro-batch", low=1)
    gradient_accumulation_steps: int = config_field(1, "micro-batches per optimizer step", low=1)
    max_steps: int = config_field(5000, "total number of optimizer steps", low=1)
    beta: float = config_field(
        0.0,
        "of DPO, on preference pairs: how strongly the model is held to its initial weights; "
        "0: 0.1 for pairs",
        low=0.0,
    )
    seed: int = config_field(1337, "random seed", low=0, high=2**63 - 1)
    dtype: str = config_field(
        "auto",
        "dtype of the forward and backward pass; auto: bfloat16 on CUDA, float32 elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )
    reduce_dtype: str = config_field(
        "float32",
        "dtype in which gradients are all-reduced across machines; bfloat16: half the traffic",
        choices=("float32", "bfloat16"),
    )
    gradient_checkpointing: bool = config_field(
        False,
        "recompute activations in the backward pass: less memory, more time",
        affects_weights=False,
    )
    log_interval: int = config_field(
        10, "steps between logged metrics", low=1, affects_weights=False
    )
    eval_interval: int = config_field(
        250, "steps between evaluations", low=1, affects_weights=False
    )
    eval_tokens: int = config_field(
        0,
        "validation tokens per evaluation during training; 0: 15% of the tokens trained on since "
        "the last evaluation",
        low=0,
        affects_weights=False,
    )
    patience: int = config_field(
        0,
        "stop after this many evaluations without a lower validation loss; 0: never",
        low=0,
        affects_weights=False,
    )
    save_interval: int = config_field(
        250,
        "steps between checkpoints; each evaluation also saves one",
        low=1,
        affects_weights=False,
    )
    sample_tokens: int = config_field(
        200, "tokens of the sample at each evaluation; 0: no sample", low=0, affects_weights=False
    )
    keep_checkpoints: int = config_field(
        2, "newest checkpoints to keep, in addition to the best", low=1, affects_weights=False
    )
    snapshots: bool = config_field(
        True,
        "keep 16-bit weights of steps 0, 100, 200, 400, … for mlxgpt play; disabled if they would "
        "take more than a tenth of the free disk space",
        affects_weights=False,
    )
    on_spike: str = config_field(
        "ignore",
        "on a loss spike: ignore; skip, skip the step; rollback, return to the newest checkpoint "
        "and continue with other batches",
        choices=("ignore", "skip", "rollback"),
        affects_weights=False,
    )


@dataclass(frozen=True)
class Config:
    """Complete configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def loss_unit(self) -> str:
        """Unit of the training and validation loss."""
        return "nats per pair" if self.train.beta else "nats per token"

    @property
    def sequences_per_step(self) -> int:
        """Sequences, or preference pairs, per optimizer step, over all micro-batches."""
        return self.train.batch_size * self.train.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all micro-batches."""
        return self.sequences_per_step * self.model.block_size


SECTIONS: dict[str, type] = get_type_hints(Config)


# Field names are unique across sections, so that flags need no prefix.
SECTION_BY_FIELD: dict[str, str] = {
    name: section for section, cls in SECTIONS.items() for name, _, _ in iter_fields(cls)
}


def override_config(config: Config, values: Mapping[str, Any]) -> Config:
    """Replace fields of a config, by name, and validate the result.

    Raises:
        UserError: for an unknown name or an invalid value.
    """
    values_by_section: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in SECTION_BY_FIELD:
            raise unknown_name_error(f"setting {name!r}", name, SECTION_BY_FIELD)
        values_by_section.setdefault(SECTION_BY_FIELD[name], {})[name] = value
    sections = {
        section: replace(
            getattr(config, section),
            **coerce_types(SECTIONS[section], section_values, SECTION_BY_FIELD),
        )
        for section, section_values in values_by_section.items()
    }
    return validate_config(replace(config, **sections))


def config_from_tree(tree: Mapping[str, Any]) -> Config:
    """Build and validate a Config from nested mappings, as parsed from TOML."""
    sections = {}
    for section, section_values in tree.items():
        if section not in SECTIONS:
            if section in SECTION_BY_FIELD:
                raise UserError(
                    f"{section!r} is outside its section",
                    f"move it to [{SECTION_BY_FIELD[section]}].",
                )
            raise unknown_name_error(f"section [{section}]", section, SECTIONS)
        if not isinstance(section_values, Mapping):
            raise UserError(f"{section!r} is a section, not a value", f"write [{section}].")
        sections[section] = SECTIONS[section](
            **coerce_types(SECTIONS[section], section_values, SECTION_BY_FIELD)
        )
    return validate_config(Config(**sections))


def validate_config(config: Config) -> Config:
    """Check all values of a config, and return it.

    Raises:
        UserError: with the name of the setting and the nearest valid value.
    """
    for section in SECTIONS:
        check_bounds(getattr(config, section))
    model = config.model
    if model.n_embd % model.n_head:
        lower_multiple = model.n_embd // model.n_head * model.n_head
        suggestions = [str(n) for n in (lower_multiple, lower_multiple + model.n_head) if n]
        raise UserError(
            f"n_embd = {model.n_embd} is not divisible by n_head = {model.n_head}",
            f"use a multiple of {model.n_head}, such as n_embd = {' or '.join(suggestions)}.",
        )
    head_size = model.n_embd // model.n_head
    if head_size % 2 and (model.position == "rope" or model.token_shift):
        needs_even = "position = rope" if model.position == "rope" else "token_shift = true"
        raise UserError(
            f"n_embd = {model.n_embd} and n_head = {model.n_head} give an odd head size of "
            f"{head_size}, and {needs_even} needs an even one",
            f"use an even head size, such as n_embd = {model.n_head * (head_size + 1)}.",
        )
    if model.value_gate and not model.value_embeddings:
        raise UserError(
            "value_gate = true needs value_embeddings = true",
            "set value_embeddings = true, or omit value_gate.",
        )
    if config.lora.dora and not config.lora.lora_rank:
        raise UserError("dora = true needs a lora_rank", "set lora_rank = 8, or omit dora.")
    if config.lora.lora_layers > model.n_layer:
        raise UserError(
            f"lora_layers = {config.lora.lora_layers} exceeds n_layer = {model.n_layer}",
            "use fewer, or omit it for all.",
        )
    return config


SHAKESPEARE_VOCAB_SIZE = 65  # characters in Tiny Shakespeare


def fill_vocab_size(config: Config) -> Config:
    """Set a vocabulary size left to the data (0) to the number of Tiny Shakespeare's characters."""
    return (
        config
        if config.model.vocab_size
        else override_config(config, {"vocab_size": SHAKESPEARE_VOCAB_SIZE})
    )


def diff_configs(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two configs: name -> (old, new). The data section is not
    compared, since the data is identified by its hash.
    """
    values_by_field = {
        name: (getattr(getattr(old, section), name), getattr(getattr(new, section), name))
        for name, section in SECTION_BY_FIELD.items()
        if section != "data"
    }
    return {name: (a, b) for name, (a, b) in values_by_field.items() if a != b}


def weight_affecting_fields(old: Config, new: Config) -> list[str]:
    """Names of the settings that differ between two configs and change the trained weights. This
    excludes splitting the same batch into other micro-batches, which only changes rounding, and
    `max_steps` if the schedule does not depend on it.
    """
    ignored = {
        name
        for section in SECTIONS.values()
        for name, _, item in iter_fields(section)
        if not item.metadata["weights"]
    }
    if old.sequences_per_step == new.sequences_per_step:
        ignored |= {"batch_size", "gradient_accumulation_steps"}
    if old.optim.decay_steps == new.optim.decay_steps > 0:
        ignored.add("max_steps")
    return [name for name in diff_configs(old, new) if name not in ignored]
