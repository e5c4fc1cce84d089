"""Import and export of GPT-2 in the transformers format: config.json and safetensors.

transformers stores a block's four matrices as [in, out] (Conv1D), mlxgpt as [out, in]. On import,
names may have prefixes (`transformer.`, or `module.` and `_orig_mod.` of training wrappers), older
files contain causal masks, and weights may be sharded with an index. mlx-lm loads the exported
folder too; it needs `n_ctx` in config.json, names without a prefix, and no output head.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxgpt.backend import device_errors
from mlxgpt.backend.safetensors_io import load_arrays, save_arrays
from mlxgpt.config import ModelConfig, config_from_tree
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import check_shapes, flatten_params
from mlxgpt.model.stats import count_parameters
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_JSON = "config.json"
WEIGHTS_FILE, WEIGHTS_INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
LINEAR_WEIGHTS = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)
LM_HEAD = "lm_head.weight"
GELU_TANH_NAMES = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # all the tanh approximation


@dataclass(frozen=True)
class ImportedModel:
    """A model read from another library's format.

    Attributes:
        config: model config.
        parameters: float32 arrays by mlxgpt's names; may be loaded lazily from files.
        tokenizer: the model's tokenizer.
        add_bos_token: whether its texts begin with an end-of-text token.
        origin: source of the model, recorded in the run.
        chat_template: Jinja template that formats a conversation as a prompt; None without one.
    """

    config: ModelConfig
    parameters: dict[str, mx.array]
    tokenizer: Tokenizer
    add_bos_token: bool
    origin: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None


# Supported values in config.json; the first is transformers' default.
GPT2_REQUIREMENTS: dict[str, tuple[Any, ...]] = {
    "activation_function": GELU_TANH_NAMES,
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def read_gpt2_config(folder: Path) -> ModelConfig:
    """Read a GPT-2 model config from a folder's config.json.

    Raises:
        UserError: if it is missing, damaged, or describes another architecture.
    """
    path = folder / CONFIG_JSON
    try:
        tree = json_files.read_json(path)
        model_type = tree.get("model_type") or _infer_model_type(tree)
        for name, allowed in {"model_type": ("gpt2",), **GPT2_REQUIREMENTS}.items():
            value = model_type if name == "model_type" else tree.get(name, allowed[0])
            if value not in allowed:
                raise UserError(
                    f"{path}: {name} is {value!r}, which is not supported",
                    f"use a model with {name} {allowed[0]!r}, such as gpt2.",
                )
        shape = _read_shape(folder, tree)
        if tree.get("n_inner") not in (None, 4 * shape["n_embd"]):
            raise UserError(
                f"{path}: n_inner is {tree['n_inner']}, not 4 × {shape['n_embd']}",
                "use a model whose MLP is four times as wide as n_embd, such as gpt2.",
            )
        shape["block_size"] = shape.pop("n_positions")
        shape["dropout"] = min(float(tree.get("resid_pdrop", 0.1)), 0.9)
        return config_from_tree({"model": {**shape, "bias": True}}).model
    except OSError as error:
        remedy = "use the folder of a GPT-2 model, or gpt2 to download it."
        raise files.to_user_error(error, "read", path, remedy) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a valid GPT-2 config: {error}", "copy or download it again."
        ) from error


def _infer_model_type(tree: Mapping[str, Any]) -> str:
    """Infer the model_type of a config.json that lacks it."""
    architectures = ", ".join(map(str, tree.get("architectures") or ()))
    is_gpt2 = architectures.startswith("GPT2") or (not architectures and "n_embd" in tree)
    return "gpt2" if is_gpt2 else f"missing (architectures: {architectures or 'missing'})"


# Name in config.json -> other names that transformers accepts.
CONFIG_ALIASES = {
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
    "vocab_size": (),
    "n_positions": ("max_position_embeddings", "n_ctx"),
}


def _read_shape(folder: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Read the model's dimensions from config.json; infer missing ones from the weights."""
    shape: dict[str, Any] = {}
    for name, aliases in CONFIG_ALIASES.items():
        values = [tree[key] for key in (name, *aliases) if tree.get(key) is not None]
        shape |= {name: values[0]} if values else {}
    missing = [name for name in CONFIG_ALIASES if name not in shape]
    if missing:
        arrays = _normalize_names(folder, _read_arrays(folder))
        embeddings = [arrays.get(name) for name in ("wte.weight", "wpe.weight")]
        if all(embedding is not None and embedding.ndim == 2 for embedding in embeddings):
            wte, wpe = cast(list[mx.array], embeddings)
            layers = {name.split(".")[1] for name in arrays if re.match(r"h\.\d+\.", name)}
            sizes = dict(zip(("vocab_size", "n_embd"), wte.shape, strict=True))
            shape = {**sizes, "n_positions": wpe.shape[0], "n_layer": len(layers), **shape}
        missing = [name for name in CONFIG_ALIASES if name not in shape]
    if missing:
        raise UserError(
            f"{folder / CONFIG_JSON} lacks {', '.join(missing)}",
            f'add it, as in "{missing[0]}": 12 for gpt2; it cannot be inferred from the weights.',
        )
    return shape


# Inserted anywhere in a name by torch.compile, FSDP and DistributedDataParallel.
WRAPPER_PREFIXES = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|module)\.")
MODEL_PREFIXES = re.compile(r"(transformer\.|model\.)*")


def strip_prefixes(name: str) -> str:
    """A parameter's name without the prefixes of libraries and training wrappers."""
    return MODEL_PREFIXES.sub("", WRAPPER_PREFIXES.sub("", name), count=1)


# The causal mask and its fill value; does not match the parameter c_attn.bias.
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


def _normalize_names(folder: Path, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Strip the prefixes of all names, and drop causal masks."""
    normalized: dict[str, mx.array] = {}
    for full_name, value in arrays.items():
        name = strip_prefixes(full_name)
        if name in normalized:
            raise UserError(
                f"the weights in {folder} have {name!r} twice", "copy or download them again."
            )
        if not MASK_BUFFER.fullmatch(name):
            normalized[name] = value
    return normalized


GPT2_PARAMETER = re.compile(
    r"(wte|wpe)\.weight|ln_f\.(weight|bias)"
    r"|h\.\d+\.(ln_[12]|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
)
# Prefix of a name -> extra head that a language model can have.
EXTRA_HEADS = {
    "v_head.": "a value head for reinforcement learning",
    "multiple_choice_head.": "a multiple-choice head",
}
# Prefix of a name -> model with that head instead of a language modeling head.
OTHER_TASK_HEADS = {
    "score.": "a sequence classifier (GPT2ForSequenceClassification)",
    "classifier.": "a token classifier (GPT2ForTokenClassification)",
    "qa_outputs.": "a question-answering model (GPT2ForQuestionAnswering)",
}


def _drop_other_heads(folder: Path, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Drop the heads of other tasks, and log them.

    Raises:
        UserError: if it is not a language model, or has arrays that are not part of GPT-2.
    """
    for name in list(arrays):
        for prefix, description in {**EXTRA_HEADS, **OTHER_TASK_HEADS}.items():
            if not name.startswith(prefix):
                continue
            if prefix in OTHER_TASK_HEADS and LM_HEAD not in arrays:
                raise UserError(
                    f"{folder} is {description}, not a language model",
                    "use its base model, or a model with a language modeling head.",
                )
            logger.info(f"skipped {name}: {description}")
            del arrays[name]
    for name, value in arrays.items():
        if not GPT2_PARAMETER.fullmatch(name) and name != LM_HEAD:
            raise UserError(
                f"the weights in {folder} have {name!r}, which is not part of GPT-2",
                "use a complete GPT-2 model; merge an adapter (LoRA) into its model first.",
            )
        if not mx.issubdtype(value.dtype, mx.floating):
            raise UserError(
                f"the weights in {folder} are quantized: {name} has dtype {value.dtype}",
                "use the unquantized model.",
            )
    return arrays


def read_gpt2_parameters(folder: Path, config: ModelConfig) -> dict[str, mx.array]:
    """Read a folder's weights as float32, by mlxgpt's names, with little more than one copy of them
    in memory.

    Raises:
        UserError: if they are missing or damaged, or do not match the config.
    """
    arrays = _drop_other_heads(folder, _normalize_names(folder, _read_arrays(folder)))
    head = arrays.pop(LM_HEAD, None)
    for name, key, rows in (
        ("wte.weight", "vocab_size", config.vocab_size),
        ("wpe.weight", "n_positions", config.block_size),
    ):
        if name in arrays and arrays[name].shape[:1] != (rows,):
            raise UserError(
                f"the weights in {folder} do not match its config.json: "
                f"{name} has {arrays[name].shape[0]:,} rows, but {key} is {rows:,}",
                "copy or download the complete folder again.",
            )
    # c_attn is never square, so its shape shows the layout; attn.c_proj would fit both.
    c_attn = arrays.get(f"h.0.{LINEAR_WEIGHTS[0]}")
    has_conv1d_layout = c_attn is not None and c_attn.shape == (config.n_embd, 3 * config.n_embd)
    parameters = {}
    for name in list(arrays):
        value = arrays.pop(name)
        needs_transpose = has_conv1d_layout and value.ndim == 2 and name.endswith(LINEAR_WEIGHTS)
        parameters[name] = (value.T if needs_transpose else value).astype(mx.float32)
        mx.eval(parameters[name])
    if sum(value.size for value in parameters.values()) != count_parameters(config):
        raise _mismatch_error(folder)
    check_shapes(parameters, flatten_params(GPT(config).parameters()))
    if head is not None and not (
        head.shape == parameters["wte.weight"].shape
        and mx.array_equal(head.astype(mx.float32), parameters["wte.weight"])
    ):
        raise UserError(
            f"{folder}: the output head is not tied to the token embedding",
            "models with an untied output head cannot be imported; use one with a tied head.",
        )
    return parameters


def _read_arrays(folder: Path) -> dict[str, mx.array]:
    """Load all arrays of a folder, lazily; MLX checks each file's header against its size."""
    names = [WEIGHTS_FILE]
    try:
        file_names = [path.name for path in folder.iterdir()]
        weight_files = [
            name for name in file_names if name.endswith(".safetensors") and name != ADAPTER_FILE
        ]
        if files.exists(folder / WEIGHTS_FILE):
            pass
        elif files.exists(folder / WEIGHTS_INDEX_FILE):
            weight_map = json_files.read_json(folder / WEIGHTS_INDEX_FILE)["weight_map"]
            names = sorted(set(weight_map.values()))
            if any(name != Path(name).name or not name.endswith(".safetensors") for name in names):
                raise ValueError("its index refers to files outside the folder")
            if any(len(os.fsencode(name)) > 255 for name in names):
                raise ValueError("its index has file names that are too long")
        elif len(weight_files) == 1:  # a single file under another name
            names = weight_files
        arrays: dict[str, mx.array] = {}
        for name in names:
            if not files.is_file(folder / name):
                raise FileNotFoundError(2, "No such file or directory", name)
            arrays |= load_arrays(folder / name)
        return arrays
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {error.filename}", _choose_remedy(folder)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if device_errors.classify_device_error(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"the weights in {folder} are damaged: {reason}", "copy or download them again."
        ) from error


def _choose_remedy(folder: Path) -> str:
    """Remedy for a folder without safetensors, based on the files that it does have."""
    if files.list_matching(folder, "pytorch_model*.bin"):
        return "its pytorch_model.bin is a pickle, which can run code: convert it to safetensors."
    if files.exists(folder / ADAPTER_FILE):
        return (
            f"{ADAPTER_FILE} is a LoRA adapter: merge it into its base model, and save the result."
        )
    for file_name in ("tf_model.h5", "flax_model.msgpack"):
        if files.exists(folder / file_name):
            return f"{file_name} is not supported: save it as safetensors with transformers."
    return "copy or download the complete folder again."


def _mismatch_error(folder: Path) -> UserError:
    return UserError(
        f"the weights in {folder} do not match its config.json",
        "copy or download the complete folder again.",
    )


def write_gpt2_config(folder: Path, config: ModelConfig, bos: int | None, **extra: Any) -> None:
    """Write GPT-2's config.json for transformers and mlx-lm.

    Args:
        bos: end-of-text token, which is both BOS and EOS; None if there is none.
        extra: additional entries.
    """
    shape = asdict(config)
    tree = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{name: shape[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # required by mlx-lm
        "n_inner": None,
        "activation_function": GELU_TANH_NAMES[0],
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "bos_token_id": bos,
        "eos_token_id": bos,
        "torch_dtype": "float32",
        **extra,
    }
    write_config_json(folder, tree)


def write_generation_config(folder: Path, eos: int | None) -> None:
    """Write generation_config.json: the token that ends a text."""
    text = json.dumps({"bos_token_id": eos, "eos_token_id": eos}, indent=2) + "\n"
    files.write_atomically(folder / "generation_config.json", text)


def write_config_json(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write config.json from a dictionary."""
    files.write_atomically(folder / CONFIG_JSON, json.dumps(tree, indent=2) + "\n")


def write_gpt2_parameters(
    folder: Path, config: ModelConfig, parameters: dict[str, mx.array]
) -> None:
    """Write model.safetensors: names without prefix, no output head, matrices as [in, out], zeros
    for missing biases.
    """
    arrays = {}
    for name, value in add_zero_biases(config, parameters).items():
        needs_transpose = value.ndim == 2 and name.endswith(LINEAR_WEIGHTS)
        arrays[name] = mx.contiguous(value.T) if needs_transpose else value
    save_arrays(folder / WEIGHTS_FILE, arrays, {"format": "pt"})


def add_zero_biases(config: ModelConfig, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    """Add zero biases to a model without biases, as other GPT-2 implementations require them."""
    if config.bias:
        return parameters
    complete = {}
    for name, value in parameters.items():
        complete[name] = value
        if name not in ("wte.weight", "wpe.weight"):
            complete[name.removesuffix("weight") + "bias"] = mx.zeros(value.shape[:1])
    return complete
