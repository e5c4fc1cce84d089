"""Reports in Portuguese."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt import api
from mlxgpt.bench.chips import CHIPS
from mlxgpt.cli import main as cli
from mlxgpt.config import SECTION_BY_FIELD, override_config, toml
from mlxgpt.evaluation.text_metrics import METRICS
from mlxgpt.experiments.results import ComparisonRecord
from mlxgpt.experiments.statistics import PairedDifference
from mlxgpt.experiments.verdict import _format_advice, assign_verdicts
from mlxgpt.html_report import page, plots
from mlxgpt.html_report.bench_page import build_benchmark_page
from mlxgpt.html_report.compare_page import build_comparison_page
from mlxgpt.html_report.language import translate, use_language
from mlxgpt.html_report.page import Page
from mlxgpt.html_report.portuguese import PORTUGUESE
from mlxgpt.html_report.run_page import build_runs_page
from mlxgpt.html_report.scaling_page import build_scaling_page
from mlxgpt.storage.run import Run, open_run
from mlxgpt.utils.errors import UserError
from tests.helpers.bench_measurement import make_measurement
from tests.helpers.comparisons import (
    make_comparison_record,
    make_diverged_variant,
    make_scaling_record,
    make_variant_result,
)


def make_run(folder: Path) -> Run:
    """A real run, with all metrics, events and tables that a report can have."""
    column = {metric.name: 0.5 for metric in METRICS}
    columns = dict.fromkeys(("model", "real", "shuffled words", "n-gram"), column)
    (folder / "quality.json").write_text(json.dumps({"columns": columns}))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    extra = {"val_margin": 0.1, "val_accuracy": 0.7, "val_kl": 0.2, "base_val_loss": 2.0}
    extra |= {"peak_share": 0.3, "skipped": 2, "memory_bytes": 1e8}
    records = [json.loads(line) | extra for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = open_run(folder)
    cpu = {"BLAS": "OpenBLAS 0.3", "BLAS threads": "2", "compiler": "none"}
    history = {"step": 4, "on": {**run.last_environment(), **cpu}}
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps(history) + "\n")
    for step in range(50):
        run.log_rollback(8, 11 + step)
    return open_run(folder)


def make_comparison(**fields: Any) -> ComparisonRecord:
    baseline, *variants = [
        make_variant_result("va", [2.0, 2.1, 1.9]),
        make_variant_result("vb", [1.9, 1.95, 1.75]),
        make_variant_result("vc", [2.5, 2.6, 2.4]),
        make_variant_result("vd", [2.0, 2.1, 1.9]),
        *(make_variant_result(f"v{n}", [2.0 + n / 100]) for n in range(4)),
        make_diverged_variant("ve"),
        make_variant_result("vf", []),
    ]
    assign_verdicts([baseline, *variants], 0.05, sequential=False)
    for result, verdict, more in zip(
        variants[3:], ("uncertain", "undecided", "undecided"), (3, 1, None), strict=False
    ):
        difference = PairedDifference(-0.1, -0.3, 0.1, 0.2, more)
        result.verdict, result.advice = verdict, _format_advice(verdict, difference, 3)
    return make_comparison_record(baseline, *variants, **fields)


@pytest.fixture
def builders(place: Path) -> list[Callable[[], Page]]:
    """Functions that build pages of each kind, with all of their texts."""
    for name in ("first", "second"):
        shutil.copytree("runs/done", f"runs/{name}")
    run, second = make_run(Path("runs/first")), open_run(Path("runs/second"))
    for name in ("metrics.jsonl", "samples.txt", "history.jsonl", "best.json"):
        (second.folder / name).unlink()
    paired = replace(run, config=override_config(run.config, {"beta": 0.1, "lora_rank": 2}))
    imported = replace(run, data_name="")
    unchanged = replace(run, config=toml.load_config(toml.find_builtin_configs()["tier1"]))
    comparisons = [
        make_comparison(drift=(-0.1, 0.2), looks=[1, 3], final_looks=2, interrupted=True),
        make_comparison(sequential=True, judged_on="validation", final_looks=1),
    ]
    scalings = [scaling := make_scaling_record(), *(deepcopy(scaling) for _ in range(3))]
    scalings[1].test.losses = [loss + 0.5 for loss in scaling.test.losses]
    scalings[2].fit, scalings[2].advice, scalings[2].interrupted = None, [], True
    scalings[2].test.losses = []
    scalings[3].fit, scalings[3].advice = None, []
    scalings[3].fitted[0].losses[1] = np.inf
    measurement = make_measurement()
    machine = replace(measurement.machine, performance_cores=4, bandwidth=1e11, commit=None)
    small, large = measurement.tiers
    on_gpu = replace(small.training, peak_memory_of="MLX's arrays")
    tiers = (replace(small, training=on_gpu), large)
    measurements = [measurement, replace(measurement, machine=machine, tiers=tiers)]
    return [
        partial(build_runs_page, [run]),
        partial(build_runs_page, [second]),
        partial(build_runs_page, [paired, run, imported, unchanged]),
        *(partial(build_comparison_page, record) for record in comparisons),
        *(partial(build_scaling_page, record) for record in scalings),
        partial(build_benchmark_page, measurements[1:]),
        partial(build_benchmark_page, measurements),
    ]


def find_texts(html: str) -> set[str]:
    """Texts, labels and descriptions of a page, except samples and commands."""
    html = re.sub(r"<(style|pre|metadata)\b.*?</\1>", " ", html, flags=re.DOTALL)
    html = re.sub("</?(em|code)>", "", html)
    texts = re.findall(r">([^<]+)<", html) + re.findall(r'aria-label="([^"]*)"', html)
    return {" ".join(unescape(text).split()) for text in texts}


def render(build: Callable[[], Page], lang: str) -> str:
    with use_language(lang):
        return build().to_html()


DATA = re.compile(
    r"|".join(
        [
            r"(\d: )?Intel\(R\) Xeon\(R\) Processor(, [\d-]+)?|OpenBLAS .*|Linux-[\w.-]+",
            r"first(, first)*|first \(\d\)|second|words|v[a-f]|dropout 0.1 \(0.0\)|inf",
            r"(small|large),?|[\w-]+\.toml|cpu|float32|mlx|mlxgpt|numpy|Python",
            r"[\d.]+ (min|h|MB|GB|GB/s|MFLOP|GFLOP/s)",
            *map(re.escape, [*SECTION_BY_FIELD, *(chip.name for chip in CHIPS)]),
        ]
    )
)
ENGLISH = re.compile(r"\b(the|of|and|with|this|each|to|from|by|steps?|training|is|in|not)\b", re.I)
# Only in reports of special cases; or cut off in the legend of a plot.
UNUSED = {
    "nats per token, nats per pair",
    "In this range the loss depends on the number of parameters or of tokens alone.",
    "val loss on the base model's data, nats per token",
    "{}, val loss on the base model's data, nats per token",
}


def test_reports_in_portuguese_have_no_english_texts(
    builders: list[Callable[[], Page]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text that a page or a plot translates has an entry in the table, or is a name."""
    untranslated: set[str] = set()

    def record(text: str) -> str:
        translation = translate(text)
        if translation == text and text not in PORTUGUESE and re.search("[A-Za-z]{2}", text):
            untranslated.add(text)
        return translation

    monkeypatch.setattr(page, "translate", record)
    monkeypatch.setattr(plots, "translate", record)
    pages = [render(build, "pt") for build in builders]
    assert all('<html lang="pt-BR">' in html for html in pages)
    values = open_run(Path("runs/first")).last_environment().values()
    assert {text for text in untranslated if not DATA.fullmatch(text)} - {*values} == set()
    texts = {text for html in pages for text in find_texts(html)}
    assert not [text for text in texts if ENGLISH.search(text)]
    joined, unused = "\n".join(texts), set()
    for key, translation in PORTUGUESE.items():
        assert len(re.findall(r"#|\{\}", key)) == translation.count("{}"), key
        plain = re.escape(re.sub("[*`]", "", translation)).replace(r"\{\}", ".+?")
        unused |= set() if re.search(plain, joined) else {key}
    assert unused <= UNUSED, unused - UNUSED


def test_samples_settings_and_commands_stay(place: Path) -> None:
    run = open_run(place / "runs" / "done")
    pages = [render(partial(build_runs_page, [run]), lang) for lang in ("en", "pt")]
    blocks = [re.findall(r"<pre.*?</pre>", html, flags=re.DOTALL) for html in pages]
    assert blocks[0] == blocks[1]
    assert len(blocks[0]) > 3
    assert all("n_embd" in html for html in pages)


def test_lang_chooses_the_language(place: Path) -> None:
    path = place / "runs" / "done" / "report.html"
    for flags, text in (([], "Learning rate"), (["--lang", "pt"], "Taxa de aprendizado")):
        assert cli.main(["report", "done", *flags]) == 0
        assert text in path.read_text()
    assert "Taxa" not in api.report("done").read_text(), "only within the call"
    for function in (api.report, api.play):
        with pytest.raises(UserError, match="lang = 'de' is not a supported language"):
            function("done", lang="de")


@given(st.text() | st.lists(st.sampled_from(["; ", ": ", ". A", "from 1 to 2", ", "])).map("".join))
def test_any_text_can_be_translated(text: str) -> None:
    with use_language("en"):
        assert translate(text) == text
    with use_language("pt"):
        translate(text)
