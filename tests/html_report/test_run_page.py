from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.cli import main as cli
from mlxgpt.config import Config, diff_configs, override_config, toml
from mlxgpt.html_report.page import Page
from mlxgpt.html_report.run_page import build_repro_commands, build_runs_page, find_nearest_config
from mlxgpt.storage.run import Run, open_run
from mlxgpt.training.job import TrainRequest
from tests.html_report.test_page import ParsedPage

HOSTILE = "<script>alert('x')</script>\x1b[31m $x^2$ \0 ﷽ 🦊"


@pytest.fixture
def run(place: Path) -> Run:
    return open_run(place / "runs" / "done")


def page_text(page: Page) -> str:
    return ParsedPage(page.to_html()).text


def test_page_has_all_sections(run: Run) -> None:
    quality = {"columns": {"model": {"distinct-1": 0.5}, "real": {"distinct-1": None}}}
    (run.folder / "quality.json").write_text(json.dumps(quality))
    run.log_rollback(8, 11)
    text = page_text(build_runs_page([run]))
    best = run.best()
    assert best
    for words in (
        "12 of 12",
        f"{best['val_loss']:.4f} nats per token, at step {best['step']}",
        "nats per token",
        "learning rate",
        "tokens/s",
        "Step 4",
        "Step 12",
        "rolled back from step 11",
        "Estimated and measured",
        ".toml",
        "n_embd",
        "backend",
        "mlxgpt train --",
    ):
        assert words in text, words
    html = build_runs_page([run]).to_html()
    assert "training loss: from" in html, "plots have alt text"
    assert html == build_runs_page([run]).to_html(), "pages are reproducible"


def test_selection_of_samples(run: Run) -> None:
    (run.folder / "samples.txt").write_text(
        "".join(f"--- step {n}\nsample {n}\n\n" for n in range(1, 201))
    )
    text = page_text(build_runs_page([run]))
    shown_steps = [n for n in range(1, 201) if f"Step {n}\n" in text]
    assert len(shown_steps) == 8
    assert (shown_steps[0], shown_steps[-1]) == (1, 200)
    assert shown_steps[1] < 5, "early samples are closer together"


def test_page_of_several_runs(run: Run, place: Path) -> None:
    elsewhere = place / "elsewhere" / "done"
    elsewhere.parent.mkdir()
    run.folder.rename(place / "runs" / "first")
    first = open_run(place / "runs" / "first")
    text = page_text(build_runs_page([first, first]))
    assert "first (1), training loss" in text
    assert "first (2), val loss" in text
    assert text.count("Reproduce") == 2


def test_text_of_run_files_is_escaped(run: Run, place: Path) -> None:
    name = "<script>alert(1)<\\script>$\\frac{"
    run.folder.rename(place / "runs" / name)
    run = open_run(place / "runs" / name)
    (run.folder / "samples.txt").write_bytes(b"--- step 1\n" + HOSTILE.encode() + b"\xff\xfe\n")
    history = {"step": 0, "on": {HOSTILE: HOSTILE}, "changed": {}, "forecast": {HOSTILE: 1}}
    (run.folder / "history.jsonl").write_text(json.dumps(history) + "\n")
    html = build_runs_page([run]).to_html()
    assert "<script" not in html
    assert "\x1b" not in html
    text = ParsedPage(html).text
    assert "🦊" in text
    assert name in text


@pytest.mark.parametrize("content", ["{", "[]", '{"columns": {"a": {}}}', '{"columns": 5}', "\0"])
def test_damaged_files_are_skipped_with_a_warning(run: Run, content: str, notes: list[str]) -> None:
    (run.folder / "quality.json").write_text(content)
    (run.folder / "best.json").write_text(content)
    page = build_runs_page([run])
    text = page_text(page)
    assert "Sample quality metrics" not in text
    assert "quality.json is damaged and was skipped" in page.warnings[0]


def test_page_of_a_run_that_has_just_started(run: Run) -> None:
    for name in ("metrics.jsonl", "samples.txt", "history.jsonl", "best.json"):
        (run.folder / name).unlink()
    text = page_text(build_runs_page([run]))
    assert "0 of 12, not finished" in text


def parse_train_command(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Config, dict[str, object]]:
    """Return the config and the origin of the initial weights of a train command."""
    requests: list[tuple[Config, dict[str, object]]] = []

    def setup(request: TrainRequest, *_: object) -> None:
        init = request.init_weights
        requests.append((request.config, dict(init.origin) if init else {}))
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxgpt.training.train.setup_job", setup)
    assert cli.main(shlex.split(line)[1:]) == cli.EXIT_INTERRUPTED
    return requests[0]


def test_command_reproduces_the_config(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config, origin = parse_train_command(build_repro_commands(run)[0], monkeypatch)
    resolved = {"dtype": "float32", "vocab_size": run.config.model.vocab_size}
    assert diff_configs(override_config(config, resolved), run.config) == {}
    assert config.data == run.config.data
    assert origin == {}


@pytest.mark.parametrize(
    ("adapters", "config_name"),
    [({}, "finetune"), ({"lora_rank": 8}, "lora"), ({"lora_rank": 2, "dora": True}, "lora")],
)
def test_command_of_a_finetuned_run_reproduces_the_config(
    place: Path,
    text_file: Path,
    no_check: None,
    monkeypatch: pytest.MonkeyPatch,
    adapters: dict[str, Any],
    config_name: str,
) -> None:
    options = {"source": text_file, "max_steps": 2, "eval_interval": 1, "sample_tokens": 0}
    options |= adapters
    summary = api.train(init_from="done", run="tuned", **options)  # type: ignore[arg-type]
    run = open_run(summary.run)
    line = build_repro_commands(run)[0]
    assert line.startswith("mlxgpt train --init-from done --source ")
    assert "--n-embd" not in line
    assert find_nearest_config(run)[0] == config_name
    assert (" trained</td>" in api.report("tuned").read_text()) == bool(adapters)
    config, origin = parse_train_command(line, monkeypatch)
    assert diff_configs(override_config(config, {"dtype": "float32"}), run.config) == {}
    assert origin == dict(run.origin)


def test_nearest_config_is_the_original_one(run: Run) -> None:
    for name in ("tier1", "tier2", "tier1-modern", "tier2-racing", "gpt2-124m"):
        config = toml.load_config(toml.find_builtin_configs()[name])
        changed = override_config(config, {"seed": 5, "dtype": "float32", "max_steps": 77})
        nearest, base = find_nearest_config(replace(run, config=changed))
        assert nearest == name
        assert set(diff_configs(base, changed)) == {"seed", "max_steps"}
