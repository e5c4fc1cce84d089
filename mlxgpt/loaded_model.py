"""`mlxgpt.load`, `generate` and `stream`: a run's model in memory, compiled once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxgpt import config
from mlxgpt.backend import execution
from mlxgpt.backend.device import on_cpu
from mlxgpt.config import SamplingParams
from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.data.dataset import is_prepared
from mlxgpt.data.example_array import SplitArray
from mlxgpt.data.normalize import encode_prompt
from mlxgpt.data.token_array import TokenArray
from mlxgpt.evaluation.loss import EvalDataset, Evaluation, Evaluator
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.inference.generate import (
    GenerationOutput,
    TextStream,
    TokenOutput,
    prepend_bos,
    stream_tokens,
)
from mlxgpt.inference.inspect import (
    EmbeddingNeighbors,
    ForwardTrace,
    TopTokens,
    sampled_probabilities,
)
from mlxgpt.inference.scoring import ScoredToken, Scorer
from mlxgpt.model import quantized
from mlxgpt.model.gpt import GPT
from mlxgpt.storage.loading import load_run_model, open_run_dataset
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


class LoadedModel:
    """A trained model with its tokenizer, returned by `mlxgpt.load`: generates, scores, inspects.

    Attributes:
        run: run of the model.
        step: training step of the checkpoint.
        tokenizer: the run's tokenizer.
    """

    def __init__(self, run: Run, model: GPT, step: int) -> None:
        self.run, self.step, self.tokenizer = run, step, run.tokenizer
        self._model = model
        self._compiled = CompiledModel(model, run.tokenizer.vocab_size)

    def generate(self, prompt: str | Sequence[str] = "", **sampling: Any) -> GenerationOutput:
        """Continue one or more prompts, in batches, which do not affect the texts (on a GPU up to
        rounding). Logs if texts are longer than the model's context.

        Args:
            prompt: text to continue, or several; an empty one generates a new text.
            sampling: fields of config.SamplingParams, such as `temperature=0.7, seed=1`.

        Raises:
            UserError: if there is no prompt, or the tokenizer cannot encode one.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("there is no prompt", 'pass at least one; "" generates a new text.')
        params = config.parse_sampling_params(sampling)
        stream = TextStream(self._compiled, self.tokenizer, prompts, params, bos=self.run.bos)
        for _ in stream:
            pass
        stream.log_long_texts()
        return stream.result

    def stream(self, prompt: str = "", **sampling: Any) -> TextStream:
        """Stream a prompt's continuation: iterate over the returned stream for pieces of text,
        without the prompt; afterwards its `result` is the output of `generate`.
        """
        params = _parse_single_sample_params(sampling)
        return TextStream(self._compiled, self.tokenizer, [prompt], params, bos=self.run.bos)

    def iter_tokens(
        self,
        prompt: str | Sequence[int] = "",
        *,
        sample_index: int = 0,
        alternatives: int = 0,
        **sampling: Any,
    ) -> Iterator[TokenOutput]:
        """Continue a prompt, and yield each generated token; see `generate`.

        Args:
            prompt: text, or token ids, which are used unchanged.
            sample_index: index of the sample among several of the same prompt, from 0.
            alternatives: how many of the most likely tokens to return with each token.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else self.check_ids(prompt)
        params = _parse_single_sample_params(sampling)
        return stream_tokens(
            self._compiled,
            self.tokenizer,
            ids,
            params,
            sample_index=sample_index,
            top_count=alternatives,
        )

    def score(self, ids: Sequence[int], alternatives: int = 0) -> Iterator[list[ScoredToken]]:
        """Yield lists of log-probabilities of all ids but the first, each given at most block_size
        preceding ids.

        Args:
            alternatives: how many of the most likely tokens to return for each position.

        Raises:
            UserError: if an id is not in the vocabulary, or a log-probability is not finite.
        """
        valid_ids = self.check_ids(ids)
        with execution.share_blas_threads(self._compiled.blas_divisor):
            yield from self._scorer(valid_ids, alternatives)

    def encode(self, prompt: str) -> np.ndarray:
        """Encode a prompt as ids, int64 [T], with the start token if the model uses one."""
        ids = encode_prompt(prompt, self.tokenizer)
        return prepend_bos(ids, self.tokenizer, self.run.bos)

    def next_token_probs(
        self, ids: Sequence[int], count: int = 10, **sampling: Any
    ) -> tuple[TopTokens, np.ndarray]:
        """Next-token probabilities after `ids`: the `count` most likely tokens with the model's
        probabilities, and their probabilities under the sampling parameters.
        """
        valid_ids, params = self.check_ids(ids), config.parse_sampling_params(sampling)
        logits = self._compiled.next_token_logits(valid_ids)
        return sampled_probabilities(params, logits, self.tokenizer.vocab_size, valid_ids, count)

    def trace_forward(
        self, ids: Sequence[int], disabled_heads: Iterable[tuple[int, int]] = ()
    ) -> ForwardTrace:
        """Run a forward pass over the last block_size ids, and record attention weights, residual
        stream and logits.

        Args:
            disabled_heads: (layer, head) of heads whose output is set to zero.
        """
        block = self.run.config.model.block_size
        vocab_size = self.tokenizer.vocab_size
        with execution.share_blas_threads(self._compiled.blas_divisor):
            return ForwardTrace(
                self._model, vocab_size, self.check_ids(ids)[-block:], disabled_heads
            )

    def find_neighbors(self, id: int, count: int = 10) -> TopTokens:
        """Find the `count` tokens with the nearest embeddings, with their cosine similarities."""
        (valid_id,) = self.check_ids([id])
        return self._neighbors.find_nearest(int(valid_id), count)

    def check_ids(self, ids: Sequence[int]) -> np.ndarray:
        """Check that ids are in the tokenizer's vocabulary, and convert them to int64 [T].

        Raises:
            UserError: if there are no ids, or one is out of range.
        """
        id_array = np.asarray(ids, dtype=np.int64)
        if not id_array.size:
            raise UserError("there are no token ids", "pass at least one.")
        if not 0 <= id_array.min() <= id_array.max() < self.tokenizer.vocab_size:
            max_id = self.tokenizer.vocab_size - 1
            raise UserError(f"a token id is not in 0 to {max_id:,}", "use this model's tokenizer.")
        return id_array

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits at each position of ids[T] or ids[B, T]; float32 [T, V] or [B, T, V].

        Raises:
            UserError: if T is 0 or exceeds block_size, or an id is out of range.
        """
        id_array = np.asarray(ids, dtype=np.int32)
        block, V = self.run.config.model.block_size, self.run.config.model.vocab_size
        if not 0 < id_array.shape[-1] <= block:
            raise UserError(f"{id_array.shape[-1]:,} ids do not fit", f"pass 1 to {block:,}.")
        if id_array.size and not 0 <= id_array.min() <= id_array.max() < V:
            raise UserError(f"a token id is not in 0 to {V - 1:,}", "use this model's tokenizer.")
        rows = mx.array(np.atleast_2d(id_array))
        logits = np.array(self._compiled_forward(rows).astype(mx.float32))
        return logits if id_array.ndim == 2 else logits[0]

    def loss(self, text: str) -> Evaluation:
        """Evaluate the model's loss over a text, in non-overlapping windows of block_size tokens.

        Raises:
            UserError: if the text has fewer than two tokens.
        """
        ids = encode_prompt(text, self.tokenizer)
        return self._evaluate(TokenArray(ids, self.run.config.model.vocab_size))

    def _evaluate(self, tokens: SplitArray, limit: int | None = None) -> Evaluation:
        data = EvalDataset(tokens, self.tokenizer, self.run.bos)
        batch_size = self.run.config.train.batch_size
        evaluator = Evaluator(
            self._model, data, self._eval_step, batch_size=batch_size, limit=limit
        )
        return evaluator()

    @cached_property
    def _neighbors(self) -> EmbeddingNeighbors:
        return EmbeddingNeighbors(self._model, self.tokenizer.vocab_size)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._model, self.tokenizer.vocab_size)

    @cached_property
    def _compiled_forward(self) -> Callable[[mx.array], mx.array]:
        return execution.compile_function(self._model.__call__)

    @cached_property
    def _eval_step(self) -> execution.PerThreadFunction[mx.array]:
        return execution.PerThreadFunction(partial(quantized.make_frozen_eval_step, self._model))


QUANTIZATION_EVAL_TOKENS = 20_000  # validation tokens, to measure the effect of quantization


def load(
    run: str | None = None,
    *,
    checkpoint: str = "best",
    quantize: int | None = None,
    adapter: bool = True,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> LoadedModel:
    """Load a run's model. Logs the checkpoint, and validation loss before and after quantization.

    Args:
        run: name or folder; default: the newest run with a checkpoint.
        checkpoint: `best`, `newest` or a step.
        quantize: bits per weight, 16, 8 or 4; default: 32.
        adapter: False loads the model that the run's adapter belongs to, without the adapter.
    """
    if quantize is not None and quantize not in quantized.QUANTIZATION_BITS:
        raise UserError(f"cannot quantize to {quantize} bits per weight", "use 16, 8 or 4.")
    loaded = LoadedModel(*load_run_model(run, checkpoint, runs_dir, adapter=adapter))
    if quantize is None:
        return loaded
    val_data = _load_val_data(loaded.run, resolve_folder("data", data_dir))
    eval_before = loaded._evaluate(val_data, QUANTIZATION_EVAL_TOKENS) if val_data else None
    quantized.quantize_model(loaded._model, quantize)
    quantized_model = LoadedModel(loaded.run, loaded._model, loaded.step)
    cost = ""
    if eval_before and val_data:
        eval_after = quantized_model._evaluate(val_data, QUANTIZATION_EVAL_TOKENS)
        cost = (
            f": validation loss {eval_before.loss:.4f} before, {eval_after.loss:.4f} after, on "
            f"{eval_after.tokens:,} tokens"
        )
    logger.info(f"quantized to {quantize} bits per weight{cost}")
    if on_cpu():
        logger.info("quantized weights are slower than float32 on a CPU; they are meant for GPUs")
    return quantized_model


def generate(
    prompt: str | Sequence[str] = "",
    *,
    run: str | None = None,
    checkpoint: str = "best",
    quantize: int | None = None,
    adapter: bool = True,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    **sampling: Any,
) -> GenerationOutput:
    """Continue one or more prompts with a run's model. To generate repeatedly, `load` it once.

    Args:
        prompt, sampling: see LoadedModel.generate.
        run, checkpoint, quantize, adapter: see `load`.
    """
    config.parse_sampling_params(sampling)  # check parameters before loading the model
    model = load(
        run,
        checkpoint=checkpoint,
        quantize=quantize,
        adapter=adapter,
        runs_dir=runs_dir,
        data_dir=data_dir,
    )
    return model.generate(prompt, **sampling)


def stream(
    prompt: str = "",
    *,
    run: str | None = None,
    checkpoint: str = "best",
    quantize: int | None = None,
    adapter: bool = True,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    **sampling: Any,
) -> TextStream:
    """Stream one text; arguments as in `generate`, result as in LoadedModel.stream."""
    config.parse_sampling_params(sampling)
    model = load(
        run,
        checkpoint=checkpoint,
        quantize=quantize,
        adapter=adapter,
        runs_dir=runs_dir,
        data_dir=data_dir,
    )
    return model.stream(prompt, **sampling)


def _parse_single_sample_params(sampling: dict[str, Any]) -> SamplingParams:
    params = config.parse_sampling_params(sampling)
    if params.samples != 1:
        raise UserError("only one sample can be streamed", "omit samples.")
    return params


def _load_val_data(run: Run, data_dir: Path) -> SplitArray | None:
    """A run's validation split, or None if its data folder is not available."""
    if not run.data_name or not is_prepared(data_dir / run.data_name):
        return None
    return open_run_dataset(run, data_dir).val
