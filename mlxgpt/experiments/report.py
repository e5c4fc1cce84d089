"""A comparison as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mlxgpt.experiments.curves import SpeedUp
from mlxgpt.experiments.results import Record, VariantResult
from mlxgpt.experiments.statistics import Difference
from mlxgpt.experiments.variants import told

HEAD = ("variant", "seeds", "bits per byte", "difference", "tokens", "time", "verdict")


def markdown(record: Record) -> str:
    """The whole record but its curves."""
    rows = [HEAD, ("---",) * len(HEAD), *(cells(s) for s in record.variants)]
    return (
        "\n\n".join([f"# {record.name}", _table(rows), *notes(record), *_trainings(record)]) + "\n"
    )


def cells(result: VariantResult) -> list[str]:
    """A variant's row: one text for each name in HEAD."""
    d, mean = result.difference, result.mean
    return [
        result.name,
        str(len(result.trainings)),
        "–" if mean is None else f"{mean:.4f}",
        _difference(d) if d else "",
        _ratio(result.speed_up_tokens),
        _ratio(result.speed_up_seconds),
        result.verdict,
    ]


def notes(record: Record) -> list[str]:
    """What has to be known to read the table."""
    first = record.variants[0]
    many = " among so many looks and variants" if record.sequential else ""
    text = (
        f"{record.held_back_bytes:,} bytes held back from the training text"
        if record.judged_on == "held back"
        else "the validation text"
    )
    told_of = [f"{s.name}: {s.advice}." for s in record.variants if s.advice]
    told_of.append(
        f"Bits per byte on {text} of {record.data}, at the end of {record.budget} for each. "
        f"Differences are from {first.name}, seed by seed, and below 0 where it is better; ± holds "
        f"the true one in {1 - record.level:.4g} of cases{many}. Tokens and time: how many times "
        f"sooner it is where {first.name} ends, though its schedule was not made to end there."
    )
    if record.drift:
        slow, fast = record.drift
        told_of.append(
            f"The machine's speed, beside the median of each variant: {slow:+.1%} to {fast:+.1%}."
        )
    if not record.sequential and len(set(record.looks)) > 1:
        told_of.append(
            f"These were looked at with {', '.join(map(str, record.looks))} seeds. Whoever looks "
            "again and again finds differences that are none more often than the intervals say: "
            "--until-decided allows for that."
        )
    if record.final_looks:
        times = "once" if record.final_looks == 1 else f"{record.final_looks} times"
        told_of.append(f"The validation text was looked at {times} in this comparison.")
    if record.interrupted:
        told_of.append("It was interrupted: the same command goes on.")
    return told_of


def _trainings(record: Record) -> list[str]:
    head = ("variant", "differs in", "parameters", "steps", "tokens", "seconds", "by seed")
    rows = [head, ("---",) * len(head)]
    for s in record.variants:
        # A training that was resumed for its last step has no speed.
        ends = [t.curve.seconds[-1] for t in s.trainings if t.curve]
        times = [end for end in ends if math.isfinite(end)]
        seconds = f"{statistics.median(times):,.0f}" if times else ""
        seeds = ", ".join(f"{t.bits_per_byte:.4f}" for t in s.trainings)
        sizes = (f"{s.parameters:,}", f"{s.steps:,}", f"{s.tokens:,}", seconds)
        rows.append((s.name, told(s.changes), *sizes, seeds))
    about = "Seconds are the median training's, without evaluating, saving and compiling. On"
    return [_table(rows), f"{about} {record.machine}."]


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _difference(d: Difference) -> str:
    return f"{d.mean:+.4f}" + (f" ± {d.high - d.mean:.4f}" if d.high is not None else "")


def _ratio(found: SpeedUp | None) -> str:
    if found is None:
        return ""
    return f"{found.ratio:.2f} ×"
