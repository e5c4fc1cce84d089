"""Make each mistake in docs/troubleshooting.md and check that its message is in the table."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxgpt.backend import device_errors, macos, memory_limits
from mlxgpt.backend.memory_limits import MemoryLimit
from mlxgpt.cli import main as cli
from mlxgpt.cli.commands import evaluate
from mlxgpt.config import DataConfig, ModelConfig
from mlxgpt.convert import huggingface
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.convert.importing import create_imported_run
from mlxgpt.data import http, hub
from mlxgpt.data.chat_template import CHATML
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.examples import ExampleFormat, prepare_examples
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage.run import Run
from mlxgpt.training import finetune, loggers
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT, TRAIN_ARGS, Capture, expect_error
from tests.helpers.external_models import MODEL_CONFIG, write_gpt2_folder
from tests.training.test_loggers import FakeWandb

pytestmark = pytest.mark.usefixtures("no_check")  # the self-check has its own tests


# The mistakes of the table: each function makes one and returns the error message.


def no_network(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def raise_connection_error(*_: object, **__: object) -> bytes:
        raise ConnectionError

    patch.setattr(hub, "_load_splits", raise_connection_error)
    patch.setattr("huggingface_hub.HfApi.dataset_info", raise_connection_error)
    patch.setattr(http, "download_bytes", raise_connection_error)
    return expect_error(capsys, "prepare", "shakespeare")


def unknown_dataset(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def refuse(dataset: hub.HubDataset) -> None:
        from datasets.exceptions import DatasetNotFoundError

        raise DatasetNotFoundError

    patch.setattr(hub, "_load_splits", refuse)
    patch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return expect_error(capsys, "prepare", "hf:owner/name")


def missing_text_column(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    rows = SimpleNamespace(features={"story": SimpleNamespace(dtype="string")}, cache_files=[])
    patch.setattr(hub, "_load_splits", lambda dataset: {"train": rows})
    return expect_error(capsys, "prepare", "hf:owner/name")


def dataset_without_owner(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "prepare", "hf:name")


def latin1_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    return expect_error(capsys, "prepare", "my.txt")


def binary_file(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_bytes(b"binary\0\1")
    return expect_error(capsys, "prepare", "my.txt")


def utf16_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_bytes("Once upon a time there was a mouse.\n".encode("utf-16-le"))
    return expect_error(capsys, "prepare", "my.txt")


def compressed_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt.gz").write_bytes(gzip.compress(b"Once upon a time"))
    return expect_error(capsys, "prepare", "my.txt.gz")


def csv_file(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.csv").write_text("text,author\nOnce,me\n")
    return expect_error(capsys, "prepare", "my.csv")


def broken_link(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").symlink_to("/gone/my.txt")
    return expect_error(capsys, "prepare", "my.txt")


def empty_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text(" \n")
    return expect_error(capsys, "prepare", "my.txt")


def single_character(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("a" * 5000)
    return expect_error(capsys, "prepare", "my.txt")


def short_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be")
    assert cli.main(["prepare", "my.txt"]) == 0
    return expect_error(capsys, "train", "--tier", "1", "--source", "my.txt")


def too_small_for_batch(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be " * 60)
    assert cli.main(["prepare", "my.txt"]) == 0
    return expect_error(capsys, "train", "--tier", "1", "--source", "my.txt")


def changed_source(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be")
    assert cli.main(["prepare", "my.txt"]) == 0
    Path("my.txt").write_text("something else altogether")
    return expect_error(capsys, "train", "--tier", "1", "--source", "my.txt")


def missing_jsonl_field(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.jsonl").write_text('{"story": "Once", "author": "me"}\n')
    return expect_error(capsys, "prepare", "my.jsonl")


def truncated_parquet(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["Once", "upon"]}), "my.parquet")
    Path("my.parquet").write_bytes(Path("my.parquet").read_bytes()[:-9])
    return expect_error(capsys, "prepare", "my.parquet")


def large_vocabulary(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "prepare", "words.txt", "--vocab-size", "9999")


def small_vocabulary(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "prepare", "words.txt", "--vocab-size", "100")


def failing_bpe_trainer(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("trainer.py").write_text("raise SystemExit(3)")
    patch.setattr(bpe, "TRAINER_SCRIPT", Path("trainer.py"))
    return expect_error(capsys, "prepare", "words.txt", "--vocab-size", "300")


def pickled_meta(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("arrays").mkdir()
    for name in ("train.bin", "val.bin"):
        Path("arrays", name).write_bytes(b"\1\0")
    Path("arrays/meta.pkl").write_bytes(pickle.dumps({"vocab_size": print}))
    return expect_error(capsys, "train", "--tier", "2", "--source", "arrays")


def over_memory_limit(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, *TRAIN_ARGS, "--source", "data/words", "--memory-limit", "0.01")


def train_with_wandb(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, *TRAIN_ARGS, "--source", "data/words", "--report-to", "wandb")


def wandb_not_installed(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(loggers, "find_spec", lambda name: None)
    return train_with_wandb(place, capsys, patch)


def wandb_without_login(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    FakeWandb(patch).is_logged_in = False
    return train_with_wandb(place, capsys, patch)


def wandb_without_server(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def fail(**_: object) -> None:
        raise TimeoutError("no answer")

    FakeWandb(patch).module.__dict__["init"] = fail
    return train_with_wandb(place, capsys, patch)


def no_time_left(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, *TRAIN_ARGS, "--source", "data/words", "--max-minutes", "1e-7")


def other_settings(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.chdir(place)
    assert cli.main([*TRAIN_ARGS, "--source", "data/words"]) == 0
    return expect_error(capsys, *TRAIN_ARGS, "--source", "data/words", "--n-layer", "2")


def config_typo(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.toml").write_text("[model]\nn_layers = 6\n")
    return expect_error(capsys, "train", "--config", "my.toml")


def diverged(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    line = [*TRAIN_ARGS, "--source", "data/words", "--learning-rate", "1e30", "--grad-clip", "0"]
    capsys.readouterr()
    assert cli.main([*line, "--log-interval", "1", "--max-steps", "20"]) == 2
    return capsys.readouterr().err.splitlines()[-2].removeprefix("mlxgpt: ")


def run_in_use(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    with files.file_lock(Path("runs/done"), "training"):
        return expect_error(capsys, *TRAIN_ARGS, "--source", "data/words", "--run", "done")


def full_disk(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def raise_disk_full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    patch.setattr(files, "fsync_path", raise_disk_full)
    Path("my.txt").write_text("to be or not to be")
    return expect_error(capsys, "prepare", "my.txt")


def nearly_full_disk(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 21))
    capsys.readouterr()
    assert cli.main([*TRAIN_ARGS, "--source", "data/words", "--n-embd", "64", "--run", "new"]) == 2
    return capsys.readouterr().err.splitlines()[-2].removeprefix("mlxgpt: ")


def linked_file(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    path = Path("runs/done/metrics.jsonl")
    path.rename("elsewhere")
    path.symlink_to(Path("elsewhere").absolute())
    return expect_error(capsys, "generate")


def newer_run_format(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    path = Path("runs/done/run.json")
    path.write_text(path.read_text().replace('"format": 3', '"format": 9'))
    return expect_error(capsys, "generate")


def no_run(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    shutil.rmtree("runs")
    return expect_error(capsys, "generate")


def damaged_checkpoints(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    for path in Path("runs").rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    return expect_error(capsys, "generate")


def unknown_character(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "generate", "to be €")


def invalid_utf8_prompt(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "generate", os.fsdecode(b"caf\xe9"))


def dashed_prompt(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "generate", "--weird")


def disk_full_for_metrics(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def raise_disk_full(run: Run, record: dict[str, object]) -> None:
        raise OSError(28, "No space left on device", str(run.folder / "metrics.jsonl"))

    patch.setattr(Run, "log", raise_disk_full)
    capsys.readouterr()
    assert cli.main([*TRAIN_ARGS, "--source", "data/words", "--run", "new"]) == 2
    return capsys.readouterr().err.splitlines()[-2].removeprefix("mlxgpt: ")


def run_deleted_in_training(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    original = Run.add_sample

    def delete_run(run: Run, step: int, text: str) -> None:
        shutil.rmtree("runs/new")
        original(run, step, text)

    patch.setattr(Run, "add_sample", delete_run)
    return expect_error(capsys, *TRAIN_ARGS, "--source", "data/words", "--run", "new")


def no_best_checkpoint(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("runs/done/best.json").write_text("{}")
    Path("runs/done/metrics.jsonl").unlink()
    return expect_error(capsys, "generate")


def model_too_large(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, *TRAIN_ARGS, "--source", "data/words", "--n-embd", "400000")


def intel_mac(
    place: Path, capsys: Capture, patch: pytest.MonkeyPatch, *, translated: bool = False
) -> str:
    with patch.context() as context:
        context.setattr(sys, "platform", "darwin")
        context.setattr(os, "uname", lambda: type("uname", (), {"machine": "x86_64"}))
        context.setattr(macos, "_is_rosetta", lambda: translated)
        return expect_error(capsys, "runs")


def rosetta(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return intel_mac(place, capsys, patch, translated=True)


def model_not_downloaded(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    return expect_error(capsys, "import", "gpt2")


def pickled_weights(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    write_gpt2_folder(place / "small")
    (place / "small/model.safetensors").rename(place / "small/pytorch_model.bin")
    return expect_error(capsys, "import", "small")


def another_architecture(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    write_gpt2_folder(place / "small")
    (place / "small/config.json").write_text('{"model_type": "llama"}')
    return expect_error(capsys, "import", "small")


def config_without_heads(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    write_gpt2_folder(place / "small")
    path = place / "small/config.json"
    path.write_text(path.read_text().replace("n_head", "heads"))
    return expect_error(capsys, "import", "small")


def classifier(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    write_gpt2_folder(place / "small")
    path = place / "small/model.safetensors"
    arrays = cast(dict[str, mx.array], mx.load(str(path)))
    mx.eval(arrays)
    mx.save_safetensors(str(path), {**arrays, "score.weight": mx.ones((2, 32))})
    return expect_error(capsys, "import", "small")


def nonfinite_weights(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    parameters = write_gpt2_folder(place / "small")
    parameters["ln_f.bias"][0] = float("nan")
    huggingface.write_gpt2_parameters(place / "small", MODEL_CONFIG, parameters)
    return expect_error(capsys, "import", "small")


def overflowing_weights(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    parameters = write_gpt2_folder(place / "small")
    large = {name: value * 1e30 for name, value in parameters.items()}
    huggingface.write_gpt2_parameters(place / "small", MODEL_CONFIG, large)
    assert cli.main(["import", "small"]) == 0
    return expect_error(capsys, "generate", "--run", "small", "--json", "once")


def another_tokenizer(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    write_gpt2_folder(place / "small")
    (place / "small/tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    return expect_error(capsys, "import", "small")


def no_validation_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    write_gpt2_folder(place / "small")
    assert cli.main(["import", "small"]) == 0
    return expect_error(capsys, "eval", "--run", "small")


def narrow_model(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "export", "--to", "mlx-lm", "--quantize", "8")


def already_exported(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    assert cli.main(["export", "--to", "hf"]) == 0
    return expect_error(capsys, "export", "--to", "hf")


ErrorCase = Callable[[Path, Capture, pytest.MonkeyPatch], str]


def unexportable_parts(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    line = [*TRAIN_ARGS, "--source", "words.txt", "--position", "rope", "--run", "modern"]
    assert cli.main(line) == 0
    return expect_error(capsys, "export", "--run", "modern", "--to", "hf")


def single_variant(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "compare", "tier1", "--budget", "5m")


def invalid_budget(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "compare", "tier1", "tier2", "--budget", "5")


def scaling_budget_without_time(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "scale", "--source", "words.txt", "--budget", "5Mtokens")


def short_text_for_scaling(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    (place / "longer.txt").write_text((place / "words.txt").read_text() * 20)
    text = ("--source", "longer.txt", "--tokenizer", "char", "--block-size", "8")
    cli.main(["prepare", "longer.txt"])
    return expect_error(capsys, "scale", *text, "--budget", "5m")


def identical_variants(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    vary = ["--vary", "log_interval=1,2"]
    return expect_error(capsys, "compare", "--tier", "1", *vary, "--budget", "5m")


def different_texts(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    words = Path("words.txt").read_text(encoding="utf-8")
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text(words * (1 + (name == "b")), encoding="utf-8")
        config = f'[data]\nsource = "{name}.txt"\n'
        Path(f"{name}.toml").write_text(config, encoding="utf-8")
        cli.main(["prepare", f"{name}.txt"])
    return expect_error(capsys, "compare", "a.toml", "b.toml", "--budget", "5steps")


def invalid_report(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("mine.json").write_text('{"format": 99}')
    return expect_error(capsys, "report", "mine.json")


def missing_report(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "report", "yours.json")


def dataset_truncated_in_use(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    tokens = open_dataset(Path("data/words")).train
    os.truncate("data/words/train.bin", 100)
    with pytest.raises(UserError) as error:
        tokens.get_batch(0, seed=1, batch_size=1, block_size=8)
    return error.value.problem


def truncated_dataset(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    os.truncate("data/words/train.bin", 100)
    return expect_error(capsys, "eval", "--run", "done")


def little_memory(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    container = MemoryLimit("this container's memory", 10**8, 10**8, 2 * 10**8, "give it more.")
    patch.setattr(memory_limits, "memory_limits", lambda: [container])
    return expect_error(capsys, "eval", "--run", "done")


def out_of_memory(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def fail(*_: object) -> int:
        raise MemoryError

    patch.setattr(evaluate, "run", fail)
    return expect_error(capsys, "eval", "--run", "done")


def gpu_failed(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return _fail_on_gpu(capsys, patch, "Impacting Interactivity (0000000e:kIOGPUCommandBuffer…).")


def gpu_memory(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return _fail_on_gpu(capsys, patch, "Insufficient Memory (00000008:kIOGPUCommandBuffer…).")


def _fail_on_gpu(capsys: Capture, patch: pytest.MonkeyPatch, reason: str) -> str:
    def fail(*_: object) -> int:
        raise RuntimeError(device_errors.METAL_PREFIX + reason)

    patch.setattr(evaluate, "run", fail)
    return expect_error(capsys, "eval", "--run", "done")


def crashed_process(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return memory_limits.crash_error("SIGSEGV").problem


def tune(capsys: Capture, *rows: Any, init_from: str = "bytes", flags: Sequence[str] = ()) -> str:
    """Fine-tune on some rows; returns the error message."""
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if init_from == "bytes":
        config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=257)
        parameters = flatten_params(GPT(config).parameters())
        model = ImportedModel(config, parameters, BPETokenizer([]), add_bos_token=True)
        create_imported_run(model, Path("runs/bytes"))
    return expect_error(capsys, "train", "--init-from", init_from, "--source", "my.jsonl", *flags)


QUESTION, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}
TALK = {"messages": [QUESTION, ANSWER]}


def examples_as_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.jsonl").write_text(json.dumps(TALK))
    return expect_error(capsys, "train", "--tier", "2", "--source", "my.jsonl")


def prepared_examples(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    tokenizer = BPETokenizer([])
    format = ExampleFormat(CHATML, template_strings=False, last_only=False, max_tokens=99)
    Path("my.jsonl").write_text(f"{json.dumps(TALK)}\n{json.dumps({'messages': [ANSWER]})}\n")
    folder = prepare_examples(DataConfig(("my.jsonl",)), format, tokenizer, Path("data"))
    return expect_error(capsys, "train", "--tier", "2", "--source", str(folder))


def row_without_keys(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune(capsys, TALK, {"text": "a"})


def half_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune(capsys, {"prompt": "a", "completion": [ANSWER]})


def no_messages(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune(capsys, {"messages": ["Who?"]})


def no_answer(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune(capsys, TALK, {"messages": [QUESTION]})


def unstable_template(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    template = CHATML.replace("message['content']", "(message['content'] if loop.last else '')")
    patch.setattr(finetune, "CHATML", template)
    return tune(capsys, TALK, {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]})


def no_trained_token(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune(
        capsys, {"prompt": "a" * 100, "completion": "b"}, {"prompt": "a", "completion": "b"}
    )


def single_example(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune(capsys, TALK, TALK)


def text_among_examples(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("Once")
    return tune(capsys, TALK, flags=["my.txt"])


def no_tokens_for_roles(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune(capsys, TALK, init_from="done")


def no_end_of_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    row = {"prompt": "to be ", "completion": "or not"}
    return tune(capsys, row, {**row, "completion": "plain"}, init_from="done")


def tune_on_pair(capsys: Capture, *flags: str, **changes: Any) -> str:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", **changes}
    row = {name: value for name, value in pair.items() if value is not None}
    return tune(capsys, row, row, flags=flags)


def equal_answers(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune_on_pair(capsys, rejected="b")


def answers_equal_when_cut(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune_on_pair(capsys, chosen="b" * 99 + "a", rejected="b" * 99)


def pair_without_prompt(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune_on_pair(capsys, prompt=None)


def pair_among_answers(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    return tune(capsys, row, {"prompt": "a", "completion": "b"})


def beta_without_pairs(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return tune(capsys, TALK, TALK, flags=["--beta", "1"])


def beta_without_model(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "train", "--tier", "1", "--source", "data/words", "--beta", "1")


LORA_ARGS = ("train", "--init-from", "runs/done", "--source", "data/words", "--lora-rank", "2")


def lora_without_base(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, "train", "--tier", "1", "--lora-rank", "2")


def base_elsewhere(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return expect_error(capsys, *LORA_ARGS, "--runs-dir", "other")


def base_missing(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    assert cli.main([*LORA_ARGS, "--max-steps", "1", "--run", "tuned"]) == 0
    Path("runs/done").rename("runs/moved")
    return expect_error(capsys, "generate", "--run", "tuned")


def base_changed(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    assert cli.main([*LORA_ARGS, "--max-steps", "1", "--run", "tuned"]) == 0
    for path in Path("runs/done/checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    return expect_error(capsys, "generate", "--run", "tuned")


ERROR_CASES: list[ErrorCase] = [
    lora_without_base,
    base_elsewhere,
    base_missing,
    base_changed,
    examples_as_text,
    prepared_examples,
    row_without_keys,
    half_text,
    no_messages,
    no_answer,
    unstable_template,
    no_trained_token,
    single_example,
    text_among_examples,
    no_tokens_for_roles,
    no_end_of_text,
    equal_answers,
    answers_equal_when_cut,
    pair_without_prompt,
    pair_among_answers,
    beta_without_pairs,
    beta_without_model,
    dataset_truncated_in_use,
    truncated_dataset,
    little_memory,
    out_of_memory,
    gpu_failed,
    gpu_memory,
    crashed_process,
    no_network,
    unknown_dataset,
    missing_text_column,
    dataset_without_owner,
    latin1_text,
    binary_file,
    utf16_text,
    compressed_text,
    csv_file,
    broken_link,
    empty_text,
    single_character,
    short_text,
    too_small_for_batch,
    changed_source,
    missing_jsonl_field,
    truncated_parquet,
    large_vocabulary,
    small_vocabulary,
    failing_bpe_trainer,
    pickled_meta,
    over_memory_limit,
    wandb_not_installed,
    wandb_without_login,
    wandb_without_server,
    no_time_left,
    other_settings,
    config_typo,
    diverged,
    run_in_use,
    full_disk,
    nearly_full_disk,
    no_run,
    damaged_checkpoints,
    newer_run_format,
    linked_file,
    model_not_downloaded,
    pickled_weights,
    another_architecture,
    config_without_heads,
    classifier,
    nonfinite_weights,
    overflowing_weights,
    another_tokenizer,
    no_validation_text,
    narrow_model,
    already_exported,
    unexportable_parts,
    single_variant,
    invalid_budget,
    scaling_budget_without_time,
    short_text_for_scaling,
    identical_variants,
    different_texts,
    invalid_report,
    missing_report,
    unknown_character,
    invalid_utf8_prompt,
    dashed_prompt,
    disk_full_for_metrics,
    run_deleted_in_training,
    no_best_checkpoint,
    model_too_large,
    intel_mac,
    rosetta,
]


def read_table_rows() -> list[str]:
    """Return the messages in the table; … stands for parts that vary."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| error \| \|\n\|---\|---\|\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    rows = re.findall(r"^\| ``? ?(.+?) ?``? \|", "".join(tables), flags=re.MULTILINE)
    assert rows
    return rows


@pytest.mark.parametrize("mistake", ERROR_CASES, ids=lambda mistake: mistake.__name__)
def test_table_matches_the_message_of_each_mistake(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, mistake: ErrorCase
) -> None:
    problem = mistake(place, capsys, monkeypatch)
    matching = [
        row
        for row in read_table_rows()
        if re.fullmatch(".*".join(map(re.escape, row.split("…"))), problem)
    ]
    assert len(matching) == 1, f"the table has not exactly one row for: {problem}"


def test_table_has_no_other_rows() -> None:
    assert len(read_table_rows()) == len(ERROR_CASES)
