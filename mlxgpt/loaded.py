"""A run's model to keep: read and verified once, traced once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlxgpt import config
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.errors import UserError
from mlxgpt.evaluation.loss import EvalStep, Evaluation, Evaluator, eval_step
from mlxgpt.inference import generation
from mlxgpt.inference.decoding import Decoder
from mlxgpt.inference.generation import Generated
from mlxgpt.machine.compiler import compiled
from mlxgpt.model.gpt import GPT
from mlxgpt.requests import PathLike, opened
from mlxgpt.storage.run import Run


class Model:
    """What `mlxgpt.load` gives. Its memory is free again when it is no longer used.

    Attributes:
        run: whose model it is.
        step: updates that it was trained for.
        tokenizer: between texts and ids.
    """

    def __init__(self, run: Run, model: GPT, step: int) -> None:
        self.run, self.step, self.tokenizer = run, step, run.tokenizer
        self._model = model
        self._decoder = Decoder(model, run.tokenizer.vocab_size)

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        show: Callable[[str], None] = lambda piece: None,
        note: Callable[[str], None] = lambda line: None,
        **sampling: Any,
    ) -> Generated:
        """Continue a prompt, or several in one batch, each as if it were alone.

        Args:
            prompt: the beginning; empty: a text from its own beginning.
            show: takes pieces of the first text as they are made.
            note: takes a line on what the user should know.
            sampling: any field of config.Sampling, such as `temperature=0.7, seed=1`.

        Raises:
            UserError: if a prompt has characters that the tokenizer lacks, or there is none.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("there is no prompt", 'give one, or "" for a text from its beginning.')
        chosen = config.sampling(sampling)
        bos = self.run.bos
        return generation.generate(
            self._decoder, self.tokenizer, prompts, chosen, bos=bos, show=show, note=note
        )

    def stream(self, prompt: str = "", **sampling: Any) -> Iterator[str]:
        """Pieces of a prompt's continuation, as they are made; see `generate`."""
        chosen = config.sampling(sampling)
        if chosen.samples != 1:
            raise UserError("only one text can be streamed", "leave out samples.")
        return generation.stream(self._decoder, self.tokenizer, prompt, chosen, bos=self.run.bos)

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
        c = self.run.config
        evaluate = Evaluator(
            self._model,
            self.tokenizer,
            Tokens(self.tokenizer.encode(text), c.model.vocab_size),
            bos=self.run.bos,
            batch_size=c.train.batch_size,
            dtype=self._dtype,
            step=self._eval_step,
        )
        return evaluate()

    @cached_property
    def _logits(self) -> Callable[[mx.array], mx.array]:
        return compiled(self._model.__call__)

    @cached_property
    def _eval_step(self) -> EvalStep:
        return eval_step(self._model, self._dtype)

    @property
    def _dtype(self) -> mx.Dtype:
        dtype: mx.Dtype = getattr(mx, self.run.config.train.dtype)
        return dtype


def load(
    run: str | None = None,
    *,
    checkpoint: str = "best",
    runs_dir: PathLike | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Model:
    """A run's model, to keep.

    Args:
        run: name or folder; default: the newest that has a checkpoint.
        checkpoint: `best`, `newest` or a step.
        note: takes a line on what was loaded.
    """
    return Model(*opened(run, checkpoint, runs_dir, note))
