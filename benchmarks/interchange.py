"""GPT-2's size, from a folder to text, beside transformers: import, first token, tokens/s, memory.

TIKTOKEN_CACHE_DIR=... python benchmarks/interchange.py

Weights are random, since speed does not depend on them; each measurement in a fresh process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS, ROUNDS = 64, 5
PROMPT = "Alan Turing theorized that computers would one day become"

MAKE = """
import mlxgpt, sys
from pathlib import Path
from mlxgpt.config import ModelConfig
from mlxgpt.corpus import bpe
from mlxgpt.interchange import huggingface, tokenizers
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
config, folder = ModelConfig(vocab_size=50257), Path("gpt2")
folder.mkdir()
huggingface.write_config(folder, config, 50256)
huggingface.write_parameters(folder, config, flatten_params(GPT(config).parameters()))
tokenizers.write(folder, bpe.gpt2(), 1024, add_bos_token=False)
"""
IMPORT = """
import json, time; began = time.perf_counter()
import mlxgpt
from mlxgpt.machine import device
mlxgpt.import_model("gpt2")
print(json.dumps({"seconds": time.perf_counter() - began, "peak": device.peak_bytes()}))
"""
OURS = f"""
import json, time; began = time.perf_counter()
import mlxgpt
from mlxgpt.machine import device
first = []
def stream(piece):
    if piece != {PROMPT!r}:
        first.append(time.perf_counter() - began)
given = {{"max_tokens": {TOKENS}, "temperature": 0.0, "stream": stream}}
made = mlxgpt.generate({PROMPT!r}, run="gpt2", **given)
found = {{"first": first[0], "rate": made.tokens_per_second, "peak": device.peak_bytes()}}
print(json.dumps(found))
"""
THEIRS = f"""
import json, time, warnings; began = time.perf_counter()
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("gpt2")
model = AutoModelForCausalLM.from_pretrained("gpt2")
ids = tokenizer({PROMPT!r}, return_tensors="pt")
class Clock:
    times = []
    def put(self, value): self.times.append(time.perf_counter())
    def end(self): pass
clock = Clock()
with torch.no_grad():
    model.generate(**ids, do_sample=False, min_new_tokens={TOKENS}, max_new_tokens={TOKENS},
                   pad_token_id=50256, streamer=clock)
drawn = clock.times[1:]  # the first is the prompt
rate = (len(drawn) - 1) / (drawn[-1] - drawn[0])
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
peak = 1024 * int(peak[0].split()[1]) if peak else 0
print(json.dumps({{"first": drawn[0] - began, "rate": rate, "peak": peak}}))
"""


def ran(code: str, folder: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ran(MAKE, folder)
        weights = (Path(folder) / "gpt2" / "model.safetensors").stat().st_size
        found = ran(IMPORT, folder)
        print(f"weights {weights / 1e6:,.0f} MB; import {found['seconds']:.1f} s, ", end="")
        print(f"peak {found['peak'] / weights:.2f} × the weights")
        rounds: dict[str, list[dict[str, float]]] = {"mlxgpt": [], "transformers": []}
        for _ in range(ROUNDS):
            for name, code in (("mlxgpt", OURS), ("transformers", THEIRS)):
                rounds[name].append(ran(code, folder))
        for name, results in rounds.items():
            print(name, end=": ")
            for key, unit, scale in (
                ("first", "s to the first token", 1.0),
                ("rate", "tokens/s", 1.0),
                ("peak", "× the weights at most", weights),
            ):
                values = sorted(result[key] / scale for result in results)
                spread = f"({values[0]:.2f} to {values[-1]:.2f})"
                print(f"{statistics.median(values):.2f} {unit} {spread}", end="; ")
            print()


if __name__ == "__main__":
    main()
