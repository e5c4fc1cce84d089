from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api, config, loaded_model
from mlxgpt.cli.main import EXIT_INTERRUPTED, main
from mlxgpt.config import toml
from mlxgpt.config.fields import iter_fields
from mlxgpt.experiments.training_runs import TrainingRuns
from mlxgpt.inference.generate import GenerationOutput
from mlxgpt.training import selfcheck
from mlxgpt.training.estimate import NO_ESTIMATE
from mlxgpt.training.job import TrainRequest
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT, run_program

COMMANDS = [
    "prepare",
    "train",
    "compare",
    "import",
    "export",
    "generate",
    "eval",
    "check",
    "info",
    "runs",
    "report",
    "play",
    "bench",
    "doctor",
]
SMALL = ["--n-layer", "1", "--n-embd", "8", "--n-head", "1", "--block-size", "8"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the finished run, made the current folder."""
    monkeypatch.delenv("MLXGPT_HOME", raising=False)
    monkeypatch.chdir(trained)
    return trained


def help_text(command: str, capsys: Capture, flag: str = "--help") -> str:
    with pytest.raises(SystemExit) as error:
        main([command, flag])
    assert error.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: Capture) -> None:
    text = help_text(command, capsys)
    assert text.startswith(f"usage: mlxgpt {command}")
    assert "--json" in text
    assert "\nexample" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_overview_lists_every_command(capsys: Capture) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in COMMANDS)
    assert "mlxgpt train --tier 1" in text


def test_every_setting_has_a_flag_with_help(capsys: Capture) -> None:
    text = " ".join(help_text("train", capsys, "--help-all").split())
    for section in config.SECTIONS.values():
        for name, _, item in iter_fields(section):
            assert "--" + name.replace("_", "-") in text
            assert item.metadata["help"][:20] in text


FLAG_VALUES: dict[str, tuple[list[str], Any]] = {
    "n_layer": (["3"], 3),
    "n_head": (["2"], 2),
    "n_embd": (["96"], 96),
    "block_size": (["77"], 77),
    "vocab_size": (["99"], 99),
    "dropout": (["0.25"], 0.25),
    "bias": ([], True),
    "position": (["rope"], "rope"),
    "norm": (["rms"], "rms"),
    "qk_norm": ([], True),
    "mlp": (["relu2"], "relu2"),
    "tied": ([], True),
    "embedding_norm": ([], True),
    "value_embeddings": ([], True),
    "value_gate": ([], True),
    "smear": ([], True),
    "token_shift": ([], True),
    "induction_head": ([], True),
    "source": (["a.txt", "b.txt"], ("a.txt", "b.txt")),
    "val_source": (["c.txt"], ("c.txt",)),
    "tokenizer": (["char"], "char"),
    "template": ([], True),
    "mask": (["last"], "last"),
    "optimizer": (["muon"], "muon"),
    "learning_rate": (["3e-4"], 3e-4),
    "muon_learning_rate": (["0.03"], 0.03),
    "embedding_learning_rate": (["0.04"], 0.04),
    "schedule": (["wsd"], "wsd"),
    "cooldown": (["0.4"], 0.4),
    "min_lr_ratio": (["0.3"], 0.3),
    "warmup_steps": (["7"], 7),
    "decay_steps": (["70"], 70),
    "weight_decay": (["0.3"], 0.3),
    "beta1": (["0.8"], 0.8),
    "beta2": (["0.97"], 0.97),
    "eps": (["1e-6"], 1e-6),
    "grad_clip": (["0.5"], 0.5),
    "batch_size": (["5"], 5),
    "gradient_accumulation_steps": (["3"], 3),
    "max_steps": (["321"], 321),
    "seed": (["11"], 11),
    "dtype": (["bfloat16"], "bfloat16"),
    "reduce_dtype": (["bfloat16"], "bfloat16"),
    "gradient_checkpointing": ([], True),
    "log_interval": (["13"], 13),
    "eval_interval": (["17"], 17),
    "eval_tokens": (["29"], 29),
    "beta": (["0.2"], 0.2),
    "patience": (["4"], 4),
    "save_interval": (["19"], 19),
    "keep_checkpoints": (["3"], 3),
    "on_spike": (["skip"], "skip"),
    "lora_rank": (["4"], 4),
    "lora_alpha": (["8"], 8.0),
    "lora_layers": (["2"], 2),
    "dora": ([], True),
    "snapshots": ([], True),
    "sample_tokens": (["23"], 23),
}


def test_every_flag_is_passed_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FLAG_VALUES.keys() == config.SECTION_BY_FIELD.keys()
    received: dict[str, Any] = {}

    def setup(request: TrainRequest, *_: object) -> None:
        received.update(vars(request))
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxgpt.training.train.setup_job", setup)
    line = ["train", "--tier", "1", "--run", "x", "--max-minutes", "2", "--runs-dir", "r"]
    for name, (words, _) in FLAG_VALUES.items():
        line += ["--" + name.replace("_", "-"), *words]
    assert main(line) == 130
    for name, (_, value) in FLAG_VALUES.items():
        assert getattr(getattr(received["config"], config.SECTION_BY_FIELD[name]), name) == value, (
            name
        )
    assert (received["run_name"], received["max_minutes"]) == ("x", 2.0)
    assert (received["runs_dir"], received["config_name"]) == (Path("r"), "tier1")
    main(["train", "--tier", "1", "--no-bias", "--no-tied"])
    assert received["config"].model.bias is received["config"].model.tied is False


def test_every_sampling_flag_is_passed_to_generation(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}

    def stream(*args: Any, **_: Any) -> None:
        received["sampling"] = args[3]
        raise KeyboardInterrupt

    monkeypatch.setattr(loaded_model, "TextStream", stream)
    line = (
        "generate to --max-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 "
        "--repetition-penalty 1.2 --seed 4 --stop a --stop b --samples 2"
    )
    assert main(line.split()) == 130
    assert received["sampling"] == config.SamplingParams(9, 0.5, 3, 0.9, 0.1, 1.2, 4, ("a", "b"), 2)


@pytest.mark.parametrize(
    ("line", "problem", "remedy"),
    [
        ("train --tier 3", "argument --tier: invalid choice: ", "mlxgpt train --help"),
        ("train", "no config given", "--tier 1"),
        ("train --tier 1 --n-layers 3", "unknown argument '--n-layers'", "--n-layer"),
        ("train --tier 1 --n-layer x", "invalid int value", "--help"),
        ("train --tier 1 --n-head 5", "n_embd = 144", "multiple of 5"),
        ("train --tier 1 --source gone.txt", "'gone.txt'", "a path that exists"),
        ("train --tier 1 --config a.toml", "not allowed with argument --tier", "one of them"),
        ("train --config gone.toml", "cannot read the config gone.toml", "tier1"),
        ("generate", "no trained run in", "mlxgpt train --tier 1"),
        ("generate --run x", "there is no run named 'x'", "mlxgpt runs"),
        ("generate --top-p 2", "top_p = 2.0 is too large", "1.0"),
        ("eval", "no trained run in", "mlxgpt train"),
        ("prepare gone.txt", "'gone.txt'", "a path that exists"),
        ("prepare --tokenizer bpm words.txt", "tokenizer = 'bpm'", "bpe"),
        ("play --lang de", "invalid choice: 'de'", "mlxgpt play --help"),
        ("report --lang de", "invalid choice: 'de'", "mlxgpt report --help"),
        ("fly", "unknown command 'fly'", "mlxgpt --help"),
        ("bench mine.json", "unknown argument 'mine.json'", "mlxgpt bench --help"),
        ("bench report a.json", "unknown argument 'report'", "use: mlxgpt report FILE.json"),
        ("bench --tier 1 --distributed", "not allowed with argument --tier", "one of them"),
        ("compare a.toml --vary n_layer=1,2 --budget 5m", "argument --vary", "one of them"),
    ],
)
def test_mistakes_give_a_two_line_error_and_exit_code_2(
    home: Path, capsys: Capture, line: str, problem: str, remedy: str
) -> None:
    Path("words.txt").write_text("some words")
    assert main(line.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("mlxgpt: ")
    assert problem in lines[0]
    assert lines[1].startswith("  → ")
    assert remedy in lines[1]
    assert {path.name for path in home.iterdir()} == {"words.txt"}, "nothing is left behind"


def test_prepare_train_generate_eval_from_the_command_line(
    home: Path, text_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "run_self_check", lambda chosen: iter([]))
    assert main(["prepare", "words.txt", "--name", "w"]) == 0
    assert "data/w: 1,800 training tokens, 200 validation tokens" in capsys.readouterr().out
    small = [*SMALL, "--max-steps", "4", "--sample-tokens", "5"]
    assert main(["train", "--tier", "1", "--source", "w", *small]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "try it      mlxgpt generate --run runs/tier1-w 'to be or not" in output.err
    assert main(["generate", "to be", "--max-tokens", "9", "--seed", "3"]) == 0
    output = capsys.readouterr()
    assert len(output.out) == len("to be") + 9 + 1
    assert output.out.startswith("to be")
    assert "runs/tier1-w, step 4" in output.err
    assert "seed 3" in output.err
    assert main(["generate", "to be", "--samples", "2", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.count("to be") == 2
    assert main(["eval"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["eval", "--source", "words.txt"]) == 0
    assert "tokens         1,999" in capsys.readouterr().out
    assert main(["runs"]) == 0
    assert "tier1-w  4/4" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "n_layer = 1" in capsys.readouterr().out


def read_json_output(capsys: Capture) -> Any:
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_json_output_is_one_line_with_the_documented_keys(
    trained_folder: Path, capsys: Capture
) -> None:
    assert main(["eval", "--json"]) == 0
    assert {"loss", "bits_per_byte", "perplexity", "tokens"} <= read_json_output(capsys).keys()
    assert main(["generate", "to", "--max-tokens", "5", "--json"]) == 0
    result = read_json_output(capsys)
    assert {"texts", "tokens_per_second"} <= result.keys()
    assert len(result["texts"][0]) == 7
    assert main(["runs", "--json"]) == 0
    assert read_json_output(capsys)[0]["name"] == "done"
    assert main(["info", "--json"]) == 0
    assert read_json_output(capsys)["parameters"]["all"] > 0
    assert main(["prepare", "words.txt", "--json"]) == 0
    assert read_json_output(capsys)["train"]["tokens"] == 1800
    assert main(["check", "--json", *SMALL]) == 0
    checks = read_json_output(capsys)
    assert {"name", "ok", "detail"} <= checks[0].keys()
    assert [check["ok"] for check in checks].count(True) == 11
    assert all(check["ok"] is not False for check in checks)


def test_check_prints_every_check_with_its_reason(capsys: Capture) -> None:
    assert main(["check", *SMALL]) == 0
    text = capsys.readouterr().out
    assert (text.count("\nok "), text.count("info ")) == (11, 2)
    assert "Why ln V" in text


def test_failed_check_gives_exit_code_1(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [selfcheck.CheckResult("causality", False, "sees ahead")]
    monkeypatch.setattr(selfcheck, "run_self_check", lambda chosen: iter(broken))
    assert main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_mlxgpt_home_contains_the_data_folder(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXGPT_HOME", str(tmp_path / "home"))
    assert main(["prepare", str(text_file)]) == 0
    assert (tmp_path / "home" / "data" / "words" / "meta.json").exists()


@pytest.mark.parametrize(
    ("line", "function"),
    [
        ("prepare words.txt", "prepare"),
        ("train --tier 1", "train"),
        ("compare --tier 1 --vary dropout=0,0.1 --budget 5m", "compare"),
        ("import gpt2", "import_model"),
        ("export --to hf", "export"),
        ("generate to", "stream"),
        ("generate to --samples 2", "generate"),
        ("generate to --json", "generate"),
        ("eval", "evaluate"),
        ("eval --quality", "appraise"),
        ("eval --hellaswag", "hellaswag"),
        ("bench", "benchmark"),
        ("bench --distributed", "benchmark_distributed"),
        ("check", "check"),
        ("info", "info"),
        ("runs", "runs"),
        ("report", "report"),
        ("play", "play"),
    ],
)
def test_each_command_calls_its_api_function_directly(
    line: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most three frames of mlxgpt: main, the command's function and the API function."""
    frames: list[str] = []

    def called(*_: Any, **__: Any) -> None:
        frame = inspect.currentframe()
        while frame := frame.f_back if frame else None:
            if frame.f_globals["__name__"].startswith("mlxgpt"):
                frames.append(frame.f_code.co_name)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, function, called)
    assert main(line.split()) == EXIT_INTERRUPTED
    assert len(frames) == 2, frames
    assert frames[-1] == "main"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mlxgpt.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx.core', 'numpy', 'datasets', 'rich', 'tiktoken'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_generating_does_not_import_datasets(trained_folder: Path) -> None:
    code = (
        "import sys; from mlxgpt.cli.main import main\n"
        "main(['generate', 'to', '--max-tokens', '2'])\n"
        "sys.exit('datasets' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_hellaswag_prints_accuracy_and_number_of_examples(place: Path, capsys: Capture) -> None:
    row = {"ctx": "to be", "endings": ["or not", "rain", "in Spain", "plain"], "label": 0}
    (place / "endings.jsonl").write_text((json.dumps(row) + "\n") * 8)
    assert main(["eval", "--hellaswag", "endings.jsonl", "--json"]) == 0
    result = read_json_output(capsys)
    assert result["examples"] == 8
    assert result["accuracy"] in (0, 1)
    assert main(["eval", "--hellaswag", "endings.jsonl", "--limit", "3"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[0].startswith("accuracy        ")
    assert output.out.endswith("examples        3, 3 truncated to the block size\n")
    assert "\n\n" not in output.err
    assert "GPT-2 124M by the same rule" in output.err
    for line in (
        ["--limit", "3"],
        ["--hellaswag", "endings.jsonl", "--source", "words.txt"],
        ["--hellaswag", "endings.jsonl", "--quality"],
        ["--hellaswag", "endings.jsonl", "--limit", "0"],
    ):
        assert main(["eval", *line]) == 2, line
        capsys.readouterr()


def test_import_and_export_print_one_json_object(place: Path, capsys: Capture) -> None:
    assert main(["export", "--to", "hf", "--json"]) == 0
    assert read_json_output(capsys)["folder"] == "exports/done-hf"
    assert main(["import", "exports/done-hf", "--run", "back", "--json"]) == 0
    result = read_json_output(capsys)
    assert (result["run"], result["origin"]) == ("runs/back", {"folder": "done-hf"})


COMPARE = [
    *[
        "compare",
        "--tier",
        "1",
        "--vary",
        "dropout=0,0.3",
        "--source",
        "words.txt",
        "--budget",
        "6steps",
    ],
    *["--seeds", "2", "--name", "mine", "--batch-size", "2"],
    *SMALL,
]


def test_compare_prints_a_table_or_one_json_object(
    place: Path, capsys: Capture, no_check: None
) -> None:
    assert main(COMPARE) == 0
    table = capsys.readouterr().out
    assert "dropout=0.3" in table
    assert "difference" in table
    assert main([*COMPARE, "--json"]) == 0
    result = read_json_output(capsys)
    assert [v["name"] for v in result["variants"]] == ["dropout=0", "dropout=0.3"]
    assert result["variants"][0]["difference"] is None
    assert result == json.loads((place / "runs/compare/mine/mine.json").read_text())


def test_stopped_comparison_prints_how_to_resume(
    place: Path, capsys: Capture, no_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingRuns, "train", lambda *_: None)
    assert main(COMPARE) == EXIT_INTERRUPTED
    output = capsys.readouterr()
    assert "resume with: mlxgpt compare --tier 1 --vary dropout=0,0.3" in output.err
    assert "the same command resumes it" in output.out


def test_stopped_scaling_study_prints_how_to_resume(
    place: Path, capsys: Capture, no_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "longer.txt").write_text((place / "words.txt").read_text() * 200)
    monkeypatch.setattr(TrainingRuns, "train", lambda *_: None)
    monkeypatch.setattr("mlxgpt.experiments.scaling.MIN_STEPS", 1)
    monkeypatch.setattr("mlxgpt.experiments.planning.EstimateCache.get", lambda *_: NO_ESTIMATE)
    monkeypatch.setattr("mlxgpt.experiments.scaling._ScalingStudy._choose_plan", fixed_plan)
    text = ["--source", "longer.txt", "--tokenizer", "char", "--block-size", "8"]
    assert main(["scale", *text, "--budget", "5m"]) == EXIT_INTERRUPTED
    output = capsys.readouterr()
    assert "resume with: mlxgpt scale --source longer.txt" in output.err
    assert "the same command resumes it" in output.out


def fixed_plan(*_: object) -> dict[str, int]:
    return {"first": 0, "longest": 8}


def test_flags_are_not_abbreviated(capsys: Capture) -> None:
    assert main(["generate", "--temperat", "0"]) == 2
    assert "unknown argument '--temperat'" in capsys.readouterr().err


def test_str_of_a_user_error_has_both_lines() -> None:
    assert str(UserError("what is wrong", "what to do")) == "what is wrong\nwhat to do"


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        ("ValueError('first\\n  second')", "ValueError: first second"),
        ("KeyError('mine')", "KeyError: 'mine'"),
        ("RecursionError", "RecursionError"),
        ("ImportError('x')", "ImportError: x"),
    ],
)
@pytest.mark.parametrize(
    "program", [["-m", "mlxgpt"], ["-c", "from mlxgpt.cli import main as m; m.run_and_exit()"]]
)
def test_traceback_ends_with_what_to_do(
    home: Path, program: list[str], error: str, problem: str
) -> None:
    code = f"from mlxgpt.cli.commands import runs\ndef run(*_): raise {error}\nruns.run = run\n"
    (home / "sitecustomize.py").write_text(code)
    completed = subprocess.run(
        [sys.executable, *program, "runs"],
        env={**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = completed.stderr.splitlines()
    assert (completed.returncode, completed.stdout) == (1, "")
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == (
        f"mlxgpt: unexpected error, {problem}; please report it with the output of `mlxgpt doctor`"
    )


def test_ascii_terminal_gets_question_marks() -> None:
    def info_output(*arguments: str) -> bytes:
        command = [sys.executable, "-m", "mlxgpt", "info", "--tier", "1", *arguments]
        env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, capture_output=True, check=True).stdout

    assert b"attention, 4 ?" in info_output()
    parts = json.loads(info_output("--json"))["parameters"]
    assert any("4 ×" in part for part in parts), "whole, in JSON"


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["- item"], "- item"),
        (["-5 degrees"], "-5 degrees"),
        (["-5"], "-5"),
        (["-- he said"], "-- he said"),
        (["--"], "--"),
        (["--", "--"], "--"),
        (["--", "--weird"], "--weird"),
        (["--", "-h"], "-h"),
        (["--", "--seed"], "--seed"),
        (["--", "to be"], "to be"),
        ([], ""),
        ([""], ""),
    ],
)
def test_prompt_may_begin_with_a_dash(
    arguments: list[str], prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flags before the prompt."""
    prompts: list[tuple[str, int]] = []

    class EmptyStream(list[str]):
        prompt, result = "", GenerationOutput([""], 1, 0, 0.0, [True])

        def log_long_texts(self) -> None:
            """No text was truncated."""

    def stream(prompt: str = "", **options: Any) -> EmptyStream:
        prompts.append((prompt, options["seed"]))
        return EmptyStream()

    monkeypatch.setattr(api, "stream", stream)
    assert main(["generate", "--seed", "1", *arguments]) == 0
    assert prompts == [(prompt, 1)]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--weird"], "a prompt that begins with a dash comes last"),
        (["-yes"], "a prompt that begins with a dash comes last"),
        (["--", "--seed", "1"], "→ a prompt that begins with a dash comes last"),
        (["--", "--weird", "--seed", "1"], "→ a prompt that begins with a dash comes last"),
        (["--sed", "1"], "did you mean --seed?"),
        (["--stop", "--x"], "--flag=-VALUE"),
    ],
)
def test_ambiguous_dash_is_explained(arguments: list[str], remedy: str, capsys: Capture) -> None:
    assert main(["generate", *arguments]) == 2
    assert remedy in capsys.readouterr().err


def test_prompt_after_a_double_dash_in_a_shell(trained_folder: Path) -> None:
    line = ["generate", "--run", "done", "--max-tokens", "1", "--", "to be"]
    completed = run_program(*line)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith("to be")


def test_non_utf8_bytes_on_stdin_are_refused(trained_folder: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "mlxgpt", "generate", "--interactive", "--max-tokens", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"},
        input=b"caf\xe9\nto\n",
        capture_output=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert b"character 3 is the byte 0xe9" in completed.stderr
    assert b"to" in completed.stdout, "and the next line is taken"


def test_file_name_that_is_not_utf8_works_in_all_commands(
    home: Path, text: str, capsys: Capture, no_check: None
) -> None:
    """The file is prepared, trained on, listed, reported and exported."""
    source = os.fsdecode(b"caf\xe9.txt")
    try:
        Path(source).write_text(text, encoding="utf-8")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(errors="replace")  # same as the program
    line = ["train", "--tier", "1", *SMALL, "--max-steps", "2", "--source", source]
    for _ in range(2):
        assert main([*line, "--run", "done"]) == 0
    assert main(["prepare", source, "--json"]) == 0
    output = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(output)["origin"]["files"] == [source]
    for command in (
        ["info"],
        ["info", "--json"],
        ["runs", "--json"],
        ["report"],
        ["eval", "--source", source],
        ["export", "--to", "hf"],
        ["generate", "to", "--max-tokens", "1"],
        ["train", *SMALL[-2:], "--init-from", "done", "--source", source, "--max-steps", "1"],
    ):
        assert main(command) == 0, command
    assert "caf" in Path("exports/done-hf/README.md").read_text(encoding="utf-8")
    assert toml.load_config(Path("runs/done/config.toml")).data.source == (r"caf\udce9.txt",)
