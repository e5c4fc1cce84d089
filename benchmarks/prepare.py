"""How fast documents become tokens, and in how much memory: `mlxgpt prepare` with GPT-2's encoding,
against one tiktoken thread fed by `datasets.map` (as nanoGPT prepares OpenWebText), on the same
text in the same run, each in a fresh process.

    python benchmarks/prepare.py [STORIES.txt] [--megabytes 500]

The text is the storybook's, none of it repeated, and the stories of a file besides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import json, resource, sys, time
import datasets, numpy as np, tiktoken
source, folder = sys.argv[1:]
encoding = tiktoken.get_encoding("gpt2")
data = datasets.load_dataset("json", data_files=source, cache_dir=folder, split="train")
def encode(row):
    ids = encoding.encode_ordinary(row["text"])
    ids.append(encoding.eot_token)
    return {"ids": ids, "len": len(ids)}
began = time.perf_counter()
rows = data.map(encode, remove_columns=["text"], num_proc=1)
mapped = time.perf_counter() - began
ids = np.memmap(folder + "/train.bin", dtype=np.uint16, mode="w+", shape=(int(sum(rows["len"])),))
at = 0
for n in range(256):
    shard = rows.shard(num_shards=256, index=n, contiguous=True).with_format("numpy")
    block = np.concatenate(shard["ids"])
    ids[at : at + len(block)] = block
    at += len(block)
ids.flush()
print(json.dumps({"mapped": mapped, "seconds": time.perf_counter() - began, "tokens": int(at)}))
"""
OURS = """
import json, resource, sys, time
import mlxgpt
began = time.perf_counter()
data = mlxgpt.prepare(sys.argv[1], tokenizer=sys.argv[3], vocab_size=None, data_dir=sys.argv[2])
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokens = data.meta.train.tokens + data.meta.val.tokens
print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens, "memory": most}))
"""


def run(code: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(path: Path, megabytes: float, stories: Path | None) -> int:
    """The text as JSON lines, and how many bytes of text there are."""
    from mlxgpt.corpus import storybook

    size = 0
    with path.open("w", encoding="utf-8") as file:
        documents = stories.read_text(encoding="utf-8").split("<|endoftext|>") if stories else []
        for texts in (documents, storybook.stories(0, size=int(1e6 * megabytes))):
            for text in texts:
                if text.strip():
                    file.write(json.dumps({"text": text.strip("\n")}, ensure_ascii=False) + "\n")
                    size += len(text.strip("\n").encode("utf-8"))
    return size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stories", nargs="?", type=Path)
    parser.add_argument("--megabytes", type=float, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.jsonl"
        began = time.perf_counter()
        size = write(source, given.megabytes, given.stories)
        print(f"{size / 1e6:,.0f} MB of text, written in {time.perf_counter() - began:,.0f} s")
        ours = run(OURS, str(source), f"{folder}/ours", "gpt2")
        trained = run(OURS, str(source), f"{folder}/ours", "bpe")
        peer = run(PEER, str(source), f"{folder}/peer")
        again = run(OURS, str(source), f"{folder}/again", "gpt2")  # how much the machine wavers
    for name, seconds in (
        ("mlxgpt, gpt2", ours["seconds"]),
        ("mlxgpt, gpt2, once more at the end", again["seconds"]),
        ("mlxgpt, a BPE of 4096, its training included", trained["seconds"]),
        ("datasets.map, the map alone", peer["mapped"]),
        ("datasets.map and the array", peer["seconds"]),
    ):
        print(f"{name:46}{seconds:8.1f} s{size / 1e6 / seconds:8.2f} MB/s")
    for name, seconds in (("map alone", peer["mapped"]), ("map and array", peer["seconds"])):
        slower = max(ours["seconds"], again["seconds"])
        print(f"ratio of the slower one to {name:19}{seconds / slower:8.2f} ×")
    print(f"tokens: {ours['tokens']:,} against {peer['tokens']:,} (documents are stripped)")
    print(f"memory, resident at most: {max(ours['memory'], trained['memory']) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
