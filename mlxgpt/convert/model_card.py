"""The README.md of an exported model: what it is, what it was trained on, how to run it."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxgpt.config import ModelConfig
from mlxgpt.data.tokenizers.char import CharTokenizer, end_name
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

COMMANDS = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer({literal}, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens={new}, do_sample=True)[0]))
```

The same folder runs in mlx-lm:

```
mlx_lm.generate --model . --prompt {shell} --max-tokens {new} --ignore-chat-template
```
""",
    "mlx-lm": """```
mlx_lm.generate --model . --prompt {shell} --max-tokens {new} --ignore-chat-template
```
""",
    "gguf": """```
llama-cli -m {name}.gguf -no-cnv -p {shell} -n {new}
ollama create {name} -f Modelfile && ollama run {name} {shell}
```
""",
}
OPENING = "Once upon a time"  # a prompt, where nothing is known of a model's texts
LONGEST_PROMPT = 24  # characters
MOST_NEW = 100  # tokens


def card(run: Run, step: int, to: str, quantize: int | None) -> str:
    """The card of a run's model, in Markdown.

    Args:
        step: updates it was trained for.
        to: the runtime it is for.
        quantize: bits of its weights; None: float32.
    """
    m, best = run.config.model, run.best()
    rows = {
        "parameters": f"{count_parameters(m):,}: {m.n_layer} layers, {m.n_head} heads, width "
        f"{m.n_embd}, block {m.block_size}",
        "architecture": _architecture(m),
        "weights": f"{quantize} bits" if quantize else "float32",
        "vocabulary": f"{run.tokenizer.vocab_size:,} tokens",
        "texts begin": f"with `{(end_name(run.tokenizer) or '').replace('|', chr(92) + '|')}`"
        if run.bos is not None
        else "without a special token",
    }
    if run.data_name:
        names = ", ".join(Path(source).name for source in run.config.data.source)
        rows["trained on"] = f"{run.data_name} ({names}), {step:,} steps"
    if best and best["step"] == step:
        rows["validation loss"] = f"{best['val_loss']:.4f} nats per token"
    if run.origin:
        rows["begun from"] = ", ".join(f"{key} {value}" for key, value in run.origin.items())
    return "\n".join(
        [
            f"# {run.name}",
            "",
            f"A {'GPT-2' if m.position == 'learned' else 'GPT'}, exported by mlxgpt.",
            "",
            *_table(rows),
            "",
            "## How to run it",
            "",
            _commands(run, to),
            "",
        ]
    )


def _commands(run: Run, to: str) -> str:
    """How to run the model, with a prompt and a length that it has room for."""
    block, bos = run.config.model.block_size, run.bos is not None
    prompt = example_prompt(run, max(1, block // 2 - bos))
    new = min(MOST_NEW, max(1, block - len(run.tokenizer.encode(prompt)) - bos))
    literal = json.dumps(prompt, ensure_ascii=False)
    shell = literal if re.fullmatch(r"[\w ,.:;?'-]+", prompt) else shlex.quote(prompt)
    name = shlex.quote(run.name)
    return COMMANDS[to].format(name=name, literal=literal, shell=shell, new=new).rstrip()


def example_prompt(run: Run, most: int) -> str:
    """A prompt of at most `most` tokens that the run's tokenizer knows: the beginning of the newest
    sample, or else OPENING, or else a character of the vocabulary.
    """
    samples = [text for _, text in run.samples(longest=200)][-1:]
    lines = [line.strip() for text in samples for line in text.splitlines()]
    for text in (*filter(None, lines), OPENING):
        if len(text) > LONGEST_PROMPT:
            text = text[:LONGEST_PROMPT].rpartition(" ")[0] or text[:LONGEST_PROMPT]
        with contextlib.suppress(UserError):
            plain = text.isprintable() and "\ufffd" not in text and not text.startswith("-")
            if plain and len(run.tokenizer.encode(text)) <= most:
                return text
    known = run.tokenizer.characters if isinstance(run.tokenizer, CharTokenizer) else "a"
    return min(known, key=lambda character: (not character.isalnum(), not character.isprintable()))


def _architecture(m: ModelConfig) -> str:
    if m.position == "rope":
        return (
            "Qwen3's: rotary positions, RMS norms, normalised queries and keys, SwiGLU, tied head"
        )
    without = "" if m.bias else "; without biases, which are zeros here"
    return f"GPT-2: learned positions, pre-LayerNorm, GELU, tied head{without}"


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
