"""A run's model to keep: read and verified once, compiled once."""

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
from mlxgpt.config import Sampling
from mlxgpt.config.resolve import PathLike, home
from mlxgpt.data.dataset import is_prepared
from mlxgpt.data.normalize import encode_prompt
from mlxgpt.data.token_array import Tokens
from mlxgpt.evaluation.loss import EvalText, Evaluation, Evaluator
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.inference.generate import (
    Generated,
    TextStream,
    TokenOutput,
    stream_tokens,
    with_start,
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
from mlxgpt.storage.loading import data_of, opened
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

SAMPLE = 20_000  # tokens, by which rounding is judged


class LoadedModel:
    """What `mlxgpt.load` gives. Its memory is free again when it is no longer used.

    Attributes:
        run: whose model it is.
        step: updates that it was trained for.
        tokenizer: between texts and ids.
    """

    def __init__(self, run: Run, model: GPT, step: int) -> None:
        self.run, self.step, self.tokenizer = run, step, run.tokenizer
        self._model = model
        self._compiled = CompiledModel(model, run.tokenizer.vocab_size)

    def generate(self, prompt: str | Sequence[str] = "", **sampling: Any) -> Generated:
        """Continue a prompt, or several in one batch, each as if it were alone; on a GPU up to
        rounding. Logs what the model does not read of long texts.

        Args:
            prompt: the beginning; empty: a text from its own beginning.
            sampling: any field of config.Sampling, such as `temperature=0.7, seed=1`.

        Raises:
            UserError: if a prompt has characters that the tokenizer lacks, or there is none.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("there is no prompt", 'give one, or "" for a text from its beginning.')
        chosen = config.sampling(sampling)
        stream = TextStream(self._compiled, self.tokenizer, prompts, chosen, bos=self.run.bos)
        for _ in stream:
            pass
        stream.log_long_texts()
        return stream.result

    def stream(self, prompt: str = "", **sampling: Any) -> TextStream:
        """A prompt's continuation, as it is generated: iterate over it for its pieces, which do not
        repeat the prompt; its `result` is then that of `generate`.
        """
        chosen = _of_one_text(sampling)
        return TextStream(self._compiled, self.tokenizer, [prompt], chosen, bos=self.run.bos)

    def tokens(
        self,
        prompt: str | Sequence[int] = "",
        *,
        number: int = 0,
        alternatives: int = 0,
        **sampling: Any,
    ) -> Iterator[TokenOutput]:
        """A prompt's continuation, token by token; see `generate`.

        Args:
            prompt: a text, or ids, as they are.
            number: which one of several samples it is, from 0 on.
            alternatives: how many of the likeliest tokens come with each one.
        """
        ids = self.ids(prompt) if isinstance(prompt, str) else self.checked(prompt)
        chosen = _of_one_text(sampling)
        return stream_tokens(
            self._compiled, self.tokenizer, ids, chosen, number=number, top=alternatives
        )

    def score(self, ids: Sequence[int], alternatives: int = 0) -> Iterator[list[ScoredToken]]:
        """Log-probabilities of all ids but the first, each after at most a block of those before
        it, in portions.

        Args:
            alternatives: how many of the most likely tokens to return for each place.

        Raises:
            UserError: if an id is not in the vocabulary, or a log-probability is not finite.
        """
        checked = self.checked(ids)
        with execution.share_blas_threads(self._compiled.blas_share):
            yield from self._scorer(checked, alternatives)

    def ids(self, prompt: str) -> np.ndarray:
        """A prompt's ids, int64 [T], begun as the model saw texts begin."""
        ids = encode_prompt(prompt, self.tokenizer)
        return with_start(ids, self.tokenizer, self.run.bos)

    def next(
        self, ids: Sequence[int], count: int = 10, **sampling: Any
    ) -> tuple[TopTokens, np.ndarray]:
        """What may follow some ids: the `count` likeliest tokens with their probabilities, and what
        settings of sampling leave of each.
        """
        checked, chosen = self.checked(ids), config.sampling(sampling)
        logits = self._compiled.logits_after(checked)
        return sampled_probabilities(chosen, logits, self.tokenizer.vocab_size, checked, count)

    def look(
        self, ids: Sequence[int], switched_off: Iterable[tuple[int, int]] = ()
    ) -> ForwardTrace:
        """See inside, as the model reads ids; the last ones, where the block holds no more.

        Args:
            switched_off: (layer, head) of heads that are left out.
        """
        block = self.run.config.model.block_size
        vocab_size = self.tokenizer.vocab_size
        with execution.share_blas_threads(self._compiled.blas_share):
            return ForwardTrace(self._model, vocab_size, self.checked(ids)[-block:], switched_off)

    def neighbours(self, id: int, count: int = 10) -> TopTokens:
        """The tokens with the embeddings most like one's, and the cosine between them."""
        (checked,) = self.checked([id])
        return self._neighbors.of(int(checked), count)

    def checked(self, ids: Sequence[int]) -> np.ndarray:
        """Ids, int64 [T], all of which the tokenizer gives.

        Raises:
            UserError: if there is another one, or none at all.
        """
        array = np.asarray(ids, dtype=np.int64)
        if not array.size:
            raise UserError("there is no token", "give one at least.")
        if not 0 <= array.min() <= array.max() < self.tokenizer.vocab_size:
            most = self.tokenizer.vocab_size - 1
            raise UserError(f"there is an id outside of 0 to {most:,}", "give the tokenizer's.")
        return array

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Of what follows each of ids[T] or ids[B, T]: float32 [T, V] or [B, T, V].

        Raises:
            UserError: if there are more than the block holds, or one beyond the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int32)
        block, V = self.run.config.model.block_size, self.run.config.model.vocab_size
        if not 0 < array.shape[-1] <= block:
            raise UserError(f"{array.shape[-1]:,} ids do not fit", f"give 1 to {block:,}.")
        if array.size and not 0 <= array.min() <= array.max() < V:
            raise UserError(f"there is an id outside of 0 to {V - 1:,}", "give the tokenizer's.")
        rows = mx.array(np.atleast_2d(array))
        logits = np.array(self._logits(rows).astype(mx.float32))
        return logits if array.ndim == 2 else logits[0]

    def loss(self, text: str) -> Evaluation:
        """How well the model predicts a text, each token from at most a block before it.

        Raises:
            UserError: if the text is of fewer than two tokens.
        """
        return self._evaluated(encode_prompt(text, self.tokenizer))

    def _evaluated(self, ids: np.ndarray, limit: int | None = None) -> Evaluation:
        c = self.run.config
        text = EvalText(Tokens(ids, c.model.vocab_size), self.tokenizer, self.run.bos)
        batch_size = c.train.batch_size
        evaluate = Evaluator(self._model, text, self._eval_step, batch_size=batch_size, limit=limit)
        return evaluate()

    @cached_property
    def _neighbors(self) -> EmbeddingNeighbors:
        return EmbeddingNeighbors(self._model, self.tokenizer.vocab_size)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._model, self.tokenizer.vocab_size)

    @cached_property
    def _logits(self) -> Callable[[mx.array], mx.array]:
        return execution.compiled(self._model.__call__)

    @cached_property
    def _eval_step(self) -> execution.PerThread[mx.array]:
        return execution.PerThread(partial(quantized.as_it_is, self._model))


def load(
    run: str | None = None,
    *,
    checkpoint: str = "best",
    quantize: int | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> LoadedModel:
    """A run's model, to keep. Logs which one it is, and what rounding its weights costs.

    Args:
        run: name or folder; default: the newest that has a checkpoint.
        checkpoint: `best`, `newest` or a step.
        quantize: bits a weight, 16, 8 or 4; default: 32.
    """
    if quantize is not None and quantize not in quantized.BITS:
        raise UserError(f"no model has {quantize} bits a weight", "use 16, 8 or 4.")
    loaded = LoadedModel(*opened(run, checkpoint, runs_dir))
    if quantize is None:
        return loaded
    sample = _validation(loaded.run, home("data", data_dir))
    before = loaded._evaluated(sample, SAMPLE) if sample is not None else None
    quantized.quantize(loaded._model, quantize)
    rounded = LoadedModel(loaded.run, loaded._model, loaded.step)
    cost = ""
    if before and sample is not None:
        after = rounded._evaluated(sample, SAMPLE)
        cost = f": loss {before.loss:.4f} before, {after.loss:.4f} now, on {after.tokens:,} tokens"
    logger.info(f"{quantize} bits a weight{cost}")
    if on_cpu():
        logger.info("on a CPU that is slower than 32 bits; it is made for GPUs")
    return rounded


def _of_one_text(sampling: dict[str, Any]) -> Sampling:
    chosen = config.sampling(sampling)
    if chosen.samples != 1:
        raise UserError("only one text can be streamed", "leave out samples.")
    return chosen


def _validation(run: Run, data_dir: Path) -> np.ndarray | None:
    """Ids of a run's validation text, where it is at hand."""
    if not run.data_name or not is_prepared(data_dir / run.data_name):
        return None
    return data_of(run, data_dir).val.ids
