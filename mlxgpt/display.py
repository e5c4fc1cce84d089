"""Everything drawn in a terminal, on stderr; results alone go to stdout."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mlxgpt import device
from mlxgpt.appraisal import Appraisal
from mlxgpt.corpus.sources import told
from mlxgpt.corpus.tokens import Dataset
from mlxgpt.forecast import Forecast, Reached
from mlxgpt.launch import Summary
from mlxgpt.model import count_parameters
from mlxgpt.quality import METRICS
from mlxgpt.run import Run
from mlxgpt.selfcheck import Law

READABLE = 80  # columns of running text
QUIET_SECONDS = 10.0  # between two lines where no terminal redraws them


class _Results(Console):
    """The console on stdout; where nobody reads on (`| head -1`), the command ends."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Messages(Console):
    """The console on stderr; where nobody reads on, a training goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def console() -> Console:
    """The console on stderr."""
    return _Messages(stderr=True, highlight=False)


class PreparationDisplay:
    """Shows a preparation: a bar in a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self.console = console()
        self._live: Live | None = None
        self._doing = ""
        self._began = self._last_shown = time.monotonic()
        self._before = 0  # done already when it began

    def note(self, line: str) -> None:
        """A line on what is being done."""
        self.console.print(Text(line), soft_wrap=True)

    def progress(self, doing: str, done: int, total: int) -> None:
        """So many of about `total` bytes are done."""
        now = time.monotonic()
        if doing != self._doing:
            self._doing, self._began, self._before = doing, now, done
            self._last_shown = now
        pause = 0.2 if self.console.is_terminal else QUIET_SECONDS
        if now - self._last_shown < pause:
            return
        self._last_shown = now
        rate = (done - self._before) / (now - self._began)
        left = duration(max(0, total - done) / rate) if rate else "–"
        line = (
            f"{doing} {size(done)} of {size(max(done, total))}  {size(rate)}/s  "
            f"memory {size(device.resident_bytes())}  ETA {left}"
        )
        if not self.console.is_terminal:
            self.console.print(Text(line), soft_wrap=True)
            return
        if not self._live:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=max(done, total), completed=done))
        self._live.update(Group(bar, Text(line)), refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was; also after an error."""
        if self._live:
            self._live.stop()
            self._live = None


class TrainingDisplay(PreparationDisplay):
    """Shows a training: a live view in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[str, Any] = {}
        self._val_loss: float | None = None
        self._saved = "–"
        self._last_line = time.monotonic()
        self._steps = self._start = 0
        self._laws = 0

    def warn(self, line: str) -> None:
        """Something is not as it was asked for."""
        self.console.print(Text(line, style="bold yellow"), soft_wrap=True)

    def law(self, law: Law) -> None:
        """A result of the self-check: shown where it failed, else counted."""
        if not self._laws:  # the first ones come at once, and then kernels are compiled
            self.note("checking itself, and timing a few steps")
        self._laws += 1
        if not law.ok:
            self.console.print(Text(f"self-check: {law.name}: {law.detail}", style="bold red"))

    def start(self, run: Run, dataset: Dataset, start: int, forecast: Forecast) -> None:
        """The training begins."""
        self.close()
        config, model, meta = run.config, run.config.model, dataset.meta
        self._start, self._steps = start, config.train.max_steps
        self._began = time.monotonic()
        tokens = (
            config.train.batch_size
            * config.train.gradient_accumulation_steps
            * config.model.block_size
        )
        lines = {
            "self-check": f"{self._laws} checks passed",
            "text": told(meta.origin),
            "data": f"{dataset.folder}: {meta.train.tokens:,} tokens to train on, "
            f"{meta.val.tokens:,} to judge by, vocabulary {meta.vocab_size:,}",
            "model": f"{count_parameters(model):,} parameters: {model.n_layer} layers, "
            f"{model.n_head} heads, width {model.n_embd}, block {model.block_size}, "
            f"{config.train.dtype}",
            "plan": f"{self._steps:,} steps of {tokens:,} tokens, "
            f"{self._steps * tokens:,} in all, "
            f"{self._steps * tokens / meta.train.tokens:.1f} times through the text",
            "machine": f"{device.name()}, {device.backend()}, {size(device.total_bytes())}",
            "will take": f"about {duration(forecast.seconds)} and {size(forecast.peak_bytes)} of "
            f"memory, measured: {1000 * forecast.step_seconds:,.0f} ms a step, "
            f"{forecast.evaluations} evaluation{'s' * (forecast.evaluations != 1)} of "
            f"{duration(forecast.evaluation_seconds)}",
            "to expect": _expected(forecast.reached, self._steps * tokens),
            "run": str(run.folder),
        }
        for name, value in lines.items():
            self.console.print(Text.assemble((f"{name:<12}", "dim"), value), soft_wrap=True)
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def log(self, record: dict[str, Any]) -> None:
        """New numbers."""
        self._latest = record
        self._val_loss = record.get("val_loss", self._val_loss)
        if self._live:
            self._live.update(self._view(), refresh=True)
        now = time.monotonic()
        overdue = not self._live and now - self._last_line > QUIET_SECONDS
        if "val_loss" in record or overdue or record["step"] == self._steps:
            self._last_line = now
            self.console.print(Text(self._line()), soft_wrap=True)

    def saved(self, step: int, size_: int, seconds: float) -> None:
        """A checkpoint was written."""
        self._saved = f"{size(size_)} in {seconds:.1f} s"

    def sample(self, step: int, text: str) -> None:
        """What the model writes by now."""
        head = Text(f"what it writes after {step:,} steps:", style="dim")
        self.console.print(
            head, Padding(Text(text.strip("\n")), (0, 0, 0, 4), expand=False), sep="\n"
        )

    def finish(self, summary: Summary) -> None:
        """The training has ended, one way or the other."""
        self.close()
        done = "stopped" if summary.interrupted else "done"
        lines = {
            done: f"{summary.step:,} of {summary.steps:,} steps in {duration(summary.seconds)}"
        }
        if summary.loss is not None:
            lines["loss"] = f"{summary.loss:.4f} nats per token in training"
        if summary.val_loss is not None:
            lines["val loss"] = (
                f"{summary.val_loss:.4f} nats per token, the best, at step {summary.best_step:,}"
            )
        lines["run"] = f"{summary.run} (metrics.jsonl, samples.txt, checkpoints)"
        if self._saved != "–":
            lines["saved"] = f"{self._saved}, the last checkpoint"
        lines["data"] = str(summary.data)
        lines["try it"] = summary.try_it
        if summary.warning:
            self.warn(summary.warning)
        for name, value in lines.items():
            # Commands and paths are not wrapped, so that they can be copied.
            line = Text.assemble(
                (f"{name:<12}", "dim"), (value, "bold" if name == "try it" else "")
            )
            self.console.print(line, soft_wrap=True)

    def _eta(self) -> float | None:
        # Evaluations and samples are in it, since the whole time since the start is counted.
        done = self._latest["step"] - self._start
        if done <= 0:
            return None
        return (time.monotonic() - self._began) / done * (self._steps - self._latest["step"])

    def _numbers(self) -> list[tuple[str, str]]:
        r = self._latest
        eta = self._eta()
        left_out = [("left out", f"{r['skipped']:,}")] if r.get("skipped") else []
        return [
            ("step", f"{r['step']:,}/{self._steps:,}"),
            ("loss", "–" if r["loss"] is None else f"{r['loss']:.4f}"),
            ("val loss", "–" if self._val_loss is None else f"{self._val_loss:.4f}"),
            ("lr", f"{r['lr']:.2e}"),
            # None where a step is only made up for.
            ("tokens/s", f"{r['tokens_per_second']:,.0f}" if r["tokens_per_second"] else "–"),
            ("of peak", f"{r['peak_share']:.0%}" if r["peak_share"] else "–"),
            ("memory", size(r["memory_bytes"])),
            ("saved", self._saved),
            *left_out,
            ("ETA", "–" if eta is None else duration(eta)),
        ]

    def _line(self) -> str:
        numbers = (pair for pair in self._numbers() if pair[0] != "saved")  # the end tells
        return "  ".join(f"{name} {value}" for name, value in numbers)

    def _view(self) -> Group:
        numbers = self._numbers()
        narrow = self.console.width < 90
        rows = [numbers[:4], numbers[4:]] if narrow else [numbers]
        tables = []
        for row in rows:
            table = Table.grid(padding=(0, 2), expand=True)
            table.add_row(*[Text(name, style="dim") for name, _ in row])
            table.add_row(*[Text(value, style="bold") for _, value in row])
            tables.append(table)
        # In a grid of its own, since a bar does not end its line.
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=self._steps, completed=self._latest["step"]))
        return Group(bar, *tables)


def _expected(reached: Reached | None, planned: int) -> str:
    if not reached:
        return "unknown: no run of this shape was measured on this text"
    shorter = "" if planned >= 0.9 * reached.tokens else "; this one is shorter, and ends above it"
    return (
        f"val loss {reached.val_loss:.4f}, {reached.bits_per_byte:.3f} bits per byte: what this "
        f"shape reached after {reached.tokens / 1e6:.1f} million tokens ({reached.report}){shorter}"
    )


def show_laws(laws: Sequence[Law]) -> None:
    """The self-check as a table on stdout, with the reasons under it."""
    to = _Results(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("", "checked", "found"):
        table.add_column(column, style="dim" if column == "checked" else "")
    for law in laws:
        mark = Text("ok", style="green") if law.ok else Text("FAILED", style="bold red")
        table.add_row(mark, law.name, escape(law.detail))
    to.print(table)
    for law in laws:
        if law.why:
            to.print()
            to.print(Text(law.why))


def show_appraisal(appraisal: Appraisal) -> None:
    """What generated texts are worth, as a table on stdout."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in appraisal.columns:
        table.add_column(name, justify="right", style="bold" if name == "model" else "")
    table.add_column("better", style="dim")
    for metric in METRICS:
        values = [column[metric.name] for column in appraisal.columns.values()]
        if all(value is None for value in values):
            continue
        table.add_row(metric.name, *(_metric(v, metric.share) for v in values), metric.better)
    to = _Results(highlight=False)
    to.print(table)
    if appraisal.order_preference is not None:
        to.print(
            f"\nfinds a real story likelier than its sentences in another order: "
            f"{appraisal.order_preference:.0%} (chance: 50 %)",
            soft_wrap=True,
        )
    missing = [column["grammar errors per 100 words"] for column in appraisal.columns.values()]
    if None in missing:
        to.print(
            Text("\ngrammar errors are not counted; for them: pip install 'harper-py>=0.2,<0.3'")
        )


def _metric(value: float | None, share: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if share else f"{value:.2f}"


def show_texts(texts: Sequence[str]) -> None:
    """Generated texts on stdout: in a terminal as columns to read, elsewhere as they are."""
    to = _Results(highlight=False, soft_wrap=False)
    for number, text in enumerate(texts, 1):
        if not to.is_terminal:
            print(f"--- {number}\n{text}\n")
            continue
        to.print(Rule(Text(f"{number} of {len(texts)}", style="dim"), align="left", style="dim"))
        to.print(Padding(Text(text.strip("\n")), (0, 0, 1, 2)), width=min(to.width, READABLE))


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys, as a table on stdout."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*[escape(str(value)) for value in row.values()])
    _Results(highlight=False).print(table)


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def size(count: float) -> str:
    """Bytes in a unit that fits, of 1000 each."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.1f} {units[0]}" if units[0] in ("GB", "TB") else f"{count:.0f} {units[0]}"
