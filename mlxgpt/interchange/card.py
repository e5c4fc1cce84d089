"""The README.md of an exported model: what it is, what it was trained on, how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxgpt.config import ModelConfig
from mlxgpt.model.counting import count_parameters
from mlxgpt.storage.run import Run

COMMANDS = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100, do_sample=True)[0]))
```

The same folder runs in mlx-lm: `mlx_lm.generate --model . --prompt "Once upon a time"`.
""",
    "mlx-lm": """```
mlx_lm.generate --model . --prompt "Once upon a time" --ignore-chat-template
```
""",
    "gguf": """```
llama-cli -m {name}.gguf -no-cnv -p "Once upon a time"
ollama create {name} -f Modelfile && ollama run {name} "Once upon a time"
```
""",
}


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
        "texts begin": "with `<\\|endoftext\\|>`"
        if run.add_bos_token
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
            COMMANDS[to].format(name=run.name).rstrip(),
            "",
        ]
    )


def _architecture(m: ModelConfig) -> str:
    if m.position == "rope":
        return (
            "Qwen3's: rotary positions, RMS norms, normalised queries and keys, SwiGLU, tied head"
        )
    without = "" if m.bias else "; without biases, which are zeros here"
    return f"GPT-2: learned positions, pre-LayerNorm, GELU, tied head{without}"


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
