"""What a training step, an evaluation batch, a prefill and a decoded token ask of Metal, counted,
since it cannot be timed where there is no Mac. A change that raises a count shows in
benchmarks/reports/metal-counts.json, which a test compares with what is counted anew.

The real trainer, evaluator and decoder run; only their compiled functions do not: in the place of
each stands one that counts the kernels of its graph, and gives zeros. What one step more asks more
is a step's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mlxgpt.backend import execution
from mlxgpt.backend.cpu import jit as compiler
from mlxgpt.config import Config, Sampling, override
from mlxgpt.corpus.tokenizer import CharTokenizer
from mlxgpt.corpus.tokens import Tokens, dtype_for
from mlxgpt.evaluation.loss import Evaluator
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.model import losses
from mlxgpt.model.gpt import GPT
from mlxgpt.reports.graphs import as_on_a_gpu, graph_of, launched, leaves, operations
from mlxgpt.reports.records import Kernel, Workload
from mlxgpt.training.step import new_step
from mlxgpt.training.trainer import train


def workloads(config: Config) -> tuple[Workload, ...]:
    """The four of a config whose vocabulary and dtype are resolved. Generation is of one text: half
    a block is read, then a token is drawn in a full cache.
    """
    block, batch = config.model.block_size, config.train.batch_size

    def training(steps: int) -> None:
        ids = np.zeros(8 * config.tokens_per_step, dtype_for(config.model.vocab_size))
        tokens = Tokens(ids, config.model.vocab_size)
        train(new_step(config), tokens, override(config, {"max_steps": steps}))

    def evaluation(batches: int) -> None:
        ids = np.zeros(batches * batch * block + 1, dtype_for(config.model.vocab_size))
        Evaluator(
            GPT(config.model),
            CharTokenizer("a", end_of_text=False),
            Tokens(ids, config.model.vocab_size),
            bos=None,
            batch_size=batch,
            dtype=getattr(mx, config.train.dtype),
        )()

    model, prompt = GPT(config.model), np.zeros(block // 2, np.int32)
    mx.eval(model.parameters())

    def tokens(count: int) -> None:
        sampling = Sampling(max_tokens=count, seed=0)
        batch = BatchDecoder(CompiledModel(model, config.model.vocab_size), [(prompt, 0)], sampling)
        for _ in generate_step(batch):
            pass

    with as_on_a_gpu(in_training=True):
        step = _more(training, 3, differentiated=True)
    with as_on_a_gpu():
        return (
            step.workload("training step", config.tokens_per_step),
            _more(evaluation, 2).workload("evaluation batch", batch * block),
            _asked(lambda: tokens(1)).workload("prefill", block // 2),
            _more(tokens, block // 2 - 1).workload("decoded token", 1),
        )


@dataclass
class _Asked:
    """What was asked of the device."""

    counted: Counter[Any] = field(default_factory=Counter)  # graphs, by kernels and operations
    host: Counter[str] = field(default_factory=Counter)

    def workload(self, name: str, tokens: int) -> Workload:
        kernels: dict[str, Kernel] = {}
        for (_, made), times in self.counted.items():
            for one in made:
                had = kernels.get(one.name, Kernel(one.name, 0, 0, 0))
                kernels[one.name] = Kernel(
                    one.name,
                    had.bytes + times * one.bytes,
                    had.flops + times * one.flops,
                    had.launches + times * one.launches,
                )
        return Workload(
            name,
            tokens,
            sum(count * times for (count, _), times in self.counted.items()),
            tuple(sorted(kernels.values(), key=lambda kernel: (-kernel.bytes, kernel.name))),
            self.host["handed over"],
            self.host["read"],
        )


def _more(run: Callable[[int], None], times: int, *, differentiated: bool = False) -> _Asked:
    """What one more of something asks than `times` of it."""
    fewer = _asked(lambda: run(times), differentiated=differentiated)
    more = _asked(lambda: run(times + 1), differentiated=differentiated)
    return _Asked(more.counted - fewer.counted, more.host - fewer.host)


def _asked(run: Callable[[], None], *, differentiated: bool = False) -> _Asked:
    with _watched(differentiated) as asked:
        run()
    return asked


@contextmanager
def _watched(differentiated: bool) -> Iterator[_Asked]:
    asked = _Asked()
    known: dict[Any, Any] = {}
    computed = mx.eval  # which is not to be counted here

    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def stand_in(*args: Any) -> Any:
            shapes = str([(array.shape, array.dtype) for array in leaves(args)])
            if (function, shapes) not in known:
                computed(args)  # or its graph would begin where they come from
                so_far = asked.host.copy()
                graph, result = graph_of(function, *args)
                asked.host = so_far
                made = tuple(launched(graph, in_training=differentiated))
                known[function, shapes] = (operations(graph), made), result
            cost, result = known[function, shapes]
            asked.counted[cost] += 1
            return result

        return stand_in

    def watching(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **given: Any) -> Any:
            if what == "handed over" or any(isinstance(a, mx.array) for a in args):
                asked.host[what] += 1
            return function(*args, **given)

        return watched

    with ExitStack() as stack:
        for module in (compiler, losses, execution):
            stack.enter_context(mock.patch.object(module, "compiled", compiled))
        for holder, name, what in (
            (mx, "async_eval", "handed over"),
            (mx, "eval", "handed over"),
            (mx.array, "__float__", "read"),
            (mx.array, "item", "read"),
            (mx.array, "tolist", "read"),
            (np, "array", "read"),
            (np, "asarray", "read"),
        ):
            old = getattr(holder, name)
            stack.enter_context(mock.patch.object(holder, name, watching(what, old)))
        yield asked
