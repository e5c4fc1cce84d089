"""GPT-2 as Hugging Face transformers keeps it: a folder with config.json and safetensors.

There the four matrices of a block are [in, out] (a Conv1D of one column), here [out, in]; names
may stand behind `transformer.`; older files hold each layer's causal mask; weights may be spread
over several files with an index. mlx-lm reads the same folder, if config.json has `n_ctx`, names
have no prefix and there is no head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxgpt import files
from mlxgpt.config import ModelConfig, from_tree
from mlxgpt.corpus.tokenizer import Tokenizer
from mlxgpt.errors import UserError
from mlxgpt.model.counting import count_parameters
from mlxgpt.model.gpt import GPT, flat, must_be_like

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The causal mask, and the number that hides; c_attn has a bias of its own, which is a weight.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
HEAD = "lm_head.weight"
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of the tanh form

# What a GPT-2 has to say of itself to be the one that is built here.
DEMANDS: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": GELU,
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class Foreign:
    """A model that was made elsewhere.

    Attributes:
        config: its shape.
        parameters: its arrays by our names, float32; those of a file are read when they are needed.
        tokenizer: its own.
        add_bos_token: whether its texts begin with an end-of-text.
        origin: where it comes from, for the record.
        chat_template: how a conversation becomes a prompt, in Jinja; None where there is none.
    """

    config: ModelConfig
    parameters: dict[str, mx.array]
    tokenizer: Tokenizer
    add_bos_token: bool
    origin: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None


def read_config(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json tells of.

    Raises:
        UserError: if it is missing, damaged, or that of another architecture.
    """
    path = folder / CONFIG
    try:
        tree = files.parse_json(files.read_small(path))
        for name, allowed in DEMANDS.items():
            value = tree.get(name, allowed[0]) if name != "model_type" else tree[name]
            if value not in allowed:
                raise UserError(
                    f"{path}: {name} is {value!r}, which is no GPT-2 as it is built here",
                    f"take a model with {name} {allowed[0]!r}, such as gpt2.",
                )
        if tree.get("n_inner") not in (None, 4 * tree["n_embd"]):
            raise UserError(
                f"{path}: n_inner is {tree['n_inner']}, not 4 × {tree['n_embd']}",
                "take a model whose MLP is four times as wide, such as gpt2.",
            )
        shape = {name: tree[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
        shape["block_size"] = tree.get("n_positions", tree.get("n_ctx"))
        shape["dropout"] = min(float(tree.get("resid_pdrop", 0.1)), 0.9)
        return from_tree({"model": {**shape, "bias": True}}).model
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}",
            "name a folder of a GPT-2, or gpt2 for its own.",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is no config of a GPT-2: {error}", "copy or download it again."
        ) from error


def read_parameters(folder: Path, config: ModelConfig) -> dict[str, mx.array]:
    """A folder's weights by our names, float32, each read from its file when it is needed.

    Raises:
        UserError: if they are missing, damaged, or not those of the config.
    """
    arrays = _arrays(folder)
    arrays = {name.removeprefix("transformer."): value for name, value in arrays.items()}
    arrays = {name: value for name, value in arrays.items() if not BUFFER.fullmatch(name)}
    head = arrays.pop(HEAD, None)
    # By the one matrix that is never square: of a square one no shape tells which way it lies.
    first = arrays.get(f"h.0.{MATRICES[0]}")
    transposed = first is not None and first.shape == (config.n_embd, 3 * config.n_embd)
    parameters = {}
    for name, value in arrays.items():
        turned = transposed and value.ndim == 2 and name.endswith(MATRICES)
        parameters[name] = (value.T if turned else value).astype(mx.float32)
    if sum(value.size for value in parameters.values()) != count_parameters(config):
        raise _others(folder)
    must_be_like(parameters, flat(GPT(config).parameters()))
    if head is not None and not (
        head.shape == parameters["wte.weight"].shape
        and mx.array_equal(head.astype(mx.float32), parameters["wte.weight"])
    ):
        raise UserError(
            f"{folder}: its output head is not its embedding",
            "models with a head of their own cannot be imported; GPT-2's is the embedding itself.",
        )
    return parameters


def _arrays(folder: Path) -> dict[str, mx.array]:
    """All arrays of a folder; MLX compares each file's header with its length."""
    names = [WEIGHTS]
    try:
        if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
            places = files.parse_json(files.read_small(folder / INDEX))["weight_map"]
            names = sorted(set(places.values()))
            if any(name != Path(name).name or not name.endswith(".safetensors") for name in names):
                raise ValueError("it leads out of its folder")
        arrays: dict[str, mx.array] = {}
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(2, "No such file or directory", name)
            arrays |= cast(dict[str, mx.array], mx.load(str(folder / name)))
        return arrays
    except FileNotFoundError as error:
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise UserError(
            f"{folder} has no {error.filename}",
            "its pytorch_model.bin is a pickle, which can run code: save it as safetensors first."
            if pickled
            else "copy or download the whole folder again.",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"the weights in {folder} are damaged: {reason}", "copy or download them again."
        ) from error


def _others(folder: Path) -> UserError:
    return UserError(
        f"the weights in {folder} are not those that its config.json tells of",
        "copy or download the whole folder again.",
    )


def write_config(folder: Path, config: ModelConfig, bos: int | None, **more: Any) -> None:
    """Write config.json as transformers and mlx-lm read it.

    Args:
        bos: the id that begins and ends a text; None where there is none.
        more: what else stands in it.
    """
    shape = asdict(config)
    tree = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{name: shape[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # mlx-lm asks for it
        "n_inner": None,
        "activation_function": GELU[0],
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "bos_token_id": bos,
        "eos_token_id": bos,
        "torch_dtype": "float32",
        **more,
    }
    write_tree(folder, tree)


def write_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write config.json."""
    (folder / CONFIG).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def write_parameters(folder: Path, config: ModelConfig, parameters: dict[str, mx.array]) -> None:
    """Write model.safetensors: no prefix, no head, matrices [in, out], biases of zeros where the
    model has none.
    """
    arrays = {}
    for name, value in with_biases(config, parameters).items():
        turned = value.ndim == 2 and name.endswith(MATRICES)
        arrays[name] = mx.contiguous(value.T) if turned else value
    mx.save_safetensors(str(folder / WEIGHTS), arrays, {"format": "pt"})


def with_biases(config: ModelConfig, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    """The parameters, with zeros for the biases that every GPT-2 elsewhere has."""
    if config.bias:
        return parameters
    complete = {}
    for name, value in parameters.items():
        complete[name] = value
        if name not in ("wte.weight", "wpe.weight"):
            complete[name.removesuffix("weight") + "bias"] = mx.zeros(value.shape[:1])
    return complete
