"""LoRA and DoRA adapters in the layouts of PEFT and mlx-lm.

| | PEFT | mlx-lm |
|---|---|---|
| weights | adapter_model.safetensors | adapters.safetensors |
| a, b | lora_A.weight [r, I], lora_B.weight [O, r] | lora_a [I, r], lora_b [r, O] |
| norms of DoRA | lora_magnitude_vector | m |
| factor of the adapter's output | lora_alpha / r | scale |

Qwen3 has separate matrices for q, k and v, and for gate and up. The adapter of our fused matrix is
split into adapters that share a; separate adapters are joined into one of the sum of their ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgpt.backend import device_errors
from mlxgpt.backend.ops import rms_norm
from mlxgpt.backend.safetensors_io import load_arrays, save_arrays
from mlxgpt.config import LoRAConfig, ModelConfig
from mlxgpt.convert.huggingface import ADAPTER_FILE
from mlxgpt.model.lora import ADAPTED_LAYERS, row_norms
from mlxgpt.storage.checkpoint import find_non_finite
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
MLX_LM_ADAPTER_FILE = "adapters.safetensors"
# Our matrices -> Qwen3's, which are parts of their rows.
QWEN3_LAYERS: dict[str, tuple[str, ...]] = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}
GPT2_LAYERS: dict[str, tuple[str, ...]] = {name: (name,) for name in ADAPTED_LAYERS}


def find_layers(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our layers of a block, and what they consist of in the exported model."""
    return GPT2_LAYERS if config.position == "learned" else QWEN3_LAYERS


@dataclass(frozen=True)
class AdapterModel:
    """Adapters and the model that they belong to.

    Attributes:
        config: the model.
        lora: rank, scale and kind of the adapters.
        arrays: by mlxgpt's names, as in the checkpoint of a run.
        new_tokens: ids of the tokens whose rows the arrays contain.
        base: name of the base model, for the adapter's config.
    """

    config: ModelConfig
    lora: LoRAConfig
    arrays: Mapping[str, mx.array]
    new_tokens: range
    base: str

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """See `find_layers`."""
        return find_layers(self.config)

    @property
    def blocks(self) -> range:
        """Indices of the blocks with adapters."""
        return self.lora.adapted_blocks(self.config.n_layer)

    def split(self) -> Iterator[tuple[str, dict[str, mx.array]]]:
        """Name in the exported model, and arrays lora_a [I, r], lora_b [r, O] and m [O], of each
        adapter.
        """
        prefix = "h" if self.layers is GPT2_LAYERS else "layers"
        for n in self.blocks:
            for name, parts in self.layers.items():
                our_name = f"h.{n}.{name}"
                b_parts = mx.split(self.arrays[f"{our_name}.lora_b"], len(parts), axis=1)
                for index, (part, b) in enumerate(zip(parts, b_parts, strict=True)):
                    arrays = {"lora_a": self.arrays[f"{our_name}.lora_a"], "lora_b": b}
                    if self.lora.dora:
                        arrays["m"] = mx.split(self.arrays[f"{our_name}.m"], len(parts))[index]
                    yield f"{prefix}.{n}.{part}", arrays


def write_mlx_lm_adapters(folder: Path, model: AdapterModel) -> None:
    """Write adapters.safetensors and adapter_config.json for mlx-lm's --adapter-path.

    Raises:
        UserError: if rows of new tokens were trained, for which mlx-lm has no place.
    """
    if model.new_tokens:
        raise UserError(
            f"{len(model.new_tokens)} new tokens were trained, which mlx-lm's adapters cannot hold",
            "export the fused model: leave out --adapters.",
        )
    config = {
        "fine_tune_type": "dora" if model.lora.dora else "lora",
        "model": model.base,
        "num_layers": len(model.blocks),
        "lora_parameters": {
            "rank": model.lora.lora_rank,
            "scale": model.lora.lora_scale,
            "dropout": 0.0,
            "keys": [part for parts in model.layers.values() for part in parts],
        },
    }
    arrays = {
        f"model.{name}.{kind}": mx.contiguous(value)
        for name, adapter in model.split()
        for kind, value in adapter.items()
    }
    save_arrays(folder / MLX_LM_ADAPTER_FILE, arrays)
    _write_config(folder, config)


# mlx-lm's names of an adapter's arrays -> PEFT's.
PEFT_KINDS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def write_peft_adapters(folder: Path, model: AdapterModel) -> None:
    """Write adapter_model.safetensors and adapter_config.json for PeftModel.from_pretrained."""
    is_gpt2 = model.layers is GPT2_LAYERS
    prefix = f"base_model.model.{'transformer' if is_gpt2 else 'model'}"
    parts = [part for parts in model.layers.values() for part in parts]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.base,
        "r": model.lora.lora_rank,
        "lora_alpha": model.lora.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_gpt2,  # transformers' GPT-2 stores [in, out]
        "use_dora": model.lora.dora,
        "target_modules": sorted({part.rpartition(".")[2] for part in parts}),
        "inference_mode": True,
    }
    if model.lora.lora_layers:
        config["layers_to_transform"] = list(model.blocks)
    arrays = {
        f"{prefix}.{name}.{PEFT_KINDS[kind]}": mx.contiguous(value.T)
        for name, adapter in model.split()
        for kind, value in adapter.items()
    }
    if model.new_tokens:
        rows = {"wte" if is_gpt2 else "embed_tokens": model.arrays["wte.new_rows"]}
        if model.config.embedding_norm:
            rows["embed_tokens"] = rms_norm(rows["embed_tokens"])
        arrays |= {
            f"{prefix}.{name}.token_adapter.trainable_tokens_delta": value
            for name, value in rows.items()
        }
        if not is_gpt2:
            head = model.arrays["wte.new_rows" if model.config.tied else "lm_head.new_rows"]
            rows["lm_head"] = head
            arrays["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] = head
        config["trainable_token_indices"] = {name: list(model.new_tokens) for name in rows}
    save_arrays(folder / ADAPTER_FILE, arrays, {"format": "pt"})
    _write_config(folder, config)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    files.write_atomically(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


# Settings of PEFT's LoraConfig with the only values that are supported; a setting that is missing
# has the first.
PEFT_REQUIREMENTS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    # Others, such as PiSSA, change the base model's weights, too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
MAX_SCALE = 1e6  # more is not plausible
ADAPTER_ARRAY = re.compile(
    r"(?:.*\.)?(?:h|layers)\.(?P<block>\d{1,6})\.(?P<layer>(?:attn|self_attn|mlp)\.\w+)\."
    r"(?P<kind>lora_a|lora_b|m|lora_A|lora_B|lora_magnitude_vector)(\.weight)?"
)


def read_adapters(
    folder: Path, config: ModelConfig, parameters: Mapping[str, mx.array]
) -> tuple[LoRAConfig, dict[str, mx.array]]:
    """Read adapters of PEFT or mlx-lm, as those of a model.

    Args:
        config: the model that they belong to.
        parameters: its weights; DoRA's norms of rows without an adapter are theirs.

    Returns:
        rank, scale and kind; and arrays by mlxgpt's names, float32, as in a run's checkpoint

    Raises:
        UserError: if the adapters cannot be read, are not supported or do not fit the model.
    """
    path = folder / ADAPTER_CONFIG
    try:
        tree = json_files.read_json(path)
        # Some converters to mlx-lm leave PEFT's settings in the config, so the file decides.
        is_peft = files.is_file(folder / ADAPTER_FILE)
        if not is_peft and not files.is_file(folder / MLX_LM_ADAPTER_FILE):
            raise UserError(
                f"{folder} has neither {ADAPTER_FILE} nor {MLX_LM_ADAPTER_FILE}",
                "copy the whole folder; adapter_model.bin is a pickle, which can run code: load "
                "and save the adapter with PEFT, which writes safetensors.",
            )
        scale, is_dora = _read_peft_config(tree) if is_peft else _read_mlx_lm_config(tree)
        if not 0 <= scale <= MAX_SCALE:
            raise ValueError(f"its scale is {scale}")
        arrays = load_arrays(folder / (ADAPTER_FILE if is_peft else MLX_LM_ADAPTER_FILE))
        adapters = _group_arrays(arrays, config)
    except OSError as error:
        raise files.to_user_error(error, "read", path, "copy the whole folder.") from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if device_errors.classify_device_error(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{folder} does not contain valid adapters: {reason}", "copy the folder again."
        ) from error
    if name := find_non_finite(arrays):
        raise UserError(
            f"{name} of {folder} contains non-finite values (NaN or infinity)", "copy it again."
        )
    return _join_adapters(adapters, scale, is_dora, config, parameters)


def _read_peft_config(tree: Mapping[str, Any]) -> tuple[float, bool]:
    for name, allowed in PEFT_REQUIREMENTS.items():
        if (value := tree.get(name, allowed[0])) not in allowed:
            raise UserError(
                f"{ADAPTER_CONFIG}: {name} is {value!r}, which is not supported",
                "merge the adapter into its model with PEFT (merge_and_unload), and import that.",
            )
    rank, alpha = int(tree["r"]), float(tree["lora_alpha"])
    return alpha / (math.sqrt(rank) if tree.get("use_rslora") else rank), bool(tree.get("use_dora"))


def _read_mlx_lm_config(tree: Mapping[str, Any]) -> tuple[float, bool]:
    kind = tree.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(
            f"{ADAPTER_CONFIG}: fine_tune_type is {kind!r}, which is not an adapter",
            "fuse it with mlx_lm.fuse, and import the result.",
        )
    return float(tree["lora_parameters"]["scale"]), kind == "dora"


Adapters = dict[tuple[int, str], dict[str, mx.array]]  # (block, their layer) -> lora_a, lora_b, m


def _group_arrays(arrays: Mapping[str, mx.array], config: ModelConfig) -> Adapters:
    """Group arrays by the layer they adapt, in mlx-lm's orientation."""
    kinds = {name.removesuffix(".weight"): kind for kind, name in PEFT_KINDS.items()}
    parts = {part for parts in find_layers(config).values() for part in parts}
    adapters: Adapters = {}
    for name, value in arrays.items():
        match = ADAPTER_ARRAY.fullmatch(name)
        if not match or match["layer"] not in parts or int(match["block"]) >= config.n_layer:
            raise UserError(
                f"the adapters have {name!r}, which is not a layer of the model",
                "choose the model that they were trained with: --base RUN.",
            )
        adapter = adapters.setdefault((int(match["block"]), match["layer"]), {})
        kind = match["kind"]
        value = value.T if kind in kinds else value
        adapter[kinds.get(kind, kind)] = value.astype(mx.float32)
    return adapters


def _join_adapters(
    adapters: Adapters,
    scale: float,
    is_dora: bool,
    config: ModelConfig,
    parameters: Mapping[str, mx.array],
) -> tuple[LoRAConfig, dict[str, mx.array]]:
    """Join the adapters of parts to those of our layers, all of the same rank."""
    joined: dict[str, tuple[mx.array, mx.array]] = {}
    norms: dict[str, mx.array] = {}
    first_block = min((block for block, _ in adapters), default=0)
    for n in range(first_block, config.n_layer):
        for name, parts in find_layers(config).items():
            weights = mx.split(parameters[f"h.{n}.{name}.weight"], len(parts))
            layer_adapters = [adapters.get((n, part), {}) for part in parts]
            for weight, adapter, part in zip(weights, layer_adapters, parts, strict=True):
                _check_adapter(f"{n}.{part}", adapter, weight, is_dora)
            pairs = [
                (adapter.get("lora_a"), adapter.get("lora_b"), weight.shape[0])
                for adapter, weight in zip(layer_adapters, weights, strict=True)
            ]
            joined[f"h.{n}.{name}"] = _join_parts(pairs, weights[0].shape[1])
            if is_dora:
                norms[f"h.{n}.{name}.m"] = mx.concatenate(
                    [
                        adapter["m"] if adapter else row_norms(weight)
                        for adapter, weight in zip(layer_adapters, weights, strict=True)
                    ]
                )
    rank = max((a.shape[1] for a, _ in joined.values()), default=0)
    if not rank:
        raise UserError("the folder contains no adapters", "copy it again.")
    arrays = dict(norms)
    for name, (a, b) in joined.items():
        padding = rank - a.shape[1]  # zeros change nothing
        arrays[f"{name}.lora_a"] = mx.pad(a, [(0, 0), (0, padding)])
        arrays[f"{name}.lora_b"] = mx.pad(b, [(0, padding), (0, 0)])
    lora = LoRAConfig(
        lora_rank=rank,
        lora_alpha=scale * rank,
        lora_layers=config.n_layer - first_block if first_block else 0,
        dora=is_dora,
    )
    return lora, arrays


def _join_parts(
    parts: list[tuple[mx.array | None, mx.array | None, int]], input_size: int
) -> tuple[mx.array, mx.array]:
    """Join adapters (a [I, r], b [r, O], O) of parts of a matrix's rows to one: of the same rank if
    they share a, else of the sum of their ranks.
    """
    first = parts[0][0]
    if first is not None and all(
        a is not None and a.shape == first.shape and mx.array_equal(a, first) for a, _, _ in parts
    ):
        return first, mx.concatenate([b for _, b, _ in parts if b is not None], axis=1)
    total = sum(size for _, _, size in parts)
    a_parts, b_rows, start = [mx.zeros((input_size, 0))], [mx.zeros((0, total))], 0
    for a, b, size in parts:
        if a is not None and b is not None:
            a_parts.append(a)
            b_rows.append(mx.pad(b, [(0, 0), (start, total - start - size)]))
        start += size
    return mx.concatenate(a_parts, axis=1), mx.concatenate(b_rows)


def _check_adapter(
    name: str, adapter: Mapping[str, mx.array], weight: mx.array, is_dora: bool
) -> None:
    """Check that a layer has no adapter, or all arrays of one, in shapes that fit its weight."""
    if not adapter:
        return
    expected = {"lora_a", "lora_b"} | ({"m"} if is_dora else set())
    output_size, input_size = weight.shape
    rank = adapter["lora_a"].shape[-1] if "lora_a" in adapter else 0
    shapes = {"lora_a": (input_size, rank), "lora_b": (rank, output_size), "m": (output_size,)}
    if adapter.keys() != expected or any(adapter[kind].shape != shapes[kind] for kind in expected):
        raise UserError(
            f"the adapter of {name} does not fit the model",
            "choose the model that it was trained with: --base RUN.",
        )
