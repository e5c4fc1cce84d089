"""The table of what can go wrong: each message is taken from the mistake itself."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import pytest

from mlxgpt.backend import device_errors, macos, memory_limits
from mlxgpt.backend.memory_limits import MemoryLimit
from mlxgpt.cli import main as cli
from mlxgpt.cli.commands import evaluate
from mlxgpt.convert import huggingface
from mlxgpt.data import http, hub
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.tokenizers import bpe
from mlxgpt.storage.run import Run
from mlxgpt.training import loggers
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT, TRAIN, Capture, refused
from tests.helpers.external_models import SHAPE, folder_of
from tests.training.test_loggers import Wandb

pytestmark = pytest.mark.usefixtures("no_check")  # the self-check has tests of its own


# Each mistake of the table: what happens, and the line it ends with.


def no_network(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def nothing(*_: object, **__: object) -> bytes:
        raise ConnectionError

    patch.setattr(hub, "_load_splits", nothing)
    patch.setattr("huggingface_hub.HfApi.dataset_info", nothing)
    patch.setattr(http, "download_bytes", nothing)
    return refused(capsys, "prepare", "shakespeare")


def unknown_dataset(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def refuse(dataset: hub.HubDataset) -> None:
        from datasets.exceptions import DatasetNotFoundError

        raise DatasetNotFoundError

    patch.setattr(hub, "_load_splits", refuse)
    patch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return refused(capsys, "prepare", "hf:owner/name")


def other_column(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    rows = SimpleNamespace(features={"story": SimpleNamespace(dtype="string")}, cache_files=[])
    patch.setattr(hub, "_load_splits", lambda dataset: {"train": rows})
    return refused(capsys, "prepare", "hf:owner/name")


def no_owner(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "prepare", "hf:name")


def latin_1(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    return refused(capsys, "prepare", "my.txt")


def binary(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_bytes(b"binary\0\1")
    return refused(capsys, "prepare", "my.txt")


def wide(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_bytes("Once upon a time there was a mouse.\n".encode("utf-16-le"))
    return refused(capsys, "prepare", "my.txt")


def compressed(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt.gz").write_bytes(gzip.compress(b"Once upon a time"))
    return refused(capsys, "prepare", "my.txt.gz")


def comma_separated(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.csv").write_text("text,author\nOnce,me\n")
    return refused(capsys, "prepare", "my.csv")


def broken_link(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").symlink_to("/gone/my.txt")
    return refused(capsys, "prepare", "my.txt")


def empty(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text(" \n")
    return refused(capsys, "prepare", "my.txt")


def one_character(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("a" * 5000)
    return refused(capsys, "prepare", "my.txt")


def short(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be")
    assert cli.main(["prepare", "my.txt"]) == 0
    return refused(capsys, "train", "--tier", "1", "--source", "my.txt")


def small_for_a_batch(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be " * 60)
    assert cli.main(["prepare", "my.txt"]) == 0
    return refused(capsys, "train", "--tier", "1", "--source", "my.txt")


def other_text(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.txt").write_text("to be or not to be")
    assert cli.main(["prepare", "my.txt"]) == 0
    Path("my.txt").write_text("something else altogether")
    return refused(capsys, "train", "--tier", "1", "--source", "my.txt")


def no_column(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.jsonl").write_text('{"story": "Once", "author": "me"}\n')
    return refused(capsys, "prepare", "my.jsonl")


def cut_short(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["Once", "upon"]}), "my.parquet")
    Path("my.parquet").write_bytes(Path("my.parquet").read_bytes()[:-9])
    return refused(capsys, "prepare", "my.parquet")


def large_vocabulary(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "prepare", "words.txt", "--vocab-size", "9999")


def small_vocabulary(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "prepare", "words.txt", "--vocab-size", "100")


def no_trainer(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("trainer.py").write_text("raise SystemExit(3)")
    patch.setattr(bpe, "TRAINER_SCRIPT", Path("trainer.py"))
    return refused(capsys, "prepare", "words.txt", "--vocab-size", "300")


def pickled(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("arrays").mkdir()
    for name in ("train.bin", "val.bin"):
        Path("arrays", name).write_bytes(b"\1\0")
    Path("arrays/meta.pkl").write_bytes(pickle.dumps({"vocab_size": print}))
    return refused(capsys, "train", "--tier", "2", "--source", "arrays")


def over_the_limit(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, *TRAIN, "--source", "data/words", "--memory-limit", "0.01")


def tracker(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, *TRAIN, "--source", "data/words", "--report-to", "wandb")


def no_tracker(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(loggers, "find_spec", lambda name: None)
    return tracker(place, capsys, patch)


def no_login(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Wandb(patch).logged_in = False
    return tracker(place, capsys, patch)


def no_server(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def fail(**_: object) -> None:
        raise TimeoutError("no answer")

    Wandb(patch).module.__dict__["init"] = fail
    return tracker(place, capsys, patch)


def no_time(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, *TRAIN, "--source", "data/words", "--max-minutes", "1e-7")


def other_settings(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.chdir(place)
    assert cli.main([*TRAIN, "--source", "data/words"]) == 0
    return refused(capsys, *TRAIN, "--source", "data/words", "--n-layer", "2")


def typo(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("my.toml").write_text("[model]\nn_layers = 6\n")
    return refused(capsys, "train", "--config", "my.toml")


def diverged(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    line = [*TRAIN, "--source", "data/words", "--learning-rate", "1e30", "--grad-clip", "0"]
    capsys.readouterr()
    assert cli.main([*line, "--log-interval", "1", "--max-steps", "20"]) == 2
    return capsys.readouterr().err.splitlines()[-2].removeprefix("mlxgpt: ")


def two_at_once(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    with files.file_lock(Path("runs/done"), "training"):
        return refused(capsys, *TRAIN, "--source", "data/words", "--run", "done")


def full_disk(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    patch.setattr(files, "fsync_path", full)
    Path("my.txt").write_text("to be or not to be")
    return refused(capsys, "prepare", "my.txt")


def nearly_full_disk(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 21))
    capsys.readouterr()
    assert cli.main([*TRAIN, "--source", "data/words", "--n-embd", "64", "--run", "new"]) == 2
    return capsys.readouterr().err.splitlines()[-2].removeprefix("mlxgpt: ")


def link(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    path = Path("runs/done/metrics.jsonl")
    path.rename("elsewhere")
    path.symlink_to(Path("elsewhere").absolute())
    return refused(capsys, "generate")


def newer(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    path = Path("runs/done/run.json")
    path.write_text(path.read_text().replace('"format": 3', '"format": 9'))
    return refused(capsys, "generate")


def no_run(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    shutil.rmtree("runs")
    return refused(capsys, "generate")


def damaged(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    for path in Path("runs").rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    return refused(capsys, "generate")


def unknown_letter(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "generate", "to be €")


def not_unicode(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "generate", os.fsdecode(b"caf\xe9"))


def dashed_prompt(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "generate", "--weird")


def no_room_for_notes(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def full(run: Run, record: dict[str, object]) -> None:
        raise OSError(28, "No space left on device", str(run.folder / "metrics.jsonl"))

    patch.setattr(Run, "log", full)
    capsys.readouterr()
    assert cli.main([*TRAIN, "--source", "data/words", "--run", "new"]) == 2
    return capsys.readouterr().err.splitlines()[-2].removeprefix("mlxgpt: ")


def deleted_in_training(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    real = Run.add_sample

    def deleted(run: Run, step: int, text: str) -> None:
        shutil.rmtree("runs/new")
        real(run, step, text)

    patch.setattr(Run, "add_sample", deleted)
    return refused(capsys, *TRAIN, "--source", "data/words", "--run", "new")


def no_best(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("runs/done/best.json").write_text("{}")
    Path("runs/done/metrics.jsonl").unlink()
    return refused(capsys, "generate")


def too_large(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, *TRAIN, "--source", "data/words", "--n-embd", "400000")


def intel(
    place: Path, capsys: Capture, patch: pytest.MonkeyPatch, *, translated: bool = False
) -> str:
    with patch.context() as other:
        other.setattr(sys, "platform", "darwin")
        other.setattr(os, "uname", lambda: type("uname", (), {"machine": "x86_64"}))
        other.setattr(macos, "_is_rosetta", lambda: translated)
        return refused(capsys, "runs")


def rosetta(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return intel(place, capsys, patch, translated=True)


def model_away(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    return refused(capsys, "import", "gpt2")


def pickled_weights(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    folder_of(place / "small")
    (place / "small/model.safetensors").rename(place / "small/pytorch_model.bin")
    return refused(capsys, "import", "small")


def another_architecture(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    folder_of(place / "small")
    (place / "small/config.json").write_text('{"model_type": "llama"}')
    return refused(capsys, "import", "small")


def without_heads(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    folder_of(place / "small")
    path = place / "small/config.json"
    path.write_text(path.read_text().replace("n_head", "heads"))
    return refused(capsys, "import", "small")


def classifier(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    folder_of(place / "small")
    path = place / "small/model.safetensors"
    arrays = cast(dict[str, mx.array], mx.load(str(path)))
    mx.eval(arrays)
    mx.save_safetensors(str(path), {**arrays, "score.weight": mx.ones((2, 32))})
    return refused(capsys, "import", "small")


def not_finite(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    parameters = folder_of(place / "small")
    parameters["ln_f.bias"][0] = float("nan")
    huggingface.write_gpt2_parameters(place / "small", SHAPE, parameters)
    return refused(capsys, "import", "small")


def overflowing(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    parameters = folder_of(place / "small")
    large = {name: value * 1e30 for name, value in parameters.items()}
    huggingface.write_gpt2_parameters(place / "small", SHAPE, large)
    assert cli.main(["import", "small"]) == 0
    return refused(capsys, "generate", "--run", "small", "--json", "once")


def another_tokenizer(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    folder_of(place / "small")
    (place / "small/tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    return refused(capsys, "import", "small")


def no_text_of_its_own(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    folder_of(place / "small")
    assert cli.main(["import", "small"]) == 0
    return refused(capsys, "eval", "--run", "small")


def narrow(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "export", "--to", "mlx-lm", "--quantize", "8")


def exported_already(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    assert cli.main(["export", "--to", "hf"]) == 0
    return refused(capsys, "export", "--to", "hf")


Mistake = Callable[[Path, Capture, pytest.MonkeyPatch], str]


def other_parts(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    line = [*TRAIN, "--source", "words.txt", "--position", "rope", "--run", "modern"]
    assert cli.main(line) == 0
    return refused(capsys, "export", "--run", "modern", "--to", "hf")


def one_variant(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "compare", "tier1", "--budget", "5m")


def no_budget(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "compare", "tier1", "tier2", "--budget", "5")


def twins(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    vary = ["--vary", "log_interval=1,2"]
    return refused(capsys, "compare", "--tier", "1", *vary, "--budget", "5m")


def other_texts(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    words = Path("words.txt").read_text(encoding="utf-8")
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text(words * (1 + (name == "b")), encoding="utf-8")
        config = f'[data]\nsource = "{name}.txt"\n'
        Path(f"{name}.toml").write_text(config, encoding="utf-8")
        cli.main(["prepare", f"{name}.txt"])
    return refused(capsys, "compare", "a.toml", "b.toml", "--budget", "5steps")


def unclear_bench(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "bench", "mine.json")


def no_measurement(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    Path("mine.json").write_text('{"format": 99}')
    return refused(capsys, "bench", "report", "mine.json")


def measurement_away(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return refused(capsys, "bench", "report", "yours.json")


def cut_while_in_use(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    tokens = open_dataset(Path("data/words")).train
    os.truncate("data/words/train.bin", 100)
    with pytest.raises(UserError) as caught:
        tokens.get_batch(0, seed=1, batch_size=1, block_size=8)
    return caught.value.problem


def cut_array(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    os.truncate("data/words/train.bin", 100)
    return refused(capsys, "eval", "--run", "done")


def little_memory(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    container = MemoryLimit("this container's memory", 10**8, 10**8, 2 * 10**8, "give it more.")
    patch.setattr(memory_limits, "memory_limits", lambda: [container])
    return refused(capsys, "eval", "--run", "done")


def no_memory_left(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    def fails(*_: object) -> int:
        raise MemoryError

    patch.setattr(evaluate, "run", fails)
    return refused(capsys, "eval", "--run", "done")


def gpu_failed(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return _of_the_gpu(capsys, patch, "Impacting Interactivity (0000000e:kIOGPUCommandBuffer…).")


def gpu_memory(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return _of_the_gpu(capsys, patch, "Insufficient Memory (00000008:kIOGPUCommandBuffer…).")


def _of_the_gpu(capsys: Capture, patch: pytest.MonkeyPatch, reason: str) -> str:
    def fails(*_: object) -> int:
        raise RuntimeError(device_errors.METAL_PREFIX + reason)

    patch.setattr(evaluate, "run", fails)
    return refused(capsys, "eval", "--run", "done")


def crashed(place: Path, capsys: Capture, patch: pytest.MonkeyPatch) -> str:
    return memory_limits.crash_error("SIGSEGV").problem


MISTAKES: list[Mistake] = [
    cut_while_in_use,
    cut_array,
    little_memory,
    no_memory_left,
    gpu_failed,
    gpu_memory,
    crashed,
    no_network,
    unknown_dataset,
    other_column,
    no_owner,
    latin_1,
    binary,
    wide,
    compressed,
    comma_separated,
    broken_link,
    empty,
    one_character,
    short,
    small_for_a_batch,
    other_text,
    no_column,
    cut_short,
    large_vocabulary,
    small_vocabulary,
    no_trainer,
    pickled,
    over_the_limit,
    no_tracker,
    no_login,
    no_server,
    no_time,
    other_settings,
    typo,
    diverged,
    two_at_once,
    full_disk,
    nearly_full_disk,
    no_run,
    damaged,
    newer,
    link,
    model_away,
    pickled_weights,
    another_architecture,
    without_heads,
    classifier,
    not_finite,
    overflowing,
    another_tokenizer,
    no_text_of_its_own,
    narrow,
    exported_already,
    other_parts,
    one_variant,
    no_budget,
    twins,
    other_texts,
    unclear_bench,
    no_measurement,
    measurement_away,
    unknown_letter,
    not_unicode,
    dashed_prompt,
    no_room_for_notes,
    deleted_in_training,
    no_best,
    too_large,
    intel,
    rosetta,
]


def listed() -> list[str]:
    """The messages in the table; … stands for what differs from case to case."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ``? ?(.+?) ?``? \|", page.split("\n## ")[0], flags=re.MULTILINE)
    assert rows
    return rows


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_table_shows_what_a_person_sees(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    problem = mistake(place, capsys, monkeypatch)
    matching = [
        row for row in listed() if re.fullmatch(".*".join(map(re.escape, row.split("…"))), problem)
    ]
    assert len(matching) == 1, f"the table has not exactly one row for: {problem}"


def test_the_table_lists_nothing_else() -> None:
    assert len(listed()) == len(MISTAKES)
