"""Runs as a page: how they went, what they wrote, what they were made of, how to repeat them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxgpt.config import Config, differences, override, toml
from mlxgpt.evaluation.text_metrics import METRICS
from mlxgpt.html_report import plots
from mlxgpt.html_report.page import Figure, Page
from mlxgpt.html_report.plots import Line
from mlxgpt.html_report.run_metrics import AXES, Course, course_of
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage.run import Run
from mlxgpt.training.init_weights import SHAPE
from mlxgpt.utils import files

logger = logging.getLogger(__name__)

SMOOTH = 30  # records of the training loss
MOST_SAMPLES = 8
LONGEST = 1500  # characters of a sample
MOST_EVENTS = 12  # in a plot; the text names more
MOST_TOLD = 40
FINE_TUNING = "finetune"  # the config of a run that was begun with another's weights


def page_of(runs: Sequence[Run]) -> Page:
    """A page on one run, or on several side by side."""
    page = Page(", ".join(run.name for run in runs))
    courses = {_name(runs, n): course_of(run) for n, run in enumerate(runs)}
    page.table(_summary(runs, courses), "what each run came to")
    _loss(page, courses)
    _on_the_way(page, courses)
    for run, (name, course) in zip(runs, courses.items(), strict=True):
        if len(runs) > 1:
            page.heading(name)
        level = 3 if len(runs) > 1 else 2
        _events(page, course, level)
        _forecast(page, run, course, level)
        _samples(page, run, level)
        _quality(page, run, level)
        _settings(page, run, level)
        _machine(page, run, level)
        page.heading("To repeat it", level)
        page.commands(commands(run))
    return page


def _name(runs: Sequence[Run], n: int) -> str:
    """A run's name, with a number where two in different folders have the same."""
    name = runs[n].name
    return f"{name} ({n + 1})" if [run.name for run in runs].count(name) > 1 else name


def _summary(runs: Sequence[Run], courses: dict[str, Course]) -> list[list[str]]:
    rows = [["", *courses]]
    columns = []
    for run, course in zip(runs, courses.values(), strict=True):
        best, step = run.best(), int(course.steps[-1]) if len(course.steps) else 0
        planned = run.config.train.max_steps
        columns.append(
            {
                "parameters": f"{count_parameters(run.config.model):,}",
                "data": run.data_name or "imported",
                "steps": f"{step:,} of {planned:,}" + ("" if step >= planned else ", not finished"),
                "tokens": f"{step * run.config.tokens_per_step:,}",
                "minutes of training": f"{course.minutes[-1]:,.1f}" if step else "–",
                "best loss on held-out text": (
                    f"{best['val_loss']:.4f} nats a token, at step {best['step']:,}"
                    if best
                    else "–"
                ),
                "last loss in training": _or_none(course.last("loss"), "{:.4f}"),
                "tokens/s, median": _or_none(
                    _median(course.values["tokens_per_second"]), "{:,.0f}"
                ),
            }
        )
    return rows + [[name, *(column[name] for column in columns)] for name in columns[0]]


def _or_none(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values) & (values > 0)]
    return float(np.median(known)) if len(known) else None


def _loss(page: Page, courses: dict[str, Course]) -> None:
    page.heading("Loss")
    smooth = {name: plots.smoothed(c.values["loss"], SMOOTH) for name, c in courses.items()}
    figures = {}
    for axis in AXES:
        drawn = []
        for n, (name, course) in enumerate(courses.items()):
            of = "" if len(courses) == 1 else f"{name}, "
            x, loss, val = course.axis(axis), course.values["loss"], course.values["val_loss"]
            if np.isfinite(loss).any():
                drawn.append(Line(f"{of}in training", x, smooth[name], raw=loss, group=n))
            if np.isfinite(val).any():
                known = np.isfinite(val)
                name_of = f"{of}held-out text"
                drawn.append(Line(name_of, x[known], val[known], markers=True, group=n))
        events = [
            (course.place(step, axis), what)
            for course in courses.values()
            for step, what in course.events[:MOST_EVENTS]
        ]
        svg = plots.lines(drawn, axis, "nats a token", name=f"loss, {axis}", events=events)
        caption = (
            "Loss in training, smoothed over what was logged, with the raw one faint behind it; "
            "and on held-out text, each time that it was evaluated."
        )
        figures[axis] = Figure(svg, caption, f"{_seen_of_loss(courses)}, by {axis}")
    page.choice("Over", figures)


def _seen_of_loss(courses: dict[str, Course]) -> str:
    told = []
    for name, course in courses.items():
        for key, what in (("loss", "in training"), ("val_loss", "on held-out text")):
            y = course.values[key]
            if len(known := np.flatnonzero(np.isfinite(y))):
                first, last = known[0], known[-1]
                told.append(
                    f"{name}, loss {what}: from {y[first]:.2f} at step {course.steps[first]:,.0f} "
                    f"to {y[last]:.2f} at step {course.steps[last]:,.0f}"
                )
    return "; ".join(told) or "An empty plot: nothing was logged yet"


def _on_the_way(page: Page, courses: dict[str, Course]) -> None:
    page.heading("On the way")
    figures = []
    for key, what, label in (
        ("lr", "The learning rate", "learning rate"),
        ("grad_norm", "The gradient's length, before it is clipped", "norm"),
        ("tokens_per_second", "Speed", "tokens/s"),
        ("peak_share", "Share of the peak that this machine's matrix products reach", "share"),
    ):
        drawn = [
            Line(name, course.steps, course.values[key])
            for name, course in courses.items()
            if np.isfinite(course.values[key]).any()
        ]
        if drawn:
            known = np.concatenate([line.y[np.isfinite(line.y)] for line in drawn])
            svg = plots.lines(drawn, "steps", label, name=key, small=True)
            figures.append(
                Figure(svg, f"{what}.", f"{what}: {known.min():.3g} to {known.max():.3g}")
            )
    page.side_by_side(figures)


def _events(page: Page, course: Course, level: int) -> None:
    if course.events:
        page.heading("What happened", level)
        told = course.events[:MOST_TOLD]
        page.table([["step", ""], *([f"{step:,}", what] for step, what in told)], "what happened")
        if len(course.events) > len(told):
            page.paragraph(f"And {len(course.events) - len(told):,} more.")


def _forecast(page: Page, run: Run, course: Course, level: int) -> None:
    said = course.forecast
    if not said:
        return
    page.heading("What was said before, and what came", level)
    speed, step = _median(course.values["tokens_per_second"]), course.steps[-1:]
    memory = course.values["memory_bytes"][np.isfinite(course.values["memory_bytes"])]
    best = run.best()
    finished = len(step) and step[0] >= run.config.train.max_steps
    rows = [
        (
            "ms a step",
            1000 * said.get("step_seconds", np.nan),
            1000 * run.config.tokens_per_step / speed if speed else np.nan,
            "{:,.0f}",
        ),
        (
            "minutes, of which ours are without evaluations",
            said.get("seconds", np.nan) / 60,
            course.minutes[-1] if finished else np.nan,
            "{:,.1f}",
        ),
        (
            "memory, MB",
            said.get("peak_bytes", np.nan) / 1e6,
            memory.max() / 1e6 if len(memory) else np.nan,
            "{:,.0f}",
        ),
        (
            "best loss on held-out text",
            said.get("val_loss", np.nan),
            best["val_loss"] if best else np.nan,
            "{:.4f}",
        ),
    ]
    cells = [
        [name, *("–" if np.isnan(value) else form.format(value) for value in (before, came))]
        for name, before, came, form in rows
    ]
    page.table([["", "said", "came"], *cells], "what was forecast, and what came")


def _samples(page: Page, run: Run, level: int) -> None:
    samples = list(run.samples(LONGEST))
    if not samples:
        return
    page.heading("What it wrote as it learned", level)
    # Closer together at first, when most changes from one to the next.
    places = np.unique(np.geomspace(1, len(samples), MOST_SAMPLES).round().astype(int)) - 1
    for n in places:
        step, text = samples[n]
        page.heading(f"after {step:,} steps", level + 1)
        page.text(text)


def _quality(page: Page, run: Run, level: int) -> None:
    """What `mlxgpt eval --quality` found."""
    path = run.folder / "quality.json"
    if not files.is_file(path):
        return
    try:
        columns = files.parse_json(files.read_small(path))["columns"]
        rows = [["", *map(str, columns), "better"]]
        for metric in METRICS:
            values = [column[metric.name] for column in columns.values()]
            if any(value is not None for value in values):
                form = "{:.1%}" if metric.share else "{:.2f}"
                told = ["–" if v is None else form.format(float(v)) for v in values]
                rows.append([metric.name, *told, metric.better])
    except (ValueError, KeyError, TypeError, AttributeError):
        line = f"{path} is damaged, and left out: mlxgpt eval --quality makes it again"
        page.left_out.append(line)
        return
    page.heading("What its texts are worth", level)
    page.table(rows, "generated texts beside real ones and controls")


def _settings(page: Page, run: Run, level: int) -> None:
    name, base = nearest(run)
    changed = differences(base, run.config)
    page.heading("Settings", level)
    if not changed:
        page.paragraph(f"As in {name}.toml.")
        return
    rows = [[key, _told(old), _told(new)] for key, (old, new) in changed.items()]
    page.table([["setting", f"{name}.toml", "this run"], *rows], f"what differs from {name}.toml")


def _told(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(run: Run) -> tuple[str, Config]:
    """The config of ours that a run's differs from in the fewest settings, and its name; what that
    leaves to the data, the device or the weights it was begun with is as it was decided.
    """
    config, names = run.config, set(toml.built_in()) - {FINE_TUNING}
    if _parent(run):
        names = {FINE_TUNING}
    ours = {}
    for name in sorted(names):
        base = toml.load(toml.built_in()[name])
        decided = differences(base, config)
        if base.train.dtype != "auto":
            decided.pop("dtype", None)
        if base.model.vocab_size and not _parent(run):
            decided.pop("vocab_size", None)
        left = {"dtype", "vocab_size", *((*SHAPE, "block_size") if _parent(run) else ())}
        ours[name] = override(base, {key: new for key, (_, new) in decided.items() if key in left})
    name = min(ours, key=lambda name: len(differences(ours[name], config)))
    return name, ours[name]


def _parent(run: Run) -> str | None:
    """The run whose weights it was begun with."""
    return str(run.origin["run"]) if run.data_name and "run" in run.origin else None


def _machine(page: Page, run: Run, level: int) -> None:
    if on := run.surroundings():
        page.heading("Machine and versions", level)
        page.table(
            [["", ""], *([name, value] for name, value in on.items())], "machine and versions"
        )


def commands(run: Run) -> list[str]:
    """The command lines that train such a run, and show what it can do."""
    if not run.data_name:
        return [shlex.join(["mlxgpt", "generate", "--run", run.name])]
    name, base = nearest(run)
    words = ["mlxgpt", "train", "--config", name]
    if parent := _parent(run):
        words[2:] = ["--from", parent]
    elif name.removesuffix("-modern") in ("tier1", "tier2"):
        words[2:] = ["--tier", name[4]] + ["--recipe", "modern"] * name.endswith("-modern")
    data = run.config.data
    if data.source != base.data.source:
        words += ["--source", *data.source]
    if data.val_source:
        words += ["--val-source", *data.val_source]
    if data.tokenizer != base.data.tokenizer and not _parent(run):
        words += ["--tokenizer", data.tokenizer]
    for key, (_, new) in differences(base, run.config).items():
        flag = key.replace("_", "-")
        if isinstance(new, bool):
            words.append(f"--{flag}" if new else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(new)]
    tail = ["--run", run.name]
    return [
        shlex.join([*words, *tail]),
        shlex.join(["mlxgpt", "eval", *tail]),
        shlex.join(["mlxgpt", "generate", *tail]),
    ]
