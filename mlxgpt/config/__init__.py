"""What a run is: one tree of frozen dataclasses, and the only place where a default stands.

The command line's flags, the TOML files and the copy in each run's folder are all made from these
fields. Nothing here knows MLX, files of data, or a terminal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from mlxgpt.config.schema import checked, setting, settings, typed, unknown
from mlxgpt.utils.errors import UserError

CHARACTERS = 65  # in Tiny Shakespeare


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-2 (Radford et al., 2019), by its own names. The defaults are GPT-2 small's."""

    n_layer: int = setting(12, "transformer blocks", low=1)
    n_head: int = setting(12, "attention heads in a block", low=1)
    n_embd: int = setting(768, "width: numbers that stand for one token", low=1)
    block_size: int = setting(1024, "context length in tokens", low=1)
    vocab_size: int = setting(
        0, "different tokens, also for a BPE to be trained; 0: as many as the data has", low=0
    )
    dropout: float = setting(
        0.1,
        "share of activations set to zero in training, all but attention's weights",
        low=0.0,
        high=0.9,
    )
    bias: bool = setting(True, "biases in linear layers and layer norms, as GPT-2 has them")
    position: str = setting(
        "learned",
        "how a token knows its place: learned, a vector for each; rope, turned by it",
        choices=("learned", "rope"),
    )
    norm: str = setting(
        "layer",
        "layer, mean and variance; rms, the size alone, without a gain but in the last one",
        choices=("layer", "rms"),
    )
    qk_norm: bool = setting(False, "queries and keys normalised in each head")
    mlp: str = setting(
        "gelu",
        "what lies between the MLP's layers: gelu; relu2, squared; swiglu, gated",
        choices=("gelu", "relu2", "swiglu"),
    )
    tied: bool = setting(True, "the output layer is the token embedding, not a matrix of its own")
    embedding_norm: bool = setting(
        False, "the token embedding is normalised before the first block"
    )
    value_embeddings: bool = setting(
        False, "in each block a vector of each token of its own, added to attention's values"
    )

    @property
    def fingerprint(self) -> str:
        """The sha256 of what decides a model's logits beside its weights. Settings at their default
        are left out, so that it stays the same when there are new ones.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "dropout"}
        own = {name: value for name, value in own.items() if value != getattr(type(self), name)}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    source: tuple[str, ...] = setting(
        ("shakespeare",),
        "text to train on: shakespeare, tinystories, tinystories-gpt4, openwebtext, storybook, a "
        "dataset of the hub as hf:OWNER/NAME[:COLUMN], files, folders, or a prepared data folder",
    )
    val_source: tuple[str, ...] = setting((), "validation text; default: a part of the source")
    tokenizer: str = setting(
        "char",
        "how text becomes tokens: char, one a character; bpe, byte-level BPE with vocab_size ids, "
        "trained on the text; gpt2, GPT-2's own",
        choices=("char", "bpe", "gpt2"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. The defaults are nanoGPT's for GPT-2: AdamW (Loshchilov &
    Hutter, 2019), and a cosine.
    """

    optimizer: str = setting(
        "adamw",
        "adamw, on everything; muon, on the blocks' matrices, and AdamW on the rest",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(6e-4, "peak learning rate of AdamW", low=0.0)
    embedding_learning_rate: float = setting(
        0.0, "peak learning rate of AdamW on embeddings; 0: as on the rest", low=0.0
    )
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon", low=0.0)
    schedule: str = setting(
        "cosine",
        "how the learning rate falls: cosine, all the way; linear, over the last part",
        choices=("cosine", "linear"),
    )
    cooldown: float = setting(
        0.5, "share of the steps in which the linear schedule falls", low=0.0, high=1.0
    )
    min_lr_ratio: float = setting(
        0.1, "final learning rate as a share of the peak", low=0.0, high=1.0
    )
    warmup_steps: int = setting(2000, "steps of linear warmup", low=0)
    decay_steps: int = setting(0, "steps until the cosine reaches its floor; 0: max_steps", low=0)
    weight_decay: float = setting(0.1, "decay of parameters of two or more dimensions", low=0.0)
    beta1: float = setting(0.9, "AdamW's memory of the gradient", low=0.0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's memory of its square", low=0.0, high=0.999999)
    eps: float = setting(1e-8, "AdamW's epsilon", low=0.0)
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", low=0.0)


@dataclass(frozen=True)
class TrainConfig:
    """How long, in which portions, and what is shown and kept on the way."""

    batch_size: int = setting(12, "sequences in a (micro-)batch", low=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches summed before each update", low=1)
    max_steps: int = setting(5000, "updates in all", low=1)
    seed: int = setting(1337, "seed of everything random", low=0, high=2**63 - 1)
    dtype: str = setting(
        "auto",
        "numbers of the forward and backward pass; auto: bfloat16 on CUDA, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    reduce_dtype: str = setting(
        "float32",
        "numbers in which several machines add up their gradients; bfloat16: half as much to send",
        choices=("float32", "bfloat16"),
    )
    gradient_checkpointing: bool = setting(
        False,
        "recompute activations in the backward pass: less memory, more time",
        weights=False,
    )
    log_interval: int = setting(10, "steps between two lines of metrics", low=1, weights=False)
    eval_interval: int = setting(250, "steps between two evaluations", low=1, weights=False)
    eval_tokens: int = setting(
        0,
        "tokens of the validation text in an evaluation on the way, spread over it; 0: 15 % of "
        "what was trained on since the last one",
        low=0,
        weights=False,
    )
    save_interval: int = setting(
        250, "steps between two checkpoints; each evaluation saves too", low=1, weights=False
    )
    sample_tokens: int = setting(
        200, "length of the sample at each evaluation; 0: none", low=0, weights=False
    )
    keep_checkpoints: int = setting(
        2, "newest checkpoints that are kept, beside the best", low=1, weights=False
    )
    snapshots: bool = setting(
        True,
        "keep the weights after 0, 100, 200, 400, … steps, in 16 bits, for mlxgpt play; none where "
        "all would take more than a tenth of the disk's free space",
        weights=False,
    )
    on_spike: str = setting(
        "ignore",
        "what to do at a loss far above those before it: ignore; skip, leave that step out; "
        "rollback, go back to the newest checkpoint and on with other batches",
        choices=("ignore", "skip", "rollback"),
        weights=False,
    )


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def sequences_per_step(self) -> int:
        """Sequences of all micro-batches of an update."""
        return self.train.batch_size * self.train.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all micro-batches of an update."""
        return self.sequences_per_step * self.model.block_size


@dataclass(frozen=True)
class Sampling:
    """How text is drawn from a model: no part of a run, chosen anew at each generation."""

    max_tokens: int = setting(500, "most tokens to make", low=1)
    temperature: float = setting(
        0.8, "below 1 plainer, above 1 wilder; 0: always the likeliest token", low=0.0, high=100.0
    )
    top_k: int = setting(0, "choose among the k likeliest tokens; 0: all", low=0)
    top_p: float = setting(
        1.0, "choose among the fewest tokens that hold this probability", low=0.0, high=1.0
    )
    min_p: float = setting(
        0.0, "leave out tokens below this share of the likeliest's probability", low=0.0, high=1.0
    )
    repetition_penalty: float = setting(
        1.0, "above 1: tokens that were there already become less likely", low=0.01, high=100.0
    )
    seed: int | None = setting(
        None, "same seed, same text; default: a fresh one, which is shown", low=0, high=2**63 - 1
    )
    stop: tuple[str, ...] = setting((), "end before this text appears (may be given repeatedly)")
    samples: int = setting(1, "texts to make at once, in one batch", low=1)


SECTIONS: dict[str, type] = get_type_hints(Config)


# Every field's name is used once in the tree, so that a flag needs no prefix.
SECTION_OF: dict[str, str] = {
    name: section for section, cls in SECTIONS.items() for name, _, _ in settings(cls)
}


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with fields replaced by their plain names, validated.

    Raises:
        UserError: for an unknown name or an impossible value.
    """
    changed: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in SECTION_OF:
            raise unknown(f"setting {name!r}", name, SECTION_OF)
        changed.setdefault(SECTION_OF[name], {})[name] = value
    parts = {
        section: replace(getattr(config, section), **typed(SECTIONS[section], part, SECTION_OF))
        for section, part in changed.items()
    }
    return validate(replace(config, **parts))


def sampling(values: Mapping[str, Any]) -> Sampling:
    """Sampling settings from plain values, validated.

    Raises:
        UserError: for an unknown name or an impossible value.
    """
    return checked(Sampling(**typed(Sampling, values)))


def from_tree(tree: Mapping[str, Any]) -> Config:
    """A validated Config from nested mappings, as a TOML file gives them."""
    parts = {}
    for section, part in tree.items():
        if section not in SECTIONS:
            if section in SECTION_OF:
                raise UserError(
                    f"{section!r} stands outside its section",
                    f"put it under [{SECTION_OF[section]}].",
                )
            raise unknown(f"section [{section}]", section, SECTIONS)
        if not isinstance(part, Mapping):
            raise UserError(f"{section!r} is a section, not a value", f"write [{section}].")
        parts[section] = SECTIONS[section](**typed(SECTIONS[section], part, SECTION_OF))
    return validate(Config(**parts))


def validate(config: Config) -> Config:
    """`config` itself, if every value can be.

    Raises:
        UserError: naming the setting, and the nearest value that would do.
    """
    for section in SECTIONS:
        checked(getattr(config, section))
    model = config.model
    if model.n_embd % model.n_head:
        below = model.n_embd // model.n_head * model.n_head
        near = [str(n) for n in (below, below + model.n_head) if n]
        raise UserError(
            f"n_embd = {model.n_embd} cannot be shared among n_head = {model.n_head} heads",
            f"use a multiple of {model.n_head}, such as n_embd = {' or '.join(near)}.",
        )
    size = model.n_embd // model.n_head
    if model.position == "rope" and size % 2:
        raise UserError(
            f"n_embd = {model.n_embd} gives each of n_head = {model.n_head} heads {size} numbers, "
            "and position = rope turns them in pairs",
            f"use an even number for each, such as n_embd = {model.n_head * (size + 1)}.",
        )
    return config


def with_vocabulary(config: Config) -> Config:
    """`config`, its vocabulary that of Shakespeare's characters where it is left to the data."""
    return config if config.model.vocab_size else override(config, {"vocab_size": CHARACTERS})


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ: name -> (old, new). Sources are left out: the
    data's own hash tells.
    """
    pairs = {
        name: (getattr(getattr(old, section), name), getattr(getattr(new, section), name))
        for name, section in SECTION_OF.items()
        if section != "data"
    }
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def changed_weights(old: Config, new: Config) -> list[str]:
    """Names of the settings in which two configs differ so that a training would end with other
    weights. The same sequences in other micro-batches are left out, which differ by rounding only,
    and so is a longer `max_steps` when the schedule does not hang on it.
    """
    harmless = {
        name
        for section in SECTIONS.values()
        for name, _, item in settings(section)
        if not item.metadata["weights"]
    }
    if old.sequences_per_step == new.sequences_per_step:
        harmless |= {"batch_size", "gradient_accumulation_steps"}
    if old.optim.decay_steps == new.optim.decay_steps > 0:
        harmless.add("max_steps")
    return [name for name in differences(old, new) if name not in harmless]
