"""Train a byte-level BPE; run as a script in a separate process.

`tokenizers` trains in native code for seconds to minutes and ignores signals meanwhile. A separate
process can be killed, so that Ctrl-C stops the training immediately.

    stdin     one JSON string per line, then null; kept open until the end
    stdout    the merges, as in tokenizer.json
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, FixedLength, Sequence
from tokenizers.trainers import BpeTrainer

MAX_RUN_BYTES = 1000  # training time is quadratic in the length of an unbroken run of letters


def make_pre_tokenizer() -> Any:
    """GPT-2's byte-level pre-tokenizer; runs longer than `MAX_RUN_BYTES` are split."""
    return Sequence([ByteLevel(add_prefix_space=False), FixedLength(MAX_RUN_BYTES)])


def learn_merges(texts: Iterable[str], vocab_size: int) -> list[list[str]]:
    """Train a BPE: merges for at most `vocab_size` tokens, including the 256 bytes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = make_pre_tokenizer()
    trainer = BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges


def _read_texts() -> Iterator[str]:
    for line in sys.stdin.buffer:
        text = json.loads(line)
        if text is None:
            threading.Thread(target=_exit_with_parent, daemon=True).start()
            return
        yield text
    os._exit(1)  # the parent process ended before the last text


def _exit_with_parent() -> None:
    """Exit when stdin is closed, which means that the parent process has ended."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    print(json.dumps(learn_merges(_read_texts(), int(sys.argv[1]))))
