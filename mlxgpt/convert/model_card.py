"""Model card (README.md) of an exported model: architecture, training data, usage."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxgpt.config import ModelConfig
from mlxgpt.convert import qwen3
from mlxgpt.data.tokenizers.base import end_of_text_token
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError


def render_model_card(run: Run, step: int, runtime: str, bits: int | None) -> str:
    """Render the model card of a run as Markdown.

    Args:
        step: training step of the exported checkpoint.
        runtime: target of the export, one of RUNTIMES in exporting.py.
        bits: bits per weight; None: float32.
    """
    m, best = run.config.model, run.best()
    eos = (end_of_text_token(run.tokenizer) or "").replace("|", r"\|")
    rows = {
        "parameters": f"{count_parameters(m):,}: {m.n_layer} layers, {m.n_head} heads, "
        f"embedding dimension {m.n_embd}, context length {m.block_size:,}",
        "architecture": describe_architecture(m),
        "weights": f"{bits} bits" if bits else "float32",
        "vocabulary": f"{run.tokenizer.vocab_size:,} tokens",
        "start token": f"`{eos}`" if run.bos is not None else "none",
    }
    if run.data_name:
        names = ", ".join(Path(source).name for source in run.config.data.source)
        rows["trained on"] = f"{run.data_name} ({names}), {step:,} steps"
    if best and best["step"] == step:
        rows["validation loss"] = f"{best['val_loss']:.4f} {run.config.loss_unit}"
    if run.origin:
        rows["initialized from"] = ", ".join(f"{key} {value}" for key, value in run.origin.items())
    return "\n".join(
        [
            f"# {run.name}",
            "",
            f"A {'GPT-2' if m.position == 'learned' else 'GPT'}, exported by mlxgpt.",
            "",
            *_render_table(rows),
            "",
            "## Usage",
            "",
            _render_commands(run, runtime),
            "",
        ]
    )


def render_adapter_card(run: Run, base: Run, step: int, runtime: str) -> str:
    """Render the model card of a run's adapters as Markdown.

    Args:
        base: the run that they belong to.
        step: training step of the exported checkpoint.
        runtime: target of the export, one of ADAPTER_RUNTIMES in exporting.py.
    """
    rows = {
        "adapters": run.config.lora.describe(run.config.model.n_layer),
        "base model": f"{base.name}, step {run.origin['step']:,}, SHA-256 {run.origin['sha256']}",
        "trained on": f"{run.data_name}, {step:,} steps" if run.data_name else "imported",
    }
    is_on_hub = "hub" in base.origin
    return "\n".join(
        [
            f"# {run.name}",
            "",
            "Adapters of a language model, exported by mlxgpt. They need the base model"
            + ("." if is_on_hub else f": `mlxgpt export {base.name} --to hf`."),
            "",
            *_render_table(rows),
            "",
            "## Usage",
            "",
            _render_commands(run, runtime, base),
            "",
        ]
    )


LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained({model})
"""
LOAD_ADAPTERS = f"""from peft import PeftModel
{LOAD}{{resize}}model = PeftModel.from_pretrained(model, ".")
"""
CONTINUE = """ids = tokenizer({literal}, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens={new}, do_sample=True)[0]))
"""
ANSWER = """messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens={new}, do_sample=True)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
MLX_LM_CONTINUE = (
    "```\nmlx_lm.generate --model {folder}{adapters} --prompt {shell} --max-tokens {new} "
    "--ignore-chat-template\n```\n"
)
MLX_LM_CHAT = """```
mlx_lm.chat --model {folder}{adapters}
```
"""
RUN_COMMANDS = {
    "peft": f"```python\n{LOAD_ADAPTERS}{CONTINUE}```\n",
    "hf": f"```python\n{LOAD}{CONTINUE}```\n\nThe same folder also works with mlx-lm:\n\n"
    + MLX_LM_CONTINUE,
    "mlx-lm": MLX_LM_CONTINUE,
    "gguf": """```
llama-cli -m {name}.gguf -no-cnv -p {shell} -n {new}
```

With Ollama (not tested; neither is LM Studio):

```
ollama create {name} -f Modelfile && ollama run {name} {shell}
```
""",
}
# For runs with a chat template: llama-cli then chats by default (llama.cpp, pull request 11214).
CHAT_COMMANDS = {
    "peft": f"```python\n{LOAD_ADAPTERS}{ANSWER}```\n",
    "hf": f"```python\n{LOAD}{ANSWER}```\n\nThe same folder also works with mlx-lm:\n\n"
    + MLX_LM_CHAT,
    "mlx-lm": MLX_LM_CHAT,
    "gguf": """```
llama-cli -m {name}.gguf
```
""",
}
EXAMPLE_NEW_TOKENS = 100  # at most, in the example commands


def _render_commands(run: Run, runtime: str, base: Run | None = None) -> str:
    """Example commands that run the model, with a prompt and length that fit its context.

    Args:
        base: the run whose exported model is needed, too; None if the folder contains a whole one.
    """
    block_size, has_bos = run.config.model.block_size, run.bos is not None
    prompt = choose_example_prompt(run, max(1, block_size // 2 - has_bos))
    prompt_tokens = len(run.tokenizer.encode(prompt)) + has_bos
    literal = json.dumps(prompt, ensure_ascii=False)
    folder = str(base.origin.get("hub", f"../{base.name}-hf")) if base else "."
    has_new_tokens = base is not None and run.tokenizer.vocab_size > base.tokenizer.vocab_size
    values = {
        "name": shlex.quote(run.name),
        "literal": literal,
        "shell": literal if re.fullmatch(r"[\w ,.:;?'-]+", prompt) else shlex.quote(prompt),
        "new": min(EXAMPLE_NEW_TOKENS, max(1, block_size - prompt_tokens)),
        "model": json.dumps(folder, ensure_ascii=False),
        "folder": shlex.quote(folder),
        "adapters": " --adapter-path ." if base else "",
        "resize": "model.resize_token_embeddings(len(tokenizer))\n" if has_new_tokens else "",
    }
    commands = CHAT_COMMANDS if run.has_chat_template else RUN_COMMANDS
    return commands[runtime].format(**values).rstrip()


DEFAULT_PROMPT = "Once upon a time"  # if a run has no usable sample
EXAMPLE_PROMPT_CHARS = 24  # at most


def choose_example_prompt(run: Run, max_tokens: int) -> str:
    """Choose a prompt of at most `max_tokens` tokens that the run's tokenizer can encode: the start
    of the newest sample, else DEFAULT_PROMPT, else a single character of the vocabulary.
    """
    samples = [text for _, text in run.samples(max_chars=200)][-1:]
    lines = [line.strip() for text in samples for line in text.splitlines()]
    for text in (*filter(None, lines), DEFAULT_PROMPT):
        if len(text) > EXAMPLE_PROMPT_CHARS:
            text = text[:EXAMPLE_PROMPT_CHARS].rpartition(" ")[0] or text[:EXAMPLE_PROMPT_CHARS]
        with contextlib.suppress(UserError):
            is_plain = text.isprintable() and "\ufffd" not in text and not text.startswith("-")
            if is_plain and len(run.tokenizer.encode(text)) <= max_tokens:
                return text
    characters = run.tokenizer.characters if isinstance(run.tokenizer, CharTokenizer) else "a"
    return min(
        characters, key=lambda character: (not character.isalnum(), not character.isprintable())
    )


def describe_architecture(m: ModelConfig) -> str:
    """Describe a model's architecture in a line."""
    if not qwen3.differs_from_gpt2(m):
        parts = "learned position embeddings, pre-LayerNorm, GELU, tied output head"
        return f"GPT-2: {parts}{'' if m.bias else '; no biases'}"
    head = "untied output head" if qwen3.has_untied_head(m) else "tied output head"
    if not qwen3.find_incompatible_settings(m):
        return f"Qwen3: rotary embeddings (RoPE), RMSNorm, QK norm, SwiGLU, {head}"
    optional_parts = {
        "QK norm": m.qk_norm,
        "value embeddings": m.value_embeddings,
        "smeared embeddings": m.smear,
        "shifted keys": m.token_shift,
    }
    all_parts = [
        "rotary embeddings (RoPE)" if m.position == "rope" else "learned position embeddings",
        "RMSNorm" if m.norm == "rms" else "LayerNorm",
        {"gelu": "GELU", "relu2": "squared ReLU", "swiglu": "SwiGLU"}[m.mlp],
        *(name for name, is_used in optional_parts.items() if is_used),
        head,
    ]
    return f"GPT: {', '.join(all_parts)}"


def _render_table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
