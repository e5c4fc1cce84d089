"""Batched decoding with a KV cache: prefill of the prompts, then one token per sequence and step.

Each sequence has its own random keys, so its tokens do not depend on the batch. This is exact on a
CPU; CUDA and the GPU of an M5 round float32 to TF32 in products of several rows, not of one.
Works on token ids, not text.
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

LARGE_CACHE_BYTES = 64_000_000  # copying a smaller cache is faster than waiting for a step


class BatchDecoder:
    """Decodes a batch of sequences; see `generate_step`.

    When the cache is full, it slides if the model supports it (`GPT.supports_sliding_window`). With
    learned positions, the last half block is prefilled again from position 0.

    Args:
        prompts: (ids, sample index) of each sequence. At least one id; only the last block_size are
            used. The sample index makes samples of the same prompt differ.
        end_of_text: id that the repetition penalty ignores in prompts.
        top_count: how many of the most likely tokens to return with their probabilities.

    Attributes:
        probabilities: `sampling.top_probabilities` of the last row returned by `read`, as lists; ()
            without `top_count`.
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
        # For each sequence: ids in the window, seed of its keys, number of tokens in its cache.
        self._sequences = [prompt[-block_size:].tolist() for prompt, _ in prompts]
        seed = sampling.seed or 0
        seeds = [derive_seed(seed, "sample", sample_index) for _, sample_index in prompts]
        self._seeds = np.array(seeds, dtype=np.uint64)
        self._cache_lengths = np.zeros(len(prompts), dtype=np.int32)
        self._max_length = max(map(len, self._sequences)) + sampling.max_tokens
        self._prompt_mask = self._make_prompt_mask([prompt for prompt, _ in prompts], end_of_text)
        self._sampled_count = 0  # tokens per sequence submitted to the device
        self._pending = deque[SampledTokens]()  # submitted, not read yet
        self._full_rows = np.zeros(0, dtype=np.int64)  # rows with a full cache at the last step
        self._layers: list[LayerKV] = []

    def prefill(self) -> None:
        """Prefill each distinct prompt once, and submit sampling of the first row."""
        self._sampled_count = 1
        prompts = list(dict.fromkeys(map(tuple, self._sequences)))
        logits, layers = self.model.prefill(prompts)
        capacity = max(layers[0][0].shape[2], self.model.cache_capacity(self._max_length))
        layers = pad_cache(layers, capacity)
        if len(prompts) < len(self._sequences):
            prompt_indices = {prompt: index for index, prompt in enumerate(prompts)}
            rows = mx.array([prompt_indices[tuple(sequence)] for sequence in self._sequences])
            logits = logits[rows]
            layers = [tuple(array[rows] for array in layer) for layer in layers]
        self._layers = layers
        self._cache_lengths = np.array(list(map(len, self._sequences)), dtype=np.int32)
        draw = self.model.get_sampler(self._spec, self._top_count)
        keys = self._sampling_keys(np.arange(len(self._sequences)))
        tokens = draw(logits, self._prompt_mask, self._sampling_params, keys)
        self._pending.append(SampledTokens(*tokens))
        self._async_eval()

    def step(self) -> None:
        """Submit the next decode step; `refill` corrects it for rows with a full cache."""
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
            # Not in a variable: another reference would force MLX to copy the cache.
            (self._layers, mx.array(position)),
        )
        self._pending.append(SampledTokens(*tokens))
        self._cache_lengths = cache_lengths + 1
        self._async_eval()

    def read(self) -> list[int]:
        """Wait for the oldest pending row and return its ids, one per sequence.

        Raises:
            NotFiniteError: if a sequence's logits are not finite.
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
        """Keep only these rows, renumbered 0, 1, 2, …"""
        indices = mx.array(rows)
        self._sequences = [self._sequences[row] for row in rows]
        self._seeds, self._cache_lengths = self._seeds[rows], self._cache_lengths[rows]
        self._layers = [tuple(array[indices] for array in layer) for layer in self._layers]
        for n, (ids, seen_mask, probabilities) in enumerate(self._pending):
            probabilities = tuple(array[indices] for array in probabilities)
            self._pending[n] = SampledTokens(ids[indices], seen_mask[indices], probabilities)

    def refill(self) -> None:
        """After `read`: for rows with a full cache, prefill the last half block again, and replace
        their token in the newest row.
        """
        if not len(self._full_rows):
            return
        rows, self._full_rows = self._full_rows, self._full_rows[:0]
        contexts = [tuple(self._sequences[row][-max(1, self._block_size // 2) :]) for row in rows]
        refills_all = len(rows) == len(self._sequences)
        if refills_all:
            self._layers = []  # free the old cache before computing the new one
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
        """Start computing the newest row and the cache on the device."""
        mx.async_eval(self._pending[-1], self._layers)

    def _wait_for_large_cache(self) -> None:
        """On a CPU, wait for the last step if the cache is large: a step submitted while another is
        pending copies the cache instead of updating it in place.
        """
        cache_bytes = sum(array.nbytes for layer in self._layers for array in layer)
        if device.on_cpu() and cache_bytes > LARGE_CACHE_BYTES:
            mx.eval(self._pending[-1], self._layers)

    def _make_prompt_mask(self, prompts: list[np.ndarray], end_of_text: int | None) -> mx.array:
        """Mask of prompt tokens for the repetition penalty, bool [B, V]. Without a penalty [B, 1],
        unused, since an array without columns would crash MLX.
        """
        mask = np.zeros((len(prompts), self.model.config.vocab_size), dtype=bool)
        if not self._spec.has_penalty:
            return mx.array(mask[:, :1])
        for row, prompt in zip(mask, prompts, strict=True):
            row[prompt[prompt != end_of_text]] = True
        return mx.array(mask)

    def _sampling_keys(self, rows: np.ndarray) -> mx.array:
        """Random keys for the newest token of each row, uint32 [B, 2], derived from the seed, the
        sample index and the number of sampled tokens.
        """
        keys = self._seeds[rows] + np.uint64(self._sampled_count - 1)
        return mx.array(keys.astype(">u8").view(">u4").astype(np.uint32).reshape(-1, 2))


def generate_step(batch: BatchDecoder) -> Iterator[list[int]]:
    """Yield rows of new ids, one id per sequence. Each step is submitted to the device before the
    previous row is read.

    Raises:
        NotFiniteError: if a sequence's logits are not finite.
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
    """Overwrite the given rows of each array."""
    for array, values in zip(arrays, new, strict=True):
        array[rows] = values
