"""GGUF export, for llama.cpp; Ollama and LM Studio also load GGUF files (not tested).

Weights are float32 unless quantized. llama.cpp's GPT-2 requires biases, so a model without them
gets zeros. Models with the modern recipe are written in Qwen3's layout. Does not depend on runs.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxgpt.backend.ops import NORM_EPS
from mlxgpt.config import ModelConfig
from mlxgpt.convert import qwen3
from mlxgpt.convert.huggingface import LM_HEAD
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.model.parameters import VOCAB_MATRICES
from mlxgpt.model.rope import ROPE_BASE
from mlxgpt.model.stats import mlp_width
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

QUANT_TYPES = {8: "Q8_0", 4: "Q4_0"}  # bits per weight -> llama.cpp's quantization type


class GGUFVocabulary(NamedTuple):
    """A vocabulary in llama.cpp's format.

    Attributes:
        kind: `gpt2` (byte-level BPE) or `rwkv` (greedy longest match).
        tokens: text of each id, in the escaping of that kind.
        types: gguf's TokenType of each id.
        merges: BPE merges, in the order of their priority.
    """

    kind: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


class GGUFModel(NamedTuple):
    """Content of a GGUF file.

    Attributes:
        config: architecture of the model.
        parameters: arrays by dotted name.
        tokenizer: byte-level BPE or characters (ASCII only without an end-of-text token).
        name: model name that programs show.
        add_bos_token: whether llama.cpp puts an end-of-text token before every prompt.
    """

    config: ModelConfig
    parameters: dict[str, mx.array]
    tokenizer: Tokenizer
    name: str
    add_bos_token: bool
    chat_template: str | None = None


def write_gguf(path: Path, model: GGUFModel, bits: int | None = None) -> None:
    """Write a model and its tokenizer to a GGUF file, atomically; an existing file is replaced.

    Unlike mlxgpt, llama.cpp parses special tokens in a prompt. With a character tokenizer it drops
    unknown characters, or rejects them if there is no end-of-text token.

    Args:
        path: GGUF file, in an existing folder.
        bits: 8 (Q8_0) or 4 (Q4_0) bits per weight; embedding and output head always have 8.
            Default: float32.

    Raises:
        UserError: if `gguf` is not installed, n_embd cannot be quantized, llama.cpp does not
            support the tokenizer, or the file cannot be written.
        ValueError: if `add_bos_token` is set, but the tokenizer has no end-of-text token.
    """
    config, tokenizer = model.config, model.tokenizer
    if model.add_bos_token and tokenizer.end_of_text is None:
        raise ValueError("the tokenizer has no end-of-text token")
    if bits is not None:
        _check_quantization(bits, config.n_embd)
    vocabulary = _make_vocabulary(tokenizer, config.vocab_size)
    gguf = _import_gguf()
    scratch = path.with_name(f".{path.name}.new")
    try:
        arch = "gpt2" if config.position == "learned" else "qwen3"
        with (
            files.add_filename_to_errors(path),
            contextlib.closing(gguf.GGUFWriter(scratch, arch)) as writer,
        ):
            writer.add_name(model.name)
            _add_shape(writer, config)
            _add_tokenizer(writer, vocabulary, tokenizer.end_of_text, model.add_bos_token)
            if model.chat_template is not None:
                writer.add_chat_template(model.chat_template)
            _write_tensors(gguf, writer, config, model.parameters, bits)
        files.fsync_path(scratch)
        scratch.replace(path)
        files.fsync_path(path.parent)
    except OSError as error:
        raise files.to_user_error(error, "write", path, "free some space.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def render_modelfile(gguf_name: str, *, end_of_text: str | None) -> str:
    """Render an Ollama Modelfile (not tested) for a GGUF file in the same folder. Its template
    passes the prompt through unchanged.

    Args:
        gguf_name: file name without a folder.
        end_of_text: name of the end-of-text token, if any.
    """
    lines = [f"FROM ./{gguf_name}", 'TEMPLATE "{{ .Prompt }}"', "PARAMETER temperature 0.8"]
    if end_of_text:
        lines.append(f'PARAMETER stop "{end_of_text}"')
    return "\n".join(lines) + "\n"


def fake_quantize_gguf(
    config: ModelConfig, parameters: dict[str, mx.array], bits: int
) -> dict[str, mx.array]:
    """Quantize and dequantize the parameters with llama.cpp's scheme."""
    _check_quantization(bits, config.n_embd)
    gguf = _import_gguf()
    dequantized = {}
    for name, value in parameters.items():
        quant_type = QUANT_TYPES[8 if name in VOCAB_MATRICES else bits]
        if value.ndim == 2 and name != "wpe.weight":
            ggml_type = gguf.GGMLQuantizationType[quant_type]
            packed = gguf.quants.quantize(np.array(value), ggml_type)
            value = mx.array(gguf.quants.dequantize(packed, ggml_type))
        dequantized[name] = value
    return dequantized


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "GGUF export needs the package gguf, which is not installed",
            "install it: pip install 'gguf>=0.19,<1'",
        ) from error
    return gguf


QUANT_BLOCK_SIZE = 32  # values of a row that share a scale, in Q8_0 and Q4_0


def _check_quantization(bits: int, n_embd: int) -> None:
    """Raise UserError for unsupported bits, or if rows do not divide into quantization blocks. Rows
    of every matrix have n_embd, 4 · n_embd, or a multiple of 32 values.
    """
    if bits not in QUANT_TYPES:
        raise UserError(f"weights cannot be quantized to {bits} bits", "use 8 or 4.")
    if n_embd % QUANT_BLOCK_SIZE:
        next_multiple = n_embd // QUANT_BLOCK_SIZE * QUANT_BLOCK_SIZE + QUANT_BLOCK_SIZE
        suggestion = (
            f"{next_multiple - QUANT_BLOCK_SIZE} or {next_multiple}"
            if next_multiple > QUANT_BLOCK_SIZE
            else f"{next_multiple}"
        )
        raise UserError(
            f"n_embd = {n_embd} cannot be quantized: llama.cpp needs a multiple of "
            f"{QUANT_BLOCK_SIZE}",
            f"omit --quantize, or train with a multiple of {QUANT_BLOCK_SIZE}, such as "
            f"n_embd = {suggestion}.",
        )


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(mlp_width(config))
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    if config.position == "learned":
        writer.add_layer_norm_eps(NORM_EPS)
        return
    writer.add_head_count_kv(config.n_head)
    writer.add_key_length(config.n_embd // config.n_head)
    writer.add_value_length(config.n_embd // config.n_head)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPS)


# llama.cpp's BPE requires at least one merge; this one joins two NULs, which no text contains.
PLACEHOLDER_MERGE = "Ā Ā"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf's TokenType


def _make_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GGUFVocabulary:
    """Convert a tokenizer to llama.cpp's format, padded to the model's vocabulary size."""
    tree = json.loads(tokenizer.to_json())
    added = {token.id: token for token in tokenizer.added_tokens.tokens}
    token_ids = tree["model"]["vocab"] | tokenizer.added_tokens.ids
    kind, token_type = "gpt2", NORMAL
    if isinstance(tokenizer, CharTokenizer):
        if tokenizer.end_of_text is None:
            kind = "rwkv"
        else:  # llama.cpp matches user-defined tokens before BPE: make every character one
            token_type = USER_DEFINED
    elif tokenizer.end_of_text is None:
        raise UserError(
            "llama.cpp does not support byte-level BPE without an end-of-text token",
            "export it --to hf, or set eos_token in tokenizer_config.json and import it again.",
        )
    tokens, types = [], []
    for name, token_id in sorted(token_ids.items(), key=lambda item: item[1]):
        tokens.append(_escape_character(name) if kind == "rwkv" else name)
        is_special = token_id in added and added[token_id].special
        types.append(CONTROL if is_special else USER_DEFINED if token_id in added else token_type)
    merges = [" ".join(pair) for pair in tree["model"]["merges"]] or [PLACEHOLDER_MERGE]
    for i in range(vocab_size - len(tokens)):
        tokens.append(r"\xff" * (i + 1) if kind == "rwkv" else f"[PAD{i}]")
        types.append(UNUSED)
    return GGUFVocabulary(kind, tokens, types, merges)


def _escape_character(character: str) -> str:
    """Escape a character for llama.cpp's rwkv vocabulary, the only kind that works without an
    end-of-text token (BPE would use id 11 as one). Its tokenizer loops forever if a text contains
    only the first bytes of a token, so only single-byte tokens are safe.
    """
    if not character.isascii() or len(character) > 1:
        raise UserError(
            f"llama.cpp does not support the token {character!r} without an end-of-text token",
            "train with --tokenizer bpe, which has one.",
        )
    return f"\\x{ord(character):02x}"


def _add_tokenizer(
    writer: Any, vocabulary: GGUFVocabulary, end_of_text: int | None, add_bos_token: bool
) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(vocabulary.merges)
    if end_of_text is not None:
        writer.add_bos_token_id(end_of_text)
        writer.add_eos_token_id(end_of_text)
    writer.add_add_bos_token(add_bos_token)


def _write_tensors(
    gguf: Any,
    writer: Any,
    config: ModelConfig,
    parameters: dict[str, mx.array],
    bits: int | None,
) -> None:
    """Write the tensor infos, then the tensors, converting one at a time to limit memory."""
    file_type = f"MOSTLY_{QUANT_TYPES[bits]}" if bits else "ALL_F32"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    if bits:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = list(_iter_tensors(config, parameters, bits))
    for name, values, quant_type in tensors:
        ggml_type = gguf.GGMLQuantizationType[quant_type]
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        n_bytes = math.prod(values.shape) // block_size * block_bytes
        writer.add_tensor_info(name, values.shape, np.dtype(np.float32), n_bytes, ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values, quant_type in tensors:
        values_f32 = np.array(values.astype(mx.float32))
        ggml_type = gguf.GGMLQuantizationType[quant_type]
        writer.write_tensor_data(gguf.quants.quantize(values_f32, ggml_type))


# GPT-2's tensor name in a layer -> llama.cpp's.
GPT2_TENSORS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# Qwen3's tensor name in a layer -> llama.cpp's.
QWEN3_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _iter_tensors(
    config: ModelConfig, parameters: dict[str, mx.array], bits: int | None
) -> Iterator[tuple[str, mx.array, str]]:
    """Yield (llama.cpp's tensor name, values, quantization type) of each tensor."""
    vocab_type, matrix_type = (QUANT_TYPES[8], QUANT_TYPES[bits]) if bits else ("F32", "F32")
    if config.position == "rope":
        qwen_arrays = qwen3.convert_to_qwen3(config, parameters)
        yield "token_embd.weight", qwen_arrays[qwen3.EMBED_TOKENS], vocab_type
        if LM_HEAD in qwen_arrays:
            yield "output.weight", qwen_arrays[LM_HEAD], vocab_type
        yield "output_norm.weight", qwen_arrays[qwen3.FINAL_NORM], "F32"
        for n in range(config.n_layer):
            for qwen_name, gguf_name in QWEN3_TENSORS.items():
                weight = qwen_arrays[f"model.layers.{n}.{qwen_name}.weight"]
                quant_type = matrix_type if weight.ndim == 2 else "F32"
                yield f"blk.{n}.{gguf_name}.weight", weight, quant_type
        return
    yield "token_embd.weight", parameters["wte.weight"], vocab_type
    yield "position_embd.weight", parameters["wpe.weight"], "F32"
    tensor_names = {
        f"h.{n}.{gpt2_name}": f"blk.{n}.{gguf_name}"
        for n in range(config.n_layer)
        for gpt2_name, gguf_name in GPT2_TENSORS.items()
    }
    for gpt2_name, gguf_name in (tensor_names | {"ln_f": "output_norm"}).items():
        weight = parameters[f"{gpt2_name}.weight"]
        yield f"{gguf_name}.weight", weight, matrix_type if weight.ndim == 2 else "F32"
        bias = parameters.get(f"{gpt2_name}.bias")
        yield f"{gguf_name}.bias", mx.zeros(weight.shape[:1]) if bias is None else bias, "F32"
