"""HTML report of runs: curves, events, samples, settings, commands to reproduce them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxgpt.config import Config, diff_configs, override_config, toml
from mlxgpt.evaluation.sample_quality import QUALITY_FORMAT
from mlxgpt.evaluation.text_metrics import METRICS
from mlxgpt.html_report import plots
from mlxgpt.html_report.page import Figure, Page
from mlxgpt.html_report.plots import Line
from mlxgpt.html_report.run_metrics import X_AXES, RunMetrics, load_run_metrics
from mlxgpt.model.stats import count_parameters, count_trained_parameters
from mlxgpt.storage.run import Run
from mlxgpt.training.finetune import ARCHITECTURE_FIELDS
from mlxgpt.utils import files, json_files


def build_runs_page(runs: Sequence[Run]) -> Page:
    """Build the page for one run, or for several side by side."""
    page = Page(", ".join(run.name for run in runs))
    metrics_by_run = {
        _unique_run_name(runs, n): load_run_metrics(run) for n, run in enumerate(runs)
    }
    page.add_table(_summary_rows(runs, metrics_by_run), "summary of the runs")
    units = dict.fromkeys(run.config.loss_unit for run in runs)
    _add_loss_plots(page, metrics_by_run, ", ".join(units))
    _add_training_plots(page, metrics_by_run)
    for run, (name, metrics) in zip(runs, metrics_by_run.items(), strict=True):
        if len(runs) > 1:
            page.add_heading(name)
        level = 3 if len(runs) > 1 else 2
        _add_events(page, metrics, level)
        _add_estimate(page, run, metrics, level)
        _add_samples(page, run, level)
        _add_sample_quality(page, run, level)
        _add_settings_diff(page, run, level)
        _add_environment(page, run, level)
        page.add_heading("Reproduce", level)
        page.add_commands(build_repro_commands(run))
    return page


def _unique_run_name(runs: Sequence[Run], index: int) -> str:
    """A run's name, numbered if several runs have the same name."""
    name = runs[index].name
    return f"{name} ({index + 1})" if [run.name for run in runs].count(name) > 1 else name


def _summary_rows(runs: Sequence[Run], metrics_by_run: dict[str, RunMetrics]) -> list[list[str]]:
    rows = [["", *metrics_by_run]]
    columns = []
    for run, metrics in zip(runs, metrics_by_run.values(), strict=True):
        best, step = run.best(), int(metrics.steps[-1]) if len(metrics.steps) else 0
        max_steps = run.config.train.max_steps
        columns.append(
            {
                "parameters": f"{count_parameters(run.config.model):,}"
                + (
                    f", {count_trained_parameters(run.config):,} trained"
                    if run.config.lora.lora_rank
                    else ""
                ),
                "data": run.data_name or "imported",
                "steps": f"{step:,} of {max_steps:,}"
                + ("" if step >= max_steps else ", not finished"),
                "tokens": f"{step * run.tokens_per_step:,.0f}",
                "minutes of training": f"{metrics.minutes[-1]:,.1f}" if step else "–",
                "best val loss": (
                    f"{best['val_loss']:.4f} {run.config.loss_unit}, at step {best['step']:,}"
                    if best
                    else "–"
                ),
                "last training loss": _format_optional(metrics.last_value("loss"), "{:.4f}"),
                "median tokens/s": _format_optional(
                    _positive_median(metrics.values["tokens_per_second"]), "{:,.0f}"
                ),
            }
        )
    return rows + [[name, *(column[name] for column in columns)] for name in columns[0]]


def _format_optional(value: float | None, template: str) -> str:
    return "–" if value is None else template.format(value)


def _positive_median(values: np.ndarray) -> float | None:
    positive = values[np.isfinite(values) & (values > 0)]
    return float(np.median(positive)) if len(positive) else None


SMOOTHING_WINDOW = 30  # logged training losses
MAX_PLOT_EVENTS = 12  # per run; the events table lists more


def _add_loss_plots(page: Page, metrics_by_run: dict[str, RunMetrics], unit: str) -> None:
    page.add_heading("Loss")
    smoothed_loss = {
        name: plots.moving_average(metrics.values["loss"], SMOOTHING_WINDOW)
        for name, metrics in metrics_by_run.items()
    }
    figures = {}
    for axis in X_AXES:
        series = []
        for index, (name, metrics) in enumerate(metrics_by_run.items()):
            prefix = "" if len(metrics_by_run) == 1 else f"{name}, "
            x = metrics.x_values(axis)
            loss, val_loss = metrics.values["loss"], metrics.values["val_loss"]
            if np.isfinite(loss).any():
                series.append(
                    Line(f"{prefix}training loss", x, smoothed_loss[name], raw=loss, group=index)
                )
            if (finite := np.isfinite(val_loss)).any():
                label = f"{prefix}val loss"
                series.append(Line(label, x[finite], val_loss[finite], markers=True, group=index))
            base_loss = metrics.values["base_val_loss"]
            if (finite := np.isfinite(base_loss)).any():
                label = f"{prefix}val loss on the base model's data, nats per token"
                color = len(metrics_by_run) + index
                series.append(Line(label, x[finite], base_loss[finite], markers=True, group=color))
        events = [
            (metrics.x_at_step(step, axis), event)
            for metrics in metrics_by_run.values()
            for step, event in metrics.events[:MAX_PLOT_EVENTS]
        ]
        svg = plots.plot_lines(series, axis, unit, name=f"loss, {axis}", events=events)
        caption = (
            "Training loss, smoothed, with the logged values faint behind it; and validation loss "
            "at each evaluation."
        )
        figures[axis] = Figure(svg, caption, f"{_describe_loss(metrics_by_run)}, by {axis}")
    page.add_figure_tabs("x axis", figures)


def _describe_loss(metrics_by_run: dict[str, RunMetrics]) -> str:
    descriptions = []
    for name, metrics in metrics_by_run.items():
        for key, split in (
            ("loss", "training loss"),
            ("val_loss", "validation loss"),
            ("base_val_loss", "validation loss on the base model's data"),
        ):
            y, steps = metrics.values[key], metrics.steps
            if len(finite_indices := np.flatnonzero(np.isfinite(y))):
                first, last = finite_indices[0], finite_indices[-1]
                descriptions.append(
                    f"{name}, {split}: from {y[first]:.2f} at step {steps[first]:,.0f} "
                    f"to {y[last]:.2f} at step {steps[last]:,.0f}"
                )
    return "; ".join(descriptions) or "Empty plot: nothing has been logged yet"


def _add_training_plots(page: Page, metrics_by_run: dict[str, RunMetrics]) -> None:
    page.add_heading("Training metrics")
    figures = []
    for key, title, label in (
        ("val_margin", "DPO's reward margin between chosen and rejected answers", "margin"),
        ("val_accuracy", "Pairs with the higher reward for the chosen answer", "fraction"),
        ("val_kl", "KL divergence from the reference", "nats per token"),
        ("lr", "Learning rate", "learning rate"),
        ("grad_norm", "Gradient norm before clipping", "grad norm"),
        ("tokens_per_second", "Speed", "tokens/s"),
        ("peak_share", "Fraction of the measured matmul peak", "fraction"),
    ):
        series = []
        for name, metrics in metrics_by_run.items():
            y, is_evaluated = metrics.values[key], key.startswith("val_")
            if (finite_mask := np.isfinite(y)).any():
                shown = finite_mask if is_evaluated else slice(None)
                series.append(Line(name, metrics.steps[shown], y[shown], markers=is_evaluated))
        if series:
            finite = np.concatenate([line.y[np.isfinite(line.y)] for line in series])
            svg = plots.plot_lines(series, "steps", label, name=key, half_width=True)
            figures.append(
                Figure(svg, f"{title}.", f"{title}: {finite.min():.3g} to {finite.max():.3g}")
            )
    page.add_figure_grid(figures)


MAX_TABLE_EVENTS = 40


def _add_events(page: Page, metrics: RunMetrics, level: int) -> None:
    if metrics.events:
        page.add_heading("Events", level)
        listed_events = metrics.events[:MAX_TABLE_EVENTS]
        rows = [[f"{step:,}", event] for step, event in listed_events]
        page.add_table([["step", "event"], *rows], "events")
        if len(metrics.events) > len(listed_events):
            page.add_paragraph(f"And {len(metrics.events) - len(listed_events):,} more.")


def _add_estimate(page: Page, run: Run, metrics: RunMetrics, level: int) -> None:
    estimate = metrics.estimate
    if not estimate:
        return
    page.add_heading("Estimated and measured", level)
    speed, last_step = _positive_median(metrics.values["tokens_per_second"]), metrics.steps[-1:]
    memory = metrics.values["memory_bytes"][np.isfinite(metrics.values["memory_bytes"])]
    best = run.best()
    finished = len(last_step) and last_step[0] >= run.config.train.max_steps
    rows = [
        (
            "ms per step",
            1000 * estimate.get("step_seconds", np.nan),
            1000 * run.tokens_per_step / speed if speed else np.nan,
            "{:,.0f}",
        ),
        (
            "minutes (measured: without evaluations)",
            estimate.get("seconds", np.nan) / 60,
            metrics.minutes[-1] if finished else np.nan,
            "{:,.1f}",
        ),
        (
            "memory, MB",
            estimate.get("peak_bytes", np.nan) / 1e6,
            memory.max() / 1e6 if len(memory) else np.nan,
            "{:,.0f}",
        ),
        (
            "best val loss",
            estimate.get("val_loss", np.nan),
            best["val_loss"] if best else np.nan,
            "{:.4f}",
        ),
    ]
    cells = [
        [
            name,
            *(
                "–" if np.isnan(value) else template.format(value)
                for value in (estimated, measured)
            ),
        ]
        for name, estimated, measured, template in rows
    ]
    page.add_table([["", "estimated", "measured"], *cells], "estimated and measured")


MAX_SAMPLES = 8
MAX_SAMPLE_CHARS = 1500


def _add_samples(page: Page, run: Run, level: int) -> None:
    samples = list(run.samples(MAX_SAMPLE_CHARS))
    if not samples:
        return
    page.add_heading("Samples", level)
    # Geometric spacing: early samples differ most from each other.
    indices = np.unique(np.geomspace(1, len(samples), MAX_SAMPLES).round().astype(int)) - 1
    for index in indices:
        step, text = samples[index]
        page.add_heading(f"Step {step:,}", level + 1)
        page.add_preformatted(text)


def _add_sample_quality(page: Page, run: Run, level: int) -> None:
    """Add the results of `mlxgpt eval --quality` if they exist."""
    path = run.folder / "quality.json"
    if not files.is_file(path):
        return
    try:
        tree = json_files.parse_json(files.read_small(path))
        json_files.check_format(tree, QUALITY_FORMAT, str(path))
        columns = tree["columns"]
        rows = [["", *map(str, columns), "better"]]
        for metric in METRICS:
            values = [column[metric.name] for column in columns.values()]
            if any(value is not None for value in values):
                template = "{:.1%}" if metric.is_fraction else "{:.2f}"
                cells = ["–" if v is None else template.format(float(v)) for v in values]
                rows.append([metric.name, *cells, metric.better])
    except (ValueError, KeyError, TypeError, AttributeError):
        warning = f"{path} is damaged and was skipped; mlxgpt eval --quality writes it again"
        page.warnings.append(warning)
        return
    page.add_heading("Sample quality metrics", level)
    page.add_table(rows, "generated samples compared with real text and controls")


def _add_settings_diff(page: Page, run: Run, level: int) -> None:
    name, base = find_nearest_config(run)
    changed = diff_configs(base, run.config)
    page.add_heading("Settings", level)
    if not changed:
        page.add_paragraph(f"Same as {name}.toml.")
        return
    header = ["setting", f"{name}.toml", "this run"]
    rows = [[key, *map(_format_setting, values)] for key, values in changed.items()]
    page.add_table([header, *rows], f"differences from {name}.toml")


def _format_setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# Built-in configs of runs initialized from another run.
FINETUNE_CONFIGS = ("finetune", "lora", "dpo")


def find_nearest_config(run: Run) -> tuple[str, Config]:
    """Find the built-in config with the fewest settings that differ from a run's; name and config.

    Settings that it derives from the data, the device or the parent run are taken from the run.
    """
    config, paths, parent = run.config, toml.find_builtin_configs(), _parent_run(run)
    candidates = {}
    finetune_config = "lora" if config.lora.lora_rank else "finetune"
    if config.train.beta:
        finetune_config = "dpo"
    for name in [finetune_config] if parent else sorted(set(paths) - set(FINETUNE_CONFIGS)):
        base = toml.load_config(paths[name])
        derived = {*ARCHITECTURE_FIELDS, "block_size"} if parent else set()
        if base.train.dtype == "auto":
            derived.add("dtype")
        if not base.model.vocab_size:
            derived.add("vocab_size")
        changed = diff_configs(base, config)
        candidates[name] = override_config(
            base, {key: new for key, (_, new) in changed.items() if key in derived}
        )
    name = min(candidates, key=lambda name: len(diff_configs(candidates[name], config)))
    return name, candidates[name]


def _parent_run(run: Run) -> str | None:
    """Name of the run whose weights initialized this run; None if there is none."""
    return str(run.origin["run"]) if run.data_name and "run" in run.origin else None


def _add_environment(page: Page, run: Run, level: int) -> None:
    if environment := run.last_environment():
        page.add_heading("Environment", level)
        page.add_table([["", ""], *map(list, environment.items())], "environment")


def build_repro_commands(run: Run) -> list[str]:
    """Build the command lines to train the same run, evaluate it and generate from it."""
    if not run.data_name:
        return [shlex.join(["mlxgpt", "generate", "--run", run.name])]
    name, base = find_nearest_config(run)
    argv = ["mlxgpt", "train", "--config", name]
    if parent := _parent_run(run):
        argv[2:] = ["--init-from", parent]
    elif name.startswith("tier"):
        number, _, recipe = name[4:].partition("-")
        argv[2:] = ["--tier", number, *(["--recipe", recipe] if recipe else [])]
    data = run.config.data
    if data.source != base.data.source:
        argv += ["--source", *data.source]
    if data.val_source:
        argv += ["--val-source", *data.val_source]
    if data.tokenizer != base.data.tokenizer and not _parent_run(run):
        argv += ["--tokenizer", data.tokenizer]
    changed = diff_configs(base, run.config)
    if parent and run.config.lora.lora_rank:
        changed["lora_rank"] = (0, run.config.lora.lora_rank)  # selects the config
    for key, (_, new) in changed.items():
        flag = key.replace("_", "-")
        if isinstance(new, bool):
            argv.append(f"--{flag}" if new else f"--no-{flag}")
        else:
            argv += [f"--{flag}", str(new)]
    run_flag = ["--run", run.name]
    return [
        shlex.join([*argv, *run_flag]),
        shlex.join(["mlxgpt", "eval", *run_flag]),
        shlex.join(["mlxgpt", "generate", *run_flag]),
    ]
