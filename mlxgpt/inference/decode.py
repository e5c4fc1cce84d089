"""Batched decoding: prefill of the prompts, KV cache, one row of new ids after the other.

Each text is drawn as if it were alone: with its own keys, and exactly so where the products of a
batch are rounded as those of a single row are, as on the CPU. An M5's GPU and CUDA round float32 to
TF32 in the former only. Knows a model, not text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution
from mlxgpt.config import SamplingParams
from mlxgpt.inference.engine import (
    NOT_FINITE_ID,
    CompiledModel,
    NotFiniteError,
    SampledTokens,
    round_up_to_bucket,
)
from mlxgpt.inference.sampling import SamplerSpec, pack_sampling_params
from mlxgpt.model.kv_cache import LayerKV, pad_cache
from mlxgpt.utils.seeds import derive_seed

LARGE_CACHE_BYTES = 64_000_000  # copying a smaller cache takes less time than waiting for a step


class BatchDecoder:
    """Decodes a batch of texts; see `generate_step`.

    A full cache slides, where the model can: see `GPT.supports_sliding_window`. With learned
    positions a text's last half block is read again instead, from position 0.

    Args:
        prompts: for each text its prompt's ids, at least one, of which the last block counts; and
            its sample index, so that texts of one prompt are drawn differently.
        end_of_text: the id that never counts for a repetition penalty in a prompt.
        top_count: how many of the likeliest tokens get probabilities.

    Attributes:
        probabilities: of the row that was read last: see `sampling.top_probabilities`, as lists;
            () without `top_count`.
    """

    def __init__(
        self,
        model: CompiledModel,
        prompts: Sequence[tuple[np.ndarray, int]],
        sampling: SamplingParams,
        end_of_text: int | None = None,
        top_count: int = 0,
    ) -> None:
        block_size = model.config.block_size
        self.model, self.max_tokens = model, sampling.max_tokens
        self.probabilities: tuple[list, ...] = ()
        self._block_size, self._top_count = block_size, min(top_count, model.vocab_size)
        self._spec = SamplerSpec.from_sampling(sampling, model.vocab_size)
        self._sampling_params = pack_sampling_params(sampling)
        # For each text: the tokens in the window, the seed of its keys, the tokens in its cache.
        self._sequences = [prompt[-block_size:].tolist() for prompt, _ in prompts]
        seed = sampling.seed or 0
        seeds = [derive_seed(seed, "sample", sample_index) for _, sample_index in prompts]
        self._seeds = np.array(seeds, dtype=np.uint64)
        self._cache_lengths = np.zeros(len(prompts), dtype=np.int32)
        self._max_length = max(map(len, self._sequences)) + sampling.max_tokens
        self._prompt_mask = self._make_prompt_mask([prompt for prompt, _ in prompts], end_of_text)
        self._sampled_count = 0  # tokens of each text that were handed over to the device
        self._pending = deque[SampledTokens]()  # those of them that are not read yet
        self._full_rows = np.zeros(0, dtype=np.int64)  # texts whose cache was full at the last step
        self._layers: list[LayerKV] = []

    def prefill(self) -> None:
        """Read each distinct prompt once, and hand over the first row's draw."""
        self._sampled_count = 1
        prompts = list(dict.fromkeys(map(tuple, self._sequences)))
        logits, layers = self.model.prefill(prompts)
        capacity = max(layers[0][0].shape[2], self.model.cache_capacity(self._max_length))
        layers = pad_cache(layers, capacity)
        if len(prompts) < len(self._sequences):
            prompt_indices = {prompt: index for index, prompt in enumerate(prompts)}
            rows = mx.array([prompt_indices[tuple(sequence)] for sequence in self._sequences])
            logits, layers = logits[rows], [(k[rows], v[rows]) for k, v in layers]
        self._layers = layers
        self._cache_lengths = np.array(list(map(len, self._sequences)), dtype=np.int32)
        draw = self.model.get_sampler(self._spec, self._top_count)
        keys = self._sampling_keys(np.arange(len(self._sequences)))
        tokens = draw(logits, self._prompt_mask, self._sampling_params, keys)
        self._pending.append(SampledTokens(*tokens))
        self._async_eval()

    def step(self) -> None:
        """Hand over the next row's draw; `refill` corrects it for texts with a full cache."""
        last, cache_lengths = self._pending[-1], self._cache_lengths
        self._sampled_count += 1
        if not self.model.supports_sliding_window:
            self._full_rows = np.flatnonzero(cache_lengths == self._block_size)
        if len(self._full_rows) == len(cache_lengths):
            self._pending.append(last)
            return
        self._wait_for_large_cache()
        kv_length = round_up_to_bucket(int(cache_lengths.max()) + 1, self._block_size)
        kv_length = min(kv_length, self._layers[0][0].shape[2])
        position = cache_lengths[:1] if (cache_lengths == cache_lengths[0]).all() else cache_lengths
        if not self.model.supports_sliding_window:
            position = np.minimum(position, self._block_size - 1)
        step = self.model.get_decode_step(self._spec, self._top_count, kv_length)
        tokens, self._layers = step(
            last.ids,
            last.seen_mask,
            self._sampling_params,
            self._sampling_keys(np.arange(len(cache_lengths))),
            # Not in a variable: a cache that is referred to is copied, not written into.
            (self._layers, mx.array(position)),
        )
        self._pending.append(SampledTokens(*tokens))
        self._cache_lengths = cache_lengths + 1
        self._async_eval()

    def read(self) -> list[int]:
        """The ids of the oldest row that is not read yet, one for each text.

        Raises:
            NotFiniteError: where a text's logits are not finite.
        """
        self._last_read = tokens = self._pending.popleft()
        row: list[int] = tokens.ids.tolist()  # type: ignore[assignment]
        if NOT_FINITE_ID in row:
            raise NotFiniteError
        self.probabilities = tuple(array.tolist() for array in tokens.probabilities)  # type: ignore[misc]
        for sequence, id in zip(self._sequences, row, strict=True):
            sequence.append(id)
            del sequence[: -self._block_size]
        return row

    def filter_rows(self, rows: list[int]) -> None:
        """Continue with these rows alone; from now on they are 0, 1, 2, …"""
        indices = mx.array(rows)
        self._sequences = [self._sequences[row] for row in rows]
        self._seeds, self._cache_lengths = self._seeds[rows], self._cache_lengths[rows]
        self._layers = [(keys[indices], values[indices]) for keys, values in self._layers]
        for n, (ids, seen_mask, probabilities) in enumerate(self._pending):
            probabilities = tuple(array[indices] for array in probabilities)
            self._pending[n] = SampledTokens(ids[indices], seen_mask[indices], probabilities)

    def refill(self) -> None:
        """After `read`: where a cache was full, read the text's last half block again, and correct
        its token of the newest row.
        """
        if not len(self._full_rows):
            return
        rows, self._full_rows = self._full_rows, self._full_rows[:0]
        contexts = [tuple(self._sequences[row][-max(1, self._block_size // 2) :]) for row in rows]
        refills_all = len(rows) == len(self._sequences)
        if refills_all:
            self._layers = []  # frees them before the new ones are computed
        logits, layers = self.model.prefill(contexts)
        layers = pad_cache(layers, self._block_size)
        indices = mx.array(rows)
        draw = self.model.get_sampler(self._spec, self._top_count)
        seen_mask, keys = self._last_read.seen_mask[indices], self._sampling_keys(rows)
        tokens = SampledTokens(*draw(logits, seen_mask, self._sampling_params, keys))
        self._cache_lengths[rows] = [len(context) for context in contexts]
        if refills_all:
            self._pending[-1], self._layers = tokens, layers
        else:
            newest = self._pending[-1]
            _write_rows(
                (newest.ids, newest.seen_mask, *newest.probabilities),
                indices,
                (tokens.ids, tokens.seen_mask, *tokens.probabilities),
            )
            for old, new in zip(self._layers, layers, strict=True):
                _write_rows(old, indices, new)
        self._async_eval()

    def _async_eval(self) -> None:
        """Let the device compute the newest row and the cache."""
        mx.async_eval(self._pending[-1], self._layers)

    def _wait_for_large_cache(self) -> None:
        """On a CPU, wait for the last step if the cache is large: a step that waits for another one
        copies the cache instead of writing into it.
        """
        cache_bytes = 2 * len(self._layers) * self._layers[0][0].nbytes
        if device.on_cpu() and cache_bytes > LARGE_CACHE_BYTES:
            mx.eval(self._pending[-1], self._layers)

    def _make_prompt_mask(self, prompts: list[np.ndarray], end_of_text: int | None) -> mx.array:
        """The tokens of each prompt that count for a repetition penalty, bool [B, V]. Without a
        penalty [B, 1], which is not read: an array without columns would crash MLX.
        """
        mask = np.zeros((len(prompts), self.model.config.vocab_size), dtype=bool)
        if not self._spec.has_penalty:
            return mx.array(mask[:, :1])
        for row, prompt in zip(mask, prompts, strict=True):
            row[prompt[prompt != end_of_text]] = True
        return mx.array(mask)

    def _sampling_keys(self, rows: np.ndarray) -> mx.array:
        """A key for the newest token of each row, uint32 [B, 2]: a function of the seed, which
        sample of its prompt it is, and the number of the token.
        """
        keys = self._seeds[rows] + np.uint64(self._sampled_count - 1)
        return mx.array(keys.astype(">u8").view(">u4").astype(np.uint32).reshape(-1, 2))


def generate_step(batch: BatchDecoder) -> Iterator[list[int]]:
    """Yield rows of new ids, one for each text. The next row is handed over to the device before
    the last one is read.

    Raises:
        NotFiniteError: where a text's logits are not finite.
    """
    with execution.share_blas_threads(batch.model.blas_divisor):
        batch.prefill()
        for _ in range(1, batch.max_tokens):
            batch.step()
            row = batch.read()
            batch.refill()
            yield row
        yield batch.read()


def _write_rows(arrays: Sequence[mx.array], rows: mx.array, new: Sequence[mx.array]) -> None:
    """Overwrite some texts' rows in the arrays of all texts."""
    for array, values in zip(arrays, new, strict=True):
        array[rows] = values
