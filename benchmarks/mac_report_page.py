"""The page that mac_report.py writes: what was seen, as Markdown, and nothing private in it. Knows
nothing of how it was seen.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import pwd
import re
import socket
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mac_report_lab import ROOT
from mac_report_power import Power

from mlxgpt.reports import markdown, report
from mlxgpt.reports.chips import (
    CHIPS,
    PEAK_SHARE,
    SMALLEST_MEASURED,
    Chip,
    predicted_generation,
    predicted_training,
)
from mlxgpt.reports.markdown import figure, spread_of
from mlxgpt.reports.records import Machine, Measurement, Spread, Tier

NAME = "mac-report"
TRAINING, GENERATION = "training, tokens/s", "generation, tokens/s (*predicted*: at most)"
PEAK = "peak of a matrix product, TFLOPS"
SHARE = "training's share of that peak, %"
# Names that say nothing of anybody, and that may well stand in the page for something else.
NOBODY = {"root", "user", "admin", "guest", "runner", "localhost", "mac", "apple", "test"}
HIDDEN = ("CHECKOUT", "HOME", "TEMP", "USER", "HOST", "ADDRESS")
ADDRESSES = (
    r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])",
    r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){3,}[0-9a-fA-F]{0,4}(?:%\w+)?",
)


@dataclass(frozen=True)
class Part:
    """One part of the report.

    Attributes:
        line: what came of it, in one line.
        body: the rest, as lines of Markdown.
    """

    name: str
    passed: bool
    line: str
    body: Sequence[str] = ()


@dataclass(frozen=True)
class Suite:
    """How the tests went; `failures` are their names, each with a line on what was wrong."""

    passed: int
    failed: int
    skipped: int
    failures: Sequence[tuple[str, str]]
    seconds: float


@dataclass(frozen=True)
class Trained:
    """A training that nobody touched.

    Attributes:
        text: what it learned.
        first_loss: of the first step; last_loss: of the last.
        first_rate, last_rate: tokens a second in the first fifth of the steps, and in the last.
        peak_memory: bytes.
    """

    text: str
    vocabulary: int
    steps: int
    first_loss: float
    last_loss: float
    val_loss: float | None
    first_rate: float
    last_rate: float
    peak_memory: int
    before: Power
    after: Power


def page(date: str, title: str, system: str, parts: Sequence[Part]) -> str:
    """The whole report.

    Args:
        date: the day.
        title: the chip.
        system: as Python's `platform.system()` calls it.
    """
    foreign = f"no Mac: this was made on {system}, and says nothing of Apple's chips."
    lines = [f"# {NAME}: {title}, {date[:10]}", ""]
    lines += [foreign, ""] if system != "Darwin" else []
    lines += [
        f"Made by `make {NAME}` in a checkout of mlxgpt. Names, folders and addresses were taken",
        "out of it. Look at it all the same, then add it to `benchmarks/reports/` in a pull",
        "request, as the README says.",
        "",
        *(f"- {part.name}: {verdict(part)}: {part.line}" for part in parts),
        "",
    ]
    for part in parts:
        if part.body:
            lines += [f"## {part.name[0].upper()}{part.name[1:]}", "", *part.body, ""]
    return "\n".join(lines)


def verdict(part: Part) -> str:
    """Passed or not, in a word."""
    return "passed" if part.passed else "failed"


def stem(date: str, machine: Machine | None) -> str:
    """The report's name, as 2026-11-22-m1-max-mac-report."""
    name = report.slug(Measurement(date, machine, ())) if machine else f"{date[:10]}-chip"
    return f"{name}-{NAME}"


def machine_lines(machine: Machine, model: str, power: Power) -> list[str]:
    """What the machine is."""
    rows = [*report.machine_rows(machine), *([["model", model]] if model else [])]
    return table([*rows, ["power", str(power)]])


def check_lines(checks: Sequence[dict[str, Any]]) -> list[str]:
    """What the self-check found."""
    words = {True: "passed", False: "FAILED", None: "told"}
    rows = [[check["name"], words[check["ok"]], check["detail"]] for check in checks]
    return table([["check", "", "found"], *rows])


def failure_lines(suite: Suite) -> list[str]:
    """Which tests failed, and why; as code, since Markdown would take parts of it for its own."""
    lines = ["What failed:", ""] if suite.failures else []
    for name, reason in suite.failures:
        lines += [f"    {name}", f"        {reason}"]
    return lines


def chip_of(machine: Machine) -> Chip | None:
    """The Apple chip whose speed was predicted; None for others, and where MLX does not use it."""
    name = machine.chip.removeprefix("Apple ").strip()
    found = [chip for chip in CHIPS if chip.name == name]
    return found[0] if found and machine.backend == "metal" else None


def speed_lines(tier: Tier, chip: Chip | None) -> list[str]:
    """A tier's speed, beside what was predicted for a chip."""
    t, g = tier.training, tier.generation
    ms, generated = t.ms_per_step, g.tokens_per_second
    rates = Spread.of([1000 * t.tokens_per_step / one for one in ms.repeats])
    peak, share = t.matmul_peak / 1e12, 100 * t.peak_share
    memory = f"peak memory in training, MB, of {t.peak_memory_of}"
    measured = {
        TRAINING: (spread_of(rates), t.tokens_per_second),
        "training, ms a step": (spread_of(ms), ms.median),
        PEAK: (figure(peak), peak),
        SHARE: (f"{share:.1f}", share),
        memory: (figure(t.peak_memory / 1e6), t.peak_memory),
        "generation, first token after, ms": (spread_of(g.ms_to_first_token), 0.0),
        GENERATION: (spread_of(generated), generated.median),
    }
    if not chip:
        rows = [[name, shown] for name, (shown, _) in measured.items()]
        return [*table([["", "measured"], *rows]), "", "No prediction for this chip."]
    predicted = predictions(tier, chip)
    rows = [
        [name, shown, *_beside(value, predicted.get(name, ()))]
        for name, (shown, value) in measured.items()
    ]
    head = ["", "measured", f"*predicted* for {chip.name}", "measured / predicted"]
    small = tier.parameters < SMALLEST_MEASURED
    note = "Smaller than any model that the prediction rests on: less was to be expected."
    return [*table([head, *rows]), *(["", note] if small else [])]


def predictions(tier: Tier, chip: Chip) -> dict[str, tuple[float, ...]]:
    """What a chip should reach; two numbers where it comes in two versions."""
    return {
        TRAINING: (predicted_training(chip, tier),),
        PEAK: (chip.tflops,),
        SHARE: (100 * PEAK_SHARE,),
        GENERATION: predicted_generation(chip, tier),
    }


def _beside(measured: float, predicted: Sequence[float]) -> list[str]:
    """The cells of a prediction, and of what was measured as a part of it."""
    ratios = (f"{measured / one:.2f}" for one in predicted)
    return [" to ".join(figure(one, 2) for one in predicted), " to ".join(ratios)]


def trained_lines(trained: Trained) -> list[str]:
    """How a training went."""
    t = trained
    drift = t.last_rate / t.first_rate
    rows = [
        ["text", t.text],
        ["steps", f"{t.steps:,}"],
        ["loss of the first step", f"{t.first_loss:.3f}"],
        [f"ln {t.vocabulary}", f"{math.log(t.vocabulary):.3f}"],
        ["loss of the last step", f"{t.last_loss:.3f}"],
        ["best validation loss", "–" if t.val_loss is None else f"{t.val_loss:.3f}"],
        ["tokens/s in the first fifth", figure(t.first_rate)],
        ["tokens/s in the last fifth", f"{figure(t.last_rate)}, {drift:.2f} of the first"],
        ["peak memory", f"{figure(t.peak_memory / 1e6)} MB"],
        ["power before", str(t.before)],
        ["power after", str(t.after)],
    ]
    return table([["training", ""], *rows])


def code(text: str) -> list[str]:
    """A text as a block of code, so that nothing in it is taken for Markdown."""
    return [f"    {line}".rstrip() for line in text.splitlines()]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first row is its head, whatever stands in its cells."""
    return markdown.table([[cell.replace("|", "\\|") for cell in row] for row in rows])


def own_words() -> list[tuple[str, str]]:
    """What tells who made a report, each with the word to put there: folders, then names."""
    folders = (("CHECKOUT", ROOT), ("HOME", Path.home()), ("TEMP", Path(tempfile.gettempdir())))
    paths = {(word, str(path)) for word, folder in folders for path in (folder, folder.resolve())}
    names = {("USER", name) for name in _users()}
    for host in (socket.gethostname(), os.uname().nodename):
        names |= {("HOST", host), ("HOST", host.partition(".")[0])}
    # Long ones first: a home often holds the checkout. The root of all is nobody's home.
    return _longest_first(pair for pair in paths if len(pair[1]) > 1) + _longest_first(
        pair for pair in names if _tells(pair[1])
    )


def _longest_first(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(pairs, key=lambda pair: (-len(pair[1]), pair))


def _users() -> Iterable[str]:
    with contextlib.suppress(OSError, KeyError, ImportError):
        yield getpass.getuser()
    with contextlib.suppress(KeyError):
        account = pwd.getpwuid(os.getuid())
        yield account.pw_name
        yield account.pw_gecos.partition(",")[0]  # the name in full


def _tells(name: str) -> bool:
    """Whether a name is one that somebody can be told by, and no word of the page's own."""
    plain = name.lower() in NOBODY or name.upper() in HIDDEN
    return len(name) > 2 and not plain and any(c.isalpha() for c in name)


def private(text: str, own: Sequence[tuple[str, str]] | None = None) -> str:
    """A text without what tells who made it and where: the folders and names of `own_words`, what
    leads to any other file, and network addresses.
    """
    for word, secret in own_words() if own is None else own:
        # Only whole names, as "jan" is in "January"; underscores and digits may stand beside.
        text = re.sub(rf"(?<![^\W\d_]){re.escape(secret)}(?![^\W\d_])", word, text, flags=re.I)
    for quote in "'\"`":  # between quotes a path may have spaces
        text = re.sub(rf"(?<={quote})/[^{quote}\n]*/", "…/", text)
    text = re.sub(r"(?:file://|(?<![\w./…~]))/(?:[^\s/'\"`|<>()\[\],;]+/)+", "…/", text)
    for address in ADDRESSES:
        text = re.sub(address, "ADDRESS", text)
    return text
