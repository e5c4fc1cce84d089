"""Unsupported request fields: rejected if they would change the output, otherwise ignored."""

from __future__ import annotations

import difflib
from typing import Any

from mlxgpt.playground.request_body import (
    ChatCompletionRequest,
    CompletionRequest,
    RequestModel,
    format_value,
)
from mlxgpt.utils.errors import UserError

# Fields of OpenAI, llama.cpp, vLLM, Ollama, mlx-lm, SGLang, TGI and text-generation-webui.
_UNSUPPORTED_NAMES = """
suffix logit_bias tools functions audio prediction web_search_options frequency_penalty
presence_penalty reasoning
n_indent grammar json_schema grammar_lazy grammar_triggers mirostat mirostat_mode dynatemp_range
xtc_probability dry_multiplier top_a n_predict n_keep n_probs n_cmpl min_keep ignore_eos samplers
t_max_predict_ms lora image_data multimodal_data system_prompt input_prefix input_suffix input_extra
post_sampling_probs return_tokens response_fields
use_beam_search stop_token_ids include_stop_str_in_output min_tokens allowed_token_ids bad_words
guided_json guided_regex guided_choice guided_grammar structured_outputs prompt_logprobs
logprob_token_ids prompt_embeds logits_processors return_tokens_as_token_ids return_token_ids
continue_final_message documents chat_template chat_template_kwargs repetition_detection
thinking_token_budget truncate_prompt_tokens vllm_xargs watermarking
options format raw template system context images think num_ctx num_keep num_predict
adapters role_mapping repetition_context_size
regex ebnf structural_tag no_stop_trim stop_regex lora_path custom_logit_processor custom_params
temp max_new_tokens max_gen_toks max_length min_length min_new_tokens no_repeat_ngram_size
smoothing_factor epsilon_cutoff eta_cutoff penalty_alpha ban_eos_token custom_token_bans
sampler_priority sampler_order negative_prompt preset character instruction_template memory
stop_sequence stop_sequences watermark decoder_input_details top_n_tokens until
"""
# Fields that change the output, with neutral values that do not (besides null and empty ones).
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = dict.fromkeys(_UNSUPPORTED_NAMES.split(), ()) | {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "typ_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1,),
    "adaptive_target": (-1,),
    "length_penalty": (1,),
    "rep_pen": (1,),
    "typical": (1,),
    "tfs": (1,),
    "guidance_scale": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "encoder_repetition_penalty": (1,),
}
# Fields that change the output if they are false.
TRUE_ONLY_FIELDS = {
    "add_special_tokens",
    "skip_special_tokens",
    "add_generation_prompt",
    "do_sample",
}

# Fields that do not change the output: metadata, speed, and details of features rejected above.
_IGNORED_NAMES = """
moderation user metadata store service_tier safety_identifier prompt_cache_key
prompt_cache_retention prompt_cache_options parallel_tool_calls
cache_prompt id_slot n_cache_reuse sse_ping_interval frequency_context_size
presence_context_size timings_per_token return_progress repeat_last_n mirostat_tau mirostat_eta
dynatemp_exponent xtc_threshold dry_base dry_allowed_length dry_penalty_last_n
dry_sequence_breakers reasoning_format parse_tool_calls preserved_tokens backend_sampling
spaces_between_special_tokens priority request_id session_id cache_salt include_reasoning
stream_interval kv_transfer_params truncation_side guided_decoding_backend
guided_whitespace_pattern
keep_alive num_batch num_gpu main_gpu num_thread use_mmap use_mlock low_vram numa
draft_model num_draft_tokens separate_reasoning stream_reasoning smoothing_curve early_stopping
ttl
"""
IGNORED_FIELDS = frozenset(_IGNORED_NAMES.split())

REPLACEMENTS = {
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_length": "max_tokens",
    "frequency_penalty": "repetition_penalty",
    "presence_penalty": "repetition_penalty",
    "rep_pen": "repetition_penalty",
    "n_probs": "logprobs",
    "prompt_logprobs": "echo and logprobs",
    "do_sample": "temperature",
    "temp": "temperature",
    "until": "stop",
    "num_return_sequences": "n",
}


SUGGESTION_SIMILARITY = 0.6  # minimum to suggest a name for an unsupported field
TYPO_SIMILARITY = 0.8  # minimum to treat an unknown field as a typo; `temprature` has 0.95


def find_unknown_fields(body: RequestModel) -> list[str]:
    """Return the names of a request's fields that no known server supports.

    Raises:
        UserError: for an unsupported field that would change the output, and for a typo.
    """
    own_fields = list(type(body).model_fields)
    unsupported = {
        *UNSUPPORTED_FIELDS,
        *TRUE_ONLY_FIELDS,
        *CompletionRequest.model_fields,
        *ChatCompletionRequest.model_fields,
    }
    unknown = []
    for name, value in (body.model_extra or {}).items():
        if name in IGNORED_FIELDS or _is_neutral(name, value):
            continue
        suggestion = REPLACEMENTS.get(name) or _closest_name(
            name, own_fields, SUGGESTION_SIMILARITY
        )
        if name in unsupported:
            remedy = f"use {suggestion} or omit it." if suggestion else "omit it."
            raise UserError(f"{name} = {format_value(value)} is not supported", remedy)
        if suggestion := _closest_name(name, own_fields, TYPO_SIMILARITY):
            problem = f"unknown field {format_value(name)}"
            raise UserError(problem, f"did you mean {suggestion}?")
        unknown.append(name)
    return unknown


def _is_neutral(name: str, value: Any) -> bool:
    if name in TRUE_ONLY_FIELDS:
        return value is True
    return not value or (value is not True and value in UNSUPPORTED_FIELDS.get(name, ()))


def _closest_name(name: str, names: list[str], cutoff: float) -> str | None:
    """The most similar name, ignoring case; anagrams come first. None: none is similar enough."""
    lower = name.lower().replace("-", "_")
    anagrams = [candidate for candidate in names if sorted(candidate) == sorted(lower)]
    return next(iter(anagrams or difflib.get_close_matches(lower, names, 1, cutoff)), None)
