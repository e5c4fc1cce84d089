"""Byte-level BPE (Radford et al., 2019): trained with `tokenizers`, encoded with `tiktoken`.

A vocabulary consists of 256 bytes, one token per merge, in order, and end-of-text; GPT-2 has 50,000
merges. Text is first split by GPT-2's pattern, and merges never cross a split. Imported tokenizers
may have added tokens, and ids in another order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.data import http
from mlxgpt.data.tokenizers.base import (
    END_OF_TEXT,
    NUL,
    AddedToken,
    AddedTokens,
    build_bpe_json,
    tokens_by_id,
)
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

Merge = tuple[bytes, bytes]


@functools.cache
def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's mapping from bytes to their characters in tokenizer.json, in order of the first 256
    ids: printable Latin-1 as itself, the others from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    unprintable = [byte for byte in range(256) if byte not in printable]
    byte_to_char = {byte: chr(byte) for byte in printable}
    return byte_to_char | {byte: chr(256 + n) for n, byte in enumerate(unprintable)}


class BPETokenizer:
    """Byte-level BPE with GPT-2's pattern; lossless for any text.

    Args:
        merges: pairs of tokens to merge, in order of priority.
        ids: ids of the bytes, in GPT-2's order, and of the merges; default: 0, 1, 2, ….
        added_tokens: all other tokens; default: end-of-text, with the next id.
        end_of_text: id of the added token that ends a document; None if there is none.

    Attributes:
        tokens: the 256 bytes, then the result of each merge.
    """

    def __init__(
        self,
        merges: Iterable[Merge],
        *,
        ids: Sequence[int] | None = None,
        added_tokens: Sequence[AddedToken] | None = None,
        end_of_text: int | None = None,
    ) -> None:
        self.merges = list(merges)
        self.tokens = [bytes([byte]) for byte in bytes_to_unicode()]
        self.tokens += [left + right for left, right in self.merges]
        size = len(self.tokens)
        if len(set(self.tokens)) < size:
            raise ValueError("two merges produce the same token")
        self.end_of_text: int | None = end_of_text
        if added_tokens is None:
            self.end_of_text, added_tokens = size, [AddedToken(size, END_OF_TEXT)]
        self.added_tokens = AddedTokens(added_tokens)
        ids_by_rank = list(range(size) if ids is None else ids)
        added_pairs = [(token.id, token.content.encode()) for token in self.added_tokens.tokens]
        pairs = [*zip(ids_by_rank, self.tokens, strict=True), *added_pairs]
        self._bytes_by_id = tokens_by_id(pairs)
        default_added_tokens = [AddedToken(size, END_OF_TEXT)]
        # The fingerprint of tokenizers with default ids must not change.
        self._has_default_ids = (
            ids_by_rank == [*range(size)] and self.added_tokens.tokens == default_added_tokens
        )
        # tiktoken uses ranks as ids, with end-of-text last.
        self._ids_by_rank = np.array([*ids_by_rank, self.end_of_text or 0], dtype=np.uint32)
        self._thread_local = threading.local()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added tokens."""
        return len(self._bytes_by_id)

    def encode(self, text: str) -> np.ndarray:
        """Encode text: ids, int64 [n]. Special tokens in it are encoded as ordinary text."""
        with _wrap_tiktoken_errors():
            return self.added_tokens.encode(text, self._encode)

    def encode_documents(self, text: str) -> np.ndarray:
        """Encode joined documents: uint32 [n]; each NUL becomes end-of-text. Releases the GIL."""
        with _wrap_tiktoken_errors():
            return self.added_tokens.encode(text, self._encode_documents)

    def _encode(self, text: str) -> np.ndarray:
        ranks = np.array(self._encoding.encode_ordinary(text), dtype=np.int64)
        return ranks if self._has_default_ids else self._ids_by_rank[ranks].astype(np.int64)

    def _encode_documents(self, text: str) -> np.ndarray:
        allowed_special = set() if self.end_of_text is None else {NUL}
        ranks: np.ndarray = self._encoding.encode_to_numpy(
            text, allowed_special=allowed_special, disallowed_special=frozenset()
        )
        return ranks if self._has_default_ids else self._ids_by_rank[ranks]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; special tokens are decoded to their names, and invalid UTF-8, such
        as an incomplete character, to U+FFFD.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Bytes of one token."""
        return self._bytes_by_id[id]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that affects how text is encoded."""
        fields: list[Any] = ["bpe", *(f"{left.hex()} {right.hex()}" for left, right in self.merges)]
        if not self._has_default_ids:
            fields += [
                self._ids_by_rank[:-1].tolist(),
                *self.added_tokens.fingerprint_fields(self.end_of_text),
            ]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    def to_json(self) -> str:
        """Contents of tokenizer.json for Hugging Face's `tokenizers` and `transformers`."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        spellings = map(token_bytes_to_string, self.tokens)
        vocab = dict(zip(spellings, self._ids_by_rank[:-1].tolist(), strict=True))
        return build_bpe_json(
            self.added_tokens.to_tree(self.end_of_text),
            pre_tokenizer=byte_level,
            decoder=byte_level,
            ignore_merges=False,
            vocab=dict(sorted((vocab | self.added_tokens.ids).items(), key=lambda item: item[1])),
            merges=[
                [token_bytes_to_string(left), token_bytes_to_string(right)]
                for left, right in self.merges
            ],
        )

    @classmethod
    def from_json_merges(cls, merges: Sequence[Sequence[str]]) -> BPETokenizer:
        """Make a tokenizer with default ids from merges as written in tokenizer.json."""
        return cls(parse_merges(merges))

    @property
    def _encoding(self) -> Any:
        """Thread-local tiktoken encoding: threads that share one block each other."""
        if not hasattr(self._thread_local, "encoding"):
            import tiktoken
            from tiktoken_ext.openai_public import r50k_pat_str

            self._thread_local.encoding = tiktoken.Encoding(
                "mlxgpt",
                pat_str=r50k_pat_str,
                mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
                special_tokens={NUL: len(self.tokens)},
            )
        return self._thread_local.encoding


@contextlib.contextmanager
def _wrap_tiktoken_errors() -> Iterator[None]:
    """Convert errors of tiktoken's regex on very long whitespace (1M spaces) to UserError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError) or type(error).__name__ == "PanicException":
            raise UserError(
                "the text has a run of whitespace that is too long to encode",
                "shorten runs of more than about a million spaces or newlines.",
            ) from error
        raise


TRAINER_SCRIPT = Path(__file__).with_name("bpe_trainer.py")
DEFAULT_VOCAB_SIZE = 4096


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE with at most `vocab_size` tokens, including end-of-text; fewer if no
    pairs are left to merge.

    Raises:
        UserError: if `vocab_size` is too small for all bytes, or the training process fails.
    """
    check_vocab_size(vocab_size)
    # A new session, so that Ctrl-C in the terminal reaches this process only.
    with subprocess.Popen(
        [sys.executable, "-P", TRAINER_SCRIPT, str(vocab_size - 1)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as trainer:
        assert trainer.stdin
        assert trainer.stdout
        try:
            with contextlib.suppress(BrokenPipeError):
                for text in chain(texts, [None]):
                    trainer.stdin.write(json.dumps(text).encode() + b"\n")
                trainer.stdin.flush()
            output = trainer.stdout.read()
            trainer.wait()
        finally:
            trainer.kill()
            with contextlib.suppress(BrokenPipeError):
                trainer.stdin.close()
    if not output.endswith(b"\n"):
        raise UserError(
            f"BPE training failed: its process exited with code {trainer.returncode}",
            "close other programs to free memory, and run the same command again.",
        )
    return BPETokenizer.from_json_merges(json.loads(output))


MIN_VOCAB_SIZE = 257  # all bytes, and end-of-text


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError if a vocabulary is too small for all bytes."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size = {vocab_size} is too small for byte-level BPE",
            f"use {MIN_VOCAB_SIZE} or more, for the 256 bytes and the end-of-text token.",
        )


GPT2_VOCAB_SIZE = 50257
GPT2_DOWNLOAD_TIMEOUT_SECONDS = 60.0  # for two files, 1.5 MB


@functools.cache
def load_gpt2_tokenizer() -> BPETokenizer:
    """Load the GPT-2 tokenizer, which tiktoken downloads and caches (TIKTOKEN_CACHE_DIR).

    Raises:
        UserError: if it is not cached and could not be downloaded.
    """
    import tiktoken

    try:  # tiktoken itself has no timeout
        encoding = http.run_with_timeout(
            GPT2_DOWNLOAD_TIMEOUT_SECONDS, lambda: tiktoken.get_encoding("gpt2")
        )
    except Exception as error:  # any error of its transport
        if isinstance(error, OSError) and error.errno in files.REMEDIES:
            cache_folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "the tiktoken cache"))
            raise files.to_user_error(error, "use", cache_folder) from error
        reason = "" if isinstance(error, http.DownloadError) else f": {type(error).__name__}"
        raise UserError(
            f"the GPT-2 tokenizer could not be downloaded{reason}",
            "check the connection; or use --tokenizer bpe, which is trained on your data.",
        ) from error
    tokens = map(encoding.decode_single_token_bytes, range(GPT2_VOCAB_SIZE - 1))
    return BPETokenizer(_recover_merges(list(tokens)))


def _recover_merges(tokens: Sequence[bytes]) -> Iterator[Merge]:
    """Recover the merges of a byte-level BPE from its tokens, in order: the earlier merges reduce
    each token to two parts, which are the merged pair.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens[256:]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [left + right for left, right in pairwise(parts)]
            first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            parts[first : first + 2] = [pairs[first]]
        left, right = parts
        yield left, right


def token_bytes_to_string(token: bytes) -> str:
    """Convert a token's bytes to its string in tokenizer.json and vocab.json."""
    byte_to_char = bytes_to_unicode()
    return "".join(byte_to_char[byte] for byte in token)


def parse_merges(merges: Iterable[Sequence[str]]) -> list[Merge]:
    """Parse merges as written in tokenizer.json and merges.txt.

    Raises:
        KeyError: for a character that represents no byte.
        ValueError: if a merge is not a pair of tokens.
    """
    char_to_byte = {char: byte for byte, char in bytes_to_unicode().items()}

    def parse_token(spelling: str) -> bytes:
        return bytes(char_to_byte[char] for char in spelling)

    return [(parse_token(left), parse_token(right)) for left, right in merges]
