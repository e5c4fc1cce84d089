"""What bench.py measured: records, their JSON, and the report in Markdown. Knows nothing of how it
was measured, so that a report can be made again from its JSON.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxgpt import files
from mlxgpt.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Spread:
    """One quantity, measured several times."""

    median: float
    least: float
    most: float
    repeats: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True)
class Training:
    """Training's speed.

    Attributes:
        tokens_per_step: of the whole batch.
        plan_tokens: of the whole training, as the config plans it.
        flops_per_token: forward and backward.
        tokens_per_second: at the median of `ms_per_step`.
        matmul_peak: floating-point operations a second of a large matrix product.
        peak_share: of `matmul_peak`.
        peak_memory: bytes, and of what they are.
    """

    tokens_per_step: int
    plan_tokens: int
    flops_per_token: int
    warmup_steps: int
    steps_per_repeat: int
    ms_per_step: Spread
    tokens_per_second: float
    matmul_peak: float
    peak_share: float
    peak_memory: int
    peak_memory_of: str


@dataclass(frozen=True)
class Generation:
    """Generation's speed, one text at a time.

    Attributes:
        bytes_per_token: what decoding one token reads.
        tokens_per_second: after the first token.
    """

    prompt_tokens: int
    new_tokens: int
    bytes_per_token: int
    ms_to_first_token: Spread
    tokens_per_second: Spread


@dataclass(frozen=True)
class Tier:
    """One config's figures; `config` is the whole of it, for the record."""

    name: str
    parameters: int
    dtype: str
    training: Training
    generation: Generation
    config: dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What was measured on, and with; `load` is its load average of the minute before."""

    chip: str
    backend: str
    cores: int
    performance_cores: int | None
    memory: int
    system: str
    blas: str
    versions: dict[str, str]
    commit: str | None
    load: float


@dataclass(frozen=True)
class Measurement:
    """All of it; `date` is in UTC."""

    date: str
    machine: Machine
    tiers: tuple[Tier, ...]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Read what `to_json` wrote.

        Raises:
            UserError: if it is something else.
        """
        try:
            tree = json.loads(text)
            if tree["format"] != FORMAT:
                raise ValueError(f"its format is {tree['format']}, not {FORMAT}")
            tiers = tuple(tier_from(tier) for tier in tree["tiers"])
            return cls(tree["date"], Machine(**tree["machine"]), tiers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"this is no measurement that can be read here: {error}", "run: mlxgpt bench"
            ) from error


def tier_from(tree: dict[str, Any]) -> Tier:
    """A Tier from its JSON."""

    def spread(tree: dict[str, Any]) -> Spread:
        return Spread(**{**tree, "repeats": tuple(tree["repeats"])})

    training, generation = dict(tree["training"]), dict(tree["generation"])
    training["ms_per_step"] = spread(training["ms_per_step"])
    for name in ("ms_to_first_token", "tokens_per_second"):
        generation[name] = spread(generation[name])
    parts = {"training": Training(**training), "generation": Generation(**generation)}
    return Tier(**{**tree, **parts})


@dataclass(frozen=True)
class Chip:
    """An Apple chip's float32 peak, and its memory's bandwidth: two if there are two versions, none
    where we have no source.
    """

    name: str
    tflops: float
    gb_per_second: tuple[int, ...]


# From public spec sheets, and from measurements of the peak: base, Pro, Max, Ultra.
APPLE = {
    "M1": ((2.6, 5.2, 10.4, 21), ((68,), (200,), (400,), (800,))),
    "M2": ((3.6, 6.8, 13.5, 27.2), ((102,), (205,), (400,), (800,))),
    "M3": ((4.1, 7.4, 14.2, 28.4), ((102,), (150,), (300, 400), (819,))),
    "M4": ((4.6, 9.2, 18.4), ((120,), (273,), (410, 546))),
    "M5": ((5.7, 11.4, 22.8), ((), (), ())),
}
CHIPS = tuple(
    Chip(family + kind, tflops, speeds)
    for family, numbers in APPLE.items()
    for kind, tflops, speeds in zip(("", " Pro", " Max", " Ultra"), *numbers, strict=False)
)

# The share of that peak which public measurements of small trainings reached: see `_predicted`.
PEAK_SHARE = 0.25
SMALLEST_MEASURED = 3_500_000


def predicted_training(chip: Chip, tier: Tier) -> float:
    """Tokens a second that a chip should reach in training."""
    return PEAK_SHARE * 1e12 * chip.tflops / tier.training.flops_per_token


def predicted_generation(chip: Chip, tier: Tier) -> tuple[float, ...]:
    """Tokens a second that a chip cannot exceed in generation; one for each bandwidth."""
    return tuple(1e9 * speed / tier.generation.bytes_per_token for speed in chip.gb_per_second)


def markdown(measurement: Measurement) -> str:
    """The report; it can be read as plain text, too."""
    machine, tiers = measurement.machine, measurement.tiers
    names = " and ".join(tier.name for tier in tiers)
    return "\n".join(
        [
            f"# {names} on {machine.chip}",
            "",
            f"Measured on {measurement.date[:10]} with `mlxgpt bench`, each in a fresh process.",
            "",
            *_table(_machine_rows(measurement)),
            "",
            "## Measured",
            "",
            *_table([["", *(tier.name for tier in tiers)], *_rows(tiers)], ">"),
            "",
            *_how(tiers),
            "",
            "## To measure it again",
            "",
            "With nothing else running, in a checkout of the commit above:",
            "",
            "    mlxgpt bench",
            "",
            *_predicted(tiers),
        ]
    )


def _machine_rows(measurement: Measurement) -> list[list[str]]:
    m = measurement.machine
    fast = f", {m.performance_cores} of them fast" if m.performance_cores else ""
    return [
        ["machine", ""],
        ["chip", m.chip],
        ["cores", f"{m.cores}{fast}"],
        ["memory", f"{m.memory / 1e9:.1f} GB"],
        ["system", m.system],
        ["MLX computes on", m.backend],
        ["BLAS", m.blas],
        *([name, version] for name, version in m.versions.items()),
        ["commit", m.commit or "not a checkout"],
        ["load before", f"{m.load:.2f}"],
        ["time", measurement.date],
    ]


def _rows(tiers: Sequence[Tier]) -> list[list[str]]:
    columns = []
    for tier in tiers:
        t, g = tier.training, tier.generation
        columns.append(
            {
                "parameters": f"{tier.parameters:,}",
                "numbers": tier.dtype,
                "tokens in a step": f"{t.tokens_per_step:,}",
                "operations for a token in training": f"{figure(t.flops_per_token / 1e6)} MFLOP",
                "training, tokens/s": figure(t.tokens_per_second),
                "training, ms a step": _spread(t.ms_per_step),
                "peak of a matrix product": f"{figure(t.matmul_peak / 1e9)} GFLOP/s",
                "training's share of that peak": f"{100 * t.peak_share:.1f} %",
                "peak memory in training": f"{figure(t.peak_memory / 1e6)} MB",
                "generation, first token after, ms": _spread(g.ms_to_first_token),
                "generation, tokens/s": _spread(g.tokens_per_second),
            }
        )
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _how(tiers: Sequence[Tier]) -> list[str]:
    lines = ["The median, in brackets the least and the most:", ""]
    for tier in tiers:
        t, g = tier.training, tier.generation
        lines += [
            f"- {tier.name}, training: {len(t.ms_per_step.repeats)} repeats of "
            f"{t.steps_per_repeat} steps, after {t.warmup_steps} to warm up; memory of "
            f"{t.peak_memory_of}.",
            f"- {tier.name}, generation: {len(g.tokens_per_second.repeats)} texts of "
            f"{g.new_tokens} tokens, after a prompt of {g.prompt_tokens}, and one to warm up.",
        ]
    peak = "The peak is that of one large product, the faster of one before and one after."
    return [*lines, "", peak]


def _predicted(tiers: Sequence[Tier]) -> list[str]:
    lines = [
        "## Apple chips: *predicted*",
        "",
        "Nothing here was measured with mlxgpt. Training is *predicted* at "
        f"{100 * PEAK_SHARE:.0f} % of the float32 peak:",
        "public measurements of small models found 24 % (3.5M parameters, M3 Air) and 25 % (15.7M,",
        "M4 Max), and of one of 154M, with MLX on M1 Pro to Ultra, 31 to 43 %. The whole training",
        "is the config's steps, without evaluations. Generation is *predicted* at most: the",
        "memory's bandwidth over the bytes that a token reads. Small models never reach that:",
        "launching the kernels takes longer than reading the weights.",
    ]
    for tier in tiers:
        lines += ["", f"### {tier.name}, *predicted*", ""]
        if tier.parameters < SMALLEST_MEASURED:
            lines += ["Smaller than any model in those measurements: expect less.", ""]
        lines += _table([list(PREDICTED), *(_prediction(chip, tier) for chip in CHIPS)], ">")
    return [*lines, ""]


PREDICTED = (
    "chip",
    "peak, TFLOPS",
    "memory, GB/s",
    "*predicted* training, tokens/s",
    "*predicted* whole training",
    "*predicted* generation, tokens/s at most",
)


def _prediction(chip: Chip, tier: Tier) -> list[str]:
    rate = predicted_training(chip, tier)
    return [
        chip.name,
        f"{chip.tflops:.1f}",
        " to ".join(f"{speed}" for speed in chip.gb_per_second) or "–",
        figure(rate, 2),
        _time(tier.training.plan_tokens / rate),
        " to ".join(figure(limit, 2) for limit in predicted_generation(chip, tier)) or "–",
    ]


def figure(number: float, digits: int = 3) -> str:
    """A positive number with that many digits that count, as 12,300 or 1.23."""
    if number <= 0:
        return f"{number:g}"
    places = digits - 1 - math.floor(math.log10(number))
    return f"{round(number, places):,.{max(0, places)}f}"


def _spread(spread: Spread) -> str:
    return f"{figure(spread.median)} ({figure(spread.least)} to {figure(spread.most)})"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{figure(seconds / length, 2)} {unit}"
    return f"{figure(seconds, 2)} s"


def _table(rows: Sequence[Sequence[str]], align: str = "<") -> list[str]:
    """A Markdown table whose first row is its head; `align` is for all columns but the first."""
    columns = []
    for n, (head, *cells) in enumerate(zip(*rows, strict=True)):
        width, side = max(3, *map(len, (head, *cells))), align if n else "<"
        rule = "-" * (width - 1) + (":" if side == ">" else "-")
        columns.append([f"{cell:{side}{width}}" for cell in (head, rule, *cells)])
    return [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]


def write(measurement: Measurement, folder: Path) -> tuple[Path, Path]:
    """Write both forms, beside earlier ones and never over them.

    Returns:
        The paths of the JSON and of the Markdown.
    """
    text = markdown(measurement)
    folder.mkdir(parents=True, exist_ok=True)
    name, number = slug(measurement), 1
    while True:
        stem = name if number == 1 else f"{name}-{number}"
        numbers, report = folder / f"{stem}.json", folder / f"{stem}.md"
        if not numbers.exists() and not report.exists():
            break
        number += 1
    files.write_atomically(numbers, measurement.to_json())
    files.write_atomically(report, text)
    return numbers, report


# What the systems add to a chip's name: (R), a clock rate, makers, and words that say nothing.
NOISE = re.compile(r"\(\w+\)|@.*|\b(intel|amd|apple|nvidia|processor|cpu|[\w-]+-core)\b")


def slug(measurement: Measurement) -> str:
    """A report's name: its day and its chip, as 2026-11-22-xeon-2-cores or 2026-11-22-m1-max."""
    machine = measurement.machine
    words = re.findall("[a-z0-9]+", NOISE.sub(" ", machine.chip.lower())) or ["chip"]
    cores = [f"{machine.cores}-cores"] if machine.backend == "cpu" else []
    return "-".join([measurement.date[:10], *words, *cores])
