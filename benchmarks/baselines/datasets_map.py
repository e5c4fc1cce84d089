"""Data preparation as in nanoGPT: `datasets.map` with a BPE tokenizer trained by `tokenizers`."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from baselines.tasks import Result, Task, compiler_version


def preparation(task: Task) -> Result:
    """Megabytes per second from a text file to a file of token ids, including BPE training."""
    datasets.disable_progress_bars()
    start = time.perf_counter()
    text = Path(task.text).read_text(encoding="utf-8")
    documents = text.split("<|endoftext|>")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=task.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(batch["text"])]}

    dataset = datasets.Dataset.from_dict({"text": documents})
    tokenized = dataset.map(encode, batched=True, remove_columns=["text"])
    ids = np.concatenate(tokenized.with_format("numpy")["ids"][:]).astype(np.uint16)
    ids.tofile(f"{task.folder}/train.bin")
    seconds = time.perf_counter() - start
    packages = ("datasets", "tokenizers")
    environment = {
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "device": "cpu",
        "threads": "as many as cores",
        "BLAS": "–",
        "compiler": compiler_version(),
    }
    speed = len(text.encode()) / 1e6 / seconds
    return {"megabytes_per_second": speed, "made_with": environment}
