"""Progress of a training run on stderr: its plan, live metrics, samples and result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxgpt.backend import device
from mlxgpt.cli.console import WARNING_STYLE
from mlxgpt.cli.loss_plot import render_loss_chart
from mlxgpt.cli.progress import PLAIN_LINE_INTERVAL, PreparationDisplay, format_duration
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_array import ExampleArray, PairArray
from mlxgpt.data.sources import describe_origin
from mlxgpt.data.token_array import Window
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.model.stats import count_parameters, count_trained_parameters
from mlxgpt.storage.run import Run
from mlxgpt.training.callbacks import Callback, TrainingSummary
from mlxgpt.training.estimate import Estimate, ReferenceResult
from mlxgpt.training.selfcheck import CheckResult


class TrainingDisplay(Callback):
    """Progress of a training run: a live view in a terminal, otherwise plain lines."""

    def __init__(self) -> None:
        self._preparation = PreparationDisplay()
        self.console = self._preparation.console
        self.view: LiveView | None = None
        self._last_save = ""
        self._check_count, self._passed_checks = 0, set[str]()

    def close(self) -> None:
        """Restore the terminal; also after an error."""
        self._preparation.close()
        if self.view:
            self.view.close()
            self.view = None

    def on_prepare(self, stage: str, done: int, total: int) -> None:
        self._preparation.show_progress(stage, done, total)

    def on_check(self, check: CheckResult) -> None:
        """Show a failed check; count the others."""
        if not self._check_count:  # the first checks are fast, then kernels are compiled
            line = Text("running self-checks and timing a few steps")
            self.console.print(line, soft_wrap=True)
        self._check_count += 1
        if check.ok:
            self._passed_checks.add(check.name)  # only once, even if the self-check restarts
        if check.ok is False:
            self.console.print(Text(f"self-check: {check.name}: {check.detail}", style="bold red"))

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, estimate: Estimate) -> None:
        self.close()
        self.show_plan(run, dataset, estimate)
        if isinstance(dataset.train, ExampleArray):
            self._show_example(dataset.train, dataset.tokenizer)
        self.view = LiveView(self.console, start, run.config.train.max_steps, run.metrics())

    def show_plan(self, run: Run, dataset: Dataset, estimate: Estimate) -> None:
        """Print the plan of the run."""
        count = len(self._passed_checks)  # 0 if the run was checked before
        check_line = {"self-check": f"{count} checks passed"} if count else {}
        self._print_lines({**check_line, **_describe_plan(run, dataset, estimate)})

    def _show_example(self, examples: ExampleArray, tokenizer: Tokenizer) -> None:
        """Print the first example, or both answers of the first pair."""
        mark = "highlighted" if self.console.is_terminal else "in [[ ]]"
        names = [f"first example, trained tokens {mark}:"]
        if isinstance(examples, PairArray):
            names = [f"first pair, trained tokens {mark}; chosen:", "rejected:"]
        for n, name in enumerate(names):
            self._print_text(name, self._highlight_trained(examples.example(n), tokenizer))

    def _highlight_trained(self, example: Window, tokenizer: Tokenizer) -> Text:
        """Text of an example with its trained tokens highlighted."""
        is_terminal = self.console.is_terminal
        pairs = zip(example.ids.tolist(), [False, *example.trained.tolist()], strict=True)
        text = Text()
        for is_trained, group in groupby(pairs, key=lambda pair: pair[1]):
            part = tokenizer.decode([id for id, _ in group])
            if is_trained and not is_terminal:
                part = f"[[{part}]]"
            text.append(part, style="reverse" if is_trained else "")
        text.rstrip()
        return text

    def on_log(self, record: dict[str, Any]) -> None:
        assert self.view
        self.view.show(record)

    def on_save(self, step: int, size: int, seconds: float) -> None:
        self._last_save = f"{decimal(size)} in {seconds:.1f} s"
        if self.view:
            self.view.last_save = self._last_save

    def on_sample(self, step: int, text: str) -> None:
        self._print_text(f"sample at step {step:,}:", Text(text.strip("\n")))

    def _print_text(self, title: str, text: Text) -> None:
        header = Text(title, style="dim")
        if self.console.is_terminal:
            self.console.print(header, Padding(text, (0, 0, 0, 4), expand=False), sep="\n")
        else:
            self.console.print(header, text, sep="\n", soft_wrap=True)

    def on_train_end(self, summary: TrainingSummary) -> None:
        self.close()
        status = "stopped" if summary.interrupted else "done"
        duration = format_duration(summary.seconds)
        lines = {status: f"{summary.step:,} of {summary.steps:,} steps in {duration}"}
        if summary.out_of_patience:
            lines["ended early"] = "the validation loss no longer improved (--patience)"
        if summary.loss is not None:
            lines["loss"] = f"{summary.loss:.4f} {summary.loss_unit} (training)"
        if summary.val_loss is not None:
            lines["val loss"] = (
                f"{summary.val_loss:.4f} {summary.loss_unit} (best, at step {summary.best_step:,})"
            )
        lines["run"] = f"{summary.run} (metrics.jsonl, samples.txt, checkpoints)"
        if self._last_save:
            lines["saved"] = f"last checkpoint: {self._last_save}"
        lines["data"] = str(summary.data)
        lines["try it"] = summary.try_it
        if summary.warning:
            self.console.print(Text(summary.warning, style=WARNING_STYLE), soft_wrap=True)
        self._print_lines(lines)

    def _print_lines(self, lines: dict[str, str]) -> None:
        for name, value in lines.items():
            # Commands and paths are not wrapped, so that they can be copied.
            style = "bold" if name == "try it" else ""
            self.console.print(
                Text.assemble((f"{name:<12}", "dim"), (value, style)), soft_wrap=True
            )


# Metrics of evaluations: their names in the display, and formats.
EVAL_METRICS = {
    "val_loss": ("val loss", ".4f"),
    "val_margin": ("margin", ".3f"),
    "val_accuracy": ("accuracy", ".0%"),
    "val_kl": ("KL", ".4f"),
    "base_val_loss": ("base val loss", ".4f"),
}
MIN_HEIGHT_FOR_CURVE = 24  # minimum lines of a terminal for a loss curve
LIVE_CURVE_HEIGHT = 10  # lines
MAX_CURVE_RECORDS = 2000


class LiveView:
    """Live metrics and loss curve of a training run; without a terminal, occasional lines.

    Args:
        records: lines of metrics.jsonl from before the run was resumed.
    """

    def __init__(
        self, console: Console, start_step: int, steps: int, records: Iterable[dict[str, Any]] = ()
    ) -> None:
        self.last_save = "–"
        self._records = list(records)
        self._console, self._start_step, self._steps = console, start_step, steps
        self._start_time = self._last_line = time.monotonic()
        self._eval_metrics: dict[str, float] = {}  # of the last evaluation
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()

    def close(self) -> None:
        """Restore the terminal."""
        if self._live:
            self._live.stop()
            self._live = None

    def show(self, record: dict[str, Any]) -> None:
        """Show new metrics. Those of evaluations and the last step remain visible as a line."""
        self._eval_metrics |= {
            name: record[name] for name in EVAL_METRICS if record.get(name) is not None
        }
        # Steps repeated after a rollback are shown once, and lines at most once a second.
        self._records = [*(r for r in self._records if r["step"] < record["step"]), record]
        if len(self._records) > MAX_CURVE_RECORDS:
            self._records = [r for n, r in enumerate(self._records) if n % 2 or "val_loss" in r]
        if self._live:
            self._live.update(self.render(record), refresh=True)
        now = time.monotonic()
        is_line_due = not self._live and now - self._last_line > PLAIN_LINE_INTERVAL
        if "val_loss" in record or is_line_due or record["step"] == self._steps:
            self._last_line = now
            # The last save is printed at the end.
            metrics = (pair for pair in self._format_metrics(record) if pair[0] != "saved")
            line = "  ".join(f"{name} {value}" for name, value in metrics)
            self._console.print(Text(line), soft_wrap=True)

    def render(self, record: dict[str, Any]) -> Group:
        """Render a progress bar, and the metrics under their names."""
        metrics = self._format_metrics(record)
        is_narrow = self._console.width < 90
        rows = [metrics[:4], metrics[4:]] if is_narrow else [metrics]
        tables = []
        for row in rows:
            table = Table.grid(padding=(0, 2), expand=True)
            table.add_row(*[Text(name, style="dim") for name, _ in row])
            table.add_row(*[Text(value, style="bold") for _, value in row])
            tables.append(table)
        # In a separate grid, since a bar does not end its line.
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=self._steps, completed=record["step"]))
        if self._console.height < MIN_HEIGHT_FOR_CURVE or len(self._records) < 3:
            return Group(bar, *tables)
        unicode = not self._console.options.ascii_only
        curve = render_loss_chart(
            self._records, self._console.width, LIVE_CURVE_HEIGHT, unicode=unicode
        )
        return Group(curve, bar, *tables)

    def _format_metrics(self, r: dict[str, Any]) -> list[tuple[str, str]]:
        eta = self._eta(r["step"])
        skipped = [("skipped", f"{r['skipped']:,}")] if r.get("skipped") else []
        evaluation = {
            name: format(self._eval_metrics[key], template)
            for key, (name, template) in EVAL_METRICS.items()
            if key in self._eval_metrics
        }
        return [
            ("step", f"{r['step']:,}/{self._steps:,}"),
            ("loss", "–" if r["loss"] is None else f"{r['loss']:.4f}"),
            *({"val loss": "–"} | evaluation).items(),
            ("lr", f"{r['lr']:.2e}"),
            # None if a resumed run only repeats a missed save or log line.
            ("tok/s", f"{r['tokens_per_second']:,.0f}" if r["tokens_per_second"] else "–"),
            ("% of peak", f"{r['peak_share']:.0%}" if r["peak_share"] else "–"),
            ("memory", decimal(r["memory_bytes"])),
            ("saved", self.last_save),
            *skipped,
            ("ETA", "–" if eta is None else format_duration(eta)),
        ]

    def _eta(self, step: int) -> float | None:
        # Includes evaluations and samples, since it is based on all time since the start.
        steps_done = step - self._start_step
        if steps_done <= 0:
            return None
        return (time.monotonic() - self._start_time) / steps_done * (self._steps - step)


def _describe_plan(run: Run, dataset: Dataset, estimate: Estimate) -> dict[str, str]:
    """Describe the plan of a run: title -> text."""
    t, model, meta = run.config.train, run.config.model, dataset.meta
    tokens = run.tokens_per_step
    examples = {}
    if meta.has_examples:
        cut = meta.origin["examples"]["cut"]
        name, answers = ("pairs", 2) if meta.has_pairs else ("examples", 1)
        examples[name] = (
            f"{meta.train.documents // answers:,} for training, "
            f"{meta.val.documents // answers:,} for validation, "
            f"{cut:,} {'answers' if meta.has_pairs else 'of them'} cut to "
            f"{model.block_size:,} tokens"
        )
    if t.beta:
        examples["loss"] = (
            f"DPO, beta {t.beta:g}, starts at ln 2 = {math.log(2):.4f} {run.config.loss_unit}"
        )
    adapters, lora = {}, run.config.lora
    if lora.lora_rank:
        trained = count_trained_parameters(run.config)
        adapters["adapters"] = (
            f"{lora.describe(model.n_layer)}: {trained:,} trained parameters, "
            f"{trained / count_parameters(model):.1%} of the model's"
        )
    return {
        "source": describe_origin(meta.origin),
        **examples,
        "data": f"{dataset.folder}: {meta.train.tokens:,} training tokens, "
        f"{meta.val.tokens:,} validation tokens, vocabulary {meta.vocab_size:,}",
        "model": f"{count_parameters(model):,} parameters: {model.n_layer} layers, "
        f"{model.n_head} heads, width {model.n_embd}, block size {model.block_size:,}, {t.dtype}",
        **adapters,
        "plan": f"{t.max_steps:,} steps of {tokens:,.0f} tokens, "
        f"{t.max_steps * tokens:,.0f} in total, "
        f"{t.max_steps * tokens / meta.train.tokens:.1f} epochs",
        "device": f"{device.device_name()}, {device.device_type()}, "
        f"{decimal(device.total_memory_bytes())} memory",
        "estimate": f"about {format_duration(estimate.seconds)} and "
        f"{decimal(estimate.peak_bytes)} of memory, from measured steps: "
        f"{1000 * estimate.step_seconds:,.0f} ms per step, "
        f"{estimate.evaluations} evaluation{'s' * (estimate.evaluations != 1)} in "
        f"{format_duration(estimate.evaluation_seconds)}",
        "expected": _format_expected_loss(estimate.reference, t.max_steps * tokens),
        "run": str(run.folder),
    }


def _format_expected_loss(reference: ReferenceResult | None, planned_tokens: float) -> str:
    if not reference:
        return "unknown: no reference run with this model size on this dataset"
    is_shorter = planned_tokens < 0.9 * reference.tokens
    note = "; this run is shorter and will end higher" if is_shorter else ""
    return (
        f"val loss {reference.val_loss:.4f}, {reference.bits_per_byte:.3f} bits per byte, reached "
        f"by this model size after {reference.tokens / 1e6:.1f}M tokens ({reference.report})"
        f"{note}"
    )
