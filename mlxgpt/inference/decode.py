"""Prompts -> ids: prefill, cache, one row of new ids after the other.

Each text is drawn as if it were alone: with its own keys, and exactly so where the products of a
batch are rounded as those of a single row are, as on the CPU. An M5's GPU and CUDA round float32 to
TF32 in the former only. Knows a model, nothing of texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution
from mlxgpt.config import Sampling
from mlxgpt.inference.engine import NOT_FINITE, CompiledModel, NotFiniteError, Tokens
from mlxgpt.inference.sampling import SamplerSpec, setting_values
from mlxgpt.model.kv_cache import LayerKV, pad_cache
from mlxgpt.utils.seeds import derive

LARGE = 64_000_000  # bytes of a cache


class BatchDecoder:
    """A batch of texts that are being decoded; see `generate_step`.

    A full cache slides, where the model can: see `GPT.slides`. With learned positions a text's last
    half block is read again instead, from position 0.

    Args:
        texts: of each its prompt's ids, at least one, of which as many as the block holds count,
            the last; and its number, so that those with one prompt are drawn differently.
        end_of_text: no repetition where a prompt began with it and the text ends.
        top: of how many of the likeliest tokens there are probabilities; 0: of none.

    Attributes:
        probabilities: of the row that was read last: see `sampling.top_probabilities`, as lists;
            () without `top`.
    """

    def __init__(
        self,
        model: CompiledModel,
        texts: Sequence[tuple[np.ndarray, int]],
        sampling: Sampling,
        end_of_text: int | None = None,
        top: int = 0,
    ) -> None:
        block = model.config.block_size
        self.model, self.max_tokens = model, sampling.max_tokens
        self.probabilities: tuple[list, ...] = ()
        self._block, self._top = block, min(top, model.vocab_size)
        self._spec = SamplerSpec.of(sampling, model.vocab_size)
        self._values = setting_values(sampling)
        # Of each text the tokens in the window, the seed of its keys, and how many tokens its cache
        # holds.
        self._texts = [prompt[-block:].tolist() for prompt, _ in texts]
        seeds = [derive(sampling.seed or 0, "sample", number) for _, number in texts]
        self._seeds = np.array(seeds, dtype=np.uint64)
        self._filled = np.zeros(len(texts), dtype=np.int32)
        self._longest = max(map(len, self._texts)) + sampling.max_tokens
        self._prompts_seen = self._seen_in([prompt for prompt, _ in texts], end_of_text)
        self._drawn = 0  # tokens of each text that were handed over to the device
        self._rows = deque[Tokens]()  # those of them that were not read yet
        self._full = np.zeros(0, dtype=np.int64)  # texts whose cache was full at the last step
        self._layers: list[LayerKV] = []

    def prefill(self) -> None:
        """Read the prompts, each different one once, and hand over the first row's draw."""
        self._drawn = 1
        prompts = list(dict.fromkeys(map(tuple, self._texts)))
        logits, layers = self.model.prefill(prompts)
        capacity = max(layers[0][0].shape[2], self.model.capacity(self._longest))
        layers = pad_cache(layers, capacity)
        if len(prompts) < len(self._texts):
            places = {prompt: place for place, prompt in enumerate(prompts)}
            each = mx.array([places[tuple(text)] for text in self._texts])
            logits, layers = logits[each], [(k[each], v[each]) for k, v in layers]
        self._layers = layers
        self._filled = np.array([len(text) for text in self._texts], dtype=np.int32)
        draw = self.model.sampler(self._spec, self._top)
        keys = self._keys(np.arange(len(self._texts)))
        self._rows.append(Tokens(*draw(logits, self._prompts_seen, self._values, keys)))
        self._hand_over()

    def step(self) -> None:
        """Hand over the next row's draw; of texts with a full cache it is put right by `refill`."""
        last, filled = self._rows[-1], self._filled
        self._drawn += 1
        if not self.model.slides:
            self._full = np.flatnonzero(filled == self._block)
        if len(self._full) == len(filled):
            self._rows.append(last)
            return
        self._wait_for_large_cache()
        attended = self.model.bucket(int(filled.max()) + 1)
        attended = min(attended, self._layers[0][0].shape[2])
        position = filled[:1] if (filled == filled[0]).all() else filled
        if not self.model.slides:
            position = np.minimum(position, self._block - 1)
        step = self.model.step(self._spec, self._top, attended)
        tokens, self._layers = step(
            last.ids,
            last.seen,
            self._values,
            self._keys(np.arange(len(filled))),
            # Without a name: a cache that is referred to is copied, not written into.
            (self._layers, mx.array(position)),
        )
        self._rows.append(Tokens(*tokens))
        self._filled = filled + 1
        self._hand_over()

    def read(self) -> list[int]:
        """The ids of the oldest row that was not read yet, one for each text.

        Raises:
            NotFiniteError: where a text's logits are not finite.
        """
        self._read = tokens = self._rows.popleft()
        row: list[int] = tokens.ids.tolist()  # type: ignore[assignment]
        if NOT_FINITE in row:
            raise NotFiniteError
        self.probabilities = tuple(array.tolist() for array in tokens.probabilities)  # type: ignore[misc]
        for text, id in zip(self._texts, row, strict=True):
            text.append(id)
            del text[: -self._block]
        return row

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows alone; from now on they are 0, 1, 2, …"""
        chosen = mx.array(rows)
        self._texts = [self._texts[row] for row in rows]
        self._seeds, self._filled = self._seeds[rows], self._filled[rows]
        self._layers = [(keys[chosen], values[chosen]) for keys, values in self._layers]
        for n, (ids, seen, probabilities) in enumerate(self._rows):
            probabilities = tuple(array[chosen] for array in probabilities)
            self._rows[n] = Tokens(ids[chosen], seen[chosen], probabilities)

    def refill(self) -> None:
        """After `read`: of the texts whose cache was full, read the last half blocks again, and put
        their tokens of the newest row right.
        """
        if not len(self._full):
            return
        rows, self._full = self._full, self._full[:0]
        texts = [tuple(self._texts[row][-max(1, self._block // 2) :]) for row in rows]
        is_whole = len(rows) == len(self._texts)
        if is_whole:
            self._layers = []  # before there are others
        logits, layers = self.model.prefill(texts)
        layers = pad_cache(layers, self._block)
        places = mx.array(rows)
        draw = self.model.sampler(self._spec, self._top)
        tokens = Tokens(*draw(logits, self._read.seen[places], self._values, self._keys(rows)))
        self._filled[rows] = [len(text) for text in texts]
        if is_whole:
            self._rows[-1], self._layers = tokens, layers
        else:
            newest = self._rows[-1]
            _write_rows(
                (newest.ids, newest.seen, *newest.probabilities),
                places,
                (tokens.ids, tokens.seen, *tokens.probabilities),
            )
            for old, new in zip(self._layers, layers, strict=True):
                _write_rows(old, places, new)
        self._hand_over()

    def _hand_over(self) -> None:
        """Let the device compute the newest row and the cache."""
        mx.async_eval(self._rows[-1], self._layers)

    def _wait_for_large_cache(self) -> None:
        """On a CPU, let the last step end, where the cache is large: a step that waits for another
        one copies the cache instead of writing into it. Of a small one that takes less time than
        waiting.
        """
        if device.on_cpu() and 2 * len(self._layers) * self._layers[0][0].nbytes > LARGE:
            mx.eval(self._rows[-1], self._layers)

    def _seen_in(self, prompts: list[np.ndarray], end_of_text: int | None) -> mx.array:
        """The tokens of each prompt that count for a repetition penalty, bool [B, V]. Without one
        nobody looks; but an array without columns crashes MLX.
        """
        seen = np.zeros((len(prompts), self.model.config.vocab_size), dtype=bool)
        if not self._spec.penalty:
            return mx.array(seen[:, :1])
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt[prompt != end_of_text]] = True
        return mx.array(seen)

    def _keys(self, rows: np.ndarray) -> mx.array:
        """A key for the newest token of each row, uint32 [B, 2]: a function of the seed, which
        sample of its prompt it is, and the number of the token.
        """
        keys = self._seeds[rows] + np.uint64(self._drawn - 1)
        return mx.array(keys.astype(">u8").view(">u4").astype(np.uint32).reshape(-1, 2))


def generate_step(batch: BatchDecoder) -> Iterator[list[int]]:
    """Rows of new ids, one for each text: the next row is handed over to the device before the last
    one is read.

    Raises:
        NotFiniteError: where a text's logits are not finite.
    """
    with execution.share_blas_threads(batch.model.blas_share):
        batch.prefill()
        for _ in range(1, batch.max_tokens):
            batch.step()
            row = batch.read()
            batch.refill()
            yield row
        yield batch.read()


def _write_rows(arrays: Sequence[mx.array], rows: mx.array, new: Sequence[mx.array]) -> None:
    """Put some texts' rows into the arrays of all texts."""
    for whole, part in zip(arrays, new, strict=True):
        whole[rows] = part
