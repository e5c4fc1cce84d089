"""Render a scaling study as Markdown."""

from __future__ import annotations

import math
import statistics

from mlxgpt.experiments.report import render_table
from mlxgpt.experiments.scaling_fit import ScalingFit
from mlxgpt.experiments.scaling_results import LengthResult, ScalingRecord, SizeAdvice
from mlxgpt.training.auto_size import MAX_EFFECTIVE_EPOCHS

RESULT_COLUMNS = ("size", "parameters", "tokens", "epochs", "seeds", "bits per byte", "law")
ADVICE_COLUMNS = ("minutes", "size", "parameters", "tokens", "epochs", "bits per byte, predicted")


def render_scaling(record: ScalingRecord) -> str:
    """Render a record as Markdown."""
    results = render_table(RESULT_COLUMNS, [format_result_row(record, r) for r in record.results])
    sections = [f"# {record.name}", results, *format_scaling_notes(record)]
    if record.advice:
        rows = [format_advice_row(advice) for advice in record.advice]
        sections += ["## Which size for which time", render_table(ADVICE_COLUMNS, rows)]
        sections += format_advice_notes(record)
    return "\n\n".join([*sections, f"Machine: {record.machine}."]) + "\n"


def format_result_row(record: ScalingRecord, result: LengthResult) -> list[str]:
    """Table row of a size and length: one cell for each of RESULT_COLUMNS."""
    mean = statistics.fmean(result.losses) if result.losses else math.nan
    law = record.fit.law.predict(result.size.parameters, result.tokens) if record.fit else math.nan
    return [
        result.size.name + " (test)" * (result is record.test),
        f"{result.size.parameters / 1e6:.2f}M",
        f"{result.tokens / 1e6:.2f}M",
        f"{result.tokens / record.train_tokens:.2g}",
        str(len(result.losses)),
        f"{mean:.4f}" if math.isfinite(mean) else "diverged" if result.losses else "–",
        f"{law:.4f}" if record.fit else "–",
    ]


def format_scaling_notes(record: ScalingRecord) -> list[str]:
    """Paragraphs that explain the results and the law."""
    paragraphs = [
        f"Recipe {record.recipe}, {record.data}, {record.budget} in all. Bits per byte on "
        f"{record.held_out_bytes:,} bytes held out of the training text, mean of the seeds."
    ]
    if record.interrupted:
        paragraphs.append("The study was interrupted; the same command resumes it.")
    elif not record.fit:
        paragraphs.append("No law was fitted, since a run diverged.")
    else:
        paragraphs += [format_law(record.fit), format_test(record, record.fit)]
        paragraphs.append(format_tokens_per_parameter(record, record.fit))
    return paragraphs


def format_law(fit: ScalingFit) -> str:
    """The law in numbers, with their errors."""
    law, errors = fit.law, fit.errors()
    intervals = {name: f"{low:.2g} to {high:.2g}" for name, (low, high) in errors.items()}
    return (
        f"Law: bits per byte = {law.limit:.3f} + {law.a:.3f} / N^{law.alpha:.2f} + {law.b:.3f} / "
        f"D^{law.beta:.2f}, with N million parameters and D million tokens. 95% intervals: "
        f"{intervals['limit']}; {intervals['a']}; {intervals['alpha']}; {intervals['b']}; "
        f"{intervals['beta']}. The losses scatter around it by {fit.residual:.4f}."
    )


def format_test(record: ScalingRecord, fit: ScalingFit) -> str:
    """Whether the law predicted the test."""
    test = record.test
    low, high = fit.interval(test.size.parameters, test.tokens)
    verdict = "inside" if record.law_holds else "outside: do not rely on the law"
    return (
        f"Test: for {test.size.name}, which it was not fitted to, the law predicts {low:.4f} to "
        f"{high:.4f}; measured: {test.point.loss:.4f}, {verdict}."
    )


def format_tokens_per_parameter(record: ScalingRecord, fit: ScalingFit) -> str:
    """How many tokens a parameter needs, at the FLOPs of the test."""
    test = record.test
    ratio, low, high = fit.tokens_per_parameter(6 * test.size.parameters * test.tokens)
    if not math.isfinite(ratio):
        return "In this range the loss depends on the number of parameters or of tokens alone."
    return (
        f"For the FLOPs of the test, {ratio:.2g} tokens per parameter give the lowest loss "
        f"(95% interval {low:.2g} to {high:.2g})."
    )


def format_advice_row(advice: SizeAdvice) -> list[str]:
    """Table row of the best size for a time: one cell for each of ADVICE_COLUMNS."""
    return [
        f"{advice.minutes:g}",
        advice.size.name,
        f"{advice.size.parameters / 1e6:.2f}M",
        f"{advice.tokens / 1e6:.2f}M",
        f"{advice.epochs:.2g}",
        f"{advice.loss:.3f} ({advice.low:.3f} to {advice.high:.3f})",
    ]


def format_advice_notes(record: ScalingRecord) -> list[str]:
    """Paragraphs that explain the advice."""
    paragraphs = [
        "One run of that time, without evaluations, at the speed that was measured before. "
        "Predictions far from the measured sizes and lengths are less certain than they look."
    ]
    if any(advice.epochs > MAX_EFFECTIVE_EPOCHS for advice in record.advice):
        paragraphs.append(
            f"Beyond {MAX_EFFECTIVE_EPOCHS} epochs the law does not hold: text that is seen again "
            "teaches less than new text. Use more text for such a time."
        )
    return paragraphs
