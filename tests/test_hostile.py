"""Fuzz tests: malformed or malicious files get a clear error and do no other harm."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import pickletools
import resource
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlxgpt import api
from mlxgpt.config import toml
from mlxgpt.convert import importing
from mlxgpt.data import meta_pickle, readers
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.meta import SPLITS
from mlxgpt.data.tokenizers import char as tokenizers
from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.storage import loading
from mlxgpt.storage import run as runs
from mlxgpt.training.resume import median_step_seconds
from mlxgpt.training.spike_guard import SpikeGuard
from mlxgpt.training.step import make_train_step
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError
from tests.helpers.external_models import write_gpt2_folder
from tests.helpers.hostile_files import (
    BYTE_EDITS,
    HOSTILE_VALUES,
    TREE_CHANGES,
    apply_changes,
    apply_edits,
    dump_tree,
)

pytestmark = pytest.mark.usefixtures("no_check")
SPARE_BYTES = 2 << 30  # bytes of memory that a reader may use on top of current usage
FEW, MANY = 150, 10_000

FUZZ_COUNTS = [pytest.param(FEW), pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def limit_memory() -> Iterator[None]:
    """Limit memory, so that a small file that asks for gigabytes fails."""
    statm = Path("/proc/self/statm")
    if not statm.exists():  # macOS ignores this limit
        yield
        return
    used_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + SPARE_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(count: int, strategy: st.SearchStrategy[Any], body: Any) -> None:
    """Call `body` with `count` generated values; it may raise only UserError."""
    read = refused = 0

    @settings(
        max_examples=count,
        phases=[Phase.generate],  # no shrinking
        database=None,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(strategy)
    def check(value: Any) -> None:
        nonlocal read, refused
        read += 1
        try:
            body(value)
        except UserError:
            refused += 1

    check()
    print(f"{read} read, {refused} of them refused")
    assert refused > read // 3, "most changes are found"


SMALL_RUN = Path("runs/done")
CHECKPOINT = SMALL_RUN / "checkpoints/step-0000012"


def use_checkpoint() -> None:
    """Read a run's checkpoint in every way that mlxgpt does."""
    run = runs.open_run(SMALL_RUN)
    model, _ = loading.load_model(run, "12")
    assert all(isinstance(value, mx.array) for value in model.parameters()["wte"].values())
    saved = run.load_first_valid([CHECKPOINT], with_optimizer=True)
    SpikeGuard.from_tree(saved.guard)
    assert saved.optimizer is not None
    make_train_step(run.config).restore(saved.parameters, saved.optimizer)


@pytest.mark.parametrize("count", FUZZ_COUNTS)
def test_fuzzed_manifests(place: Path, count: int) -> None:
    path = CHECKPOINT / "manifest.json"
    original = path.read_text()

    def check_example(example: tuple[Any, Any]) -> None:
        changes, edits = example
        tree = apply_changes(json.loads(original), changes) if changes else None
        text = (
            dump_tree(tree, json_files.dump_checksummed).encode()
            if changes
            else apply_edits(original.encode(), edits)
        )
        path.write_bytes(text)
        use_checkpoint()

    fuzz(
        count,
        st.one_of(st.tuples(TREE_CHANGES, st.none()), st.tuples(st.none(), BYTE_EDITS)),
        check_example,
    )


@pytest.mark.parametrize("count", FUZZ_COUNTS)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_fuzzed_checkpoint_arrays(place: Path, count: int, name: str) -> None:
    """The manifest has the hash of the changed file."""
    original, manifest = (
        (CHECKPOINT / name).read_bytes(),
        json.loads((CHECKPOINT / "manifest.json").read_text()),
    )
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])

    def check_example(example: tuple[Any, Any]) -> None:
        changes, edits = example
        if changes:
            text = dump_tree(apply_changes(header, changes)).encode()
            content = len(text).to_bytes(8, "little") + text + original[8 + length :]
        else:
            content = apply_edits(original, edits)
        (CHECKPOINT / name).write_bytes(content)
        manifest["sha256"][name] = files.sha256_file(CHECKPOINT / name)
        del manifest["seal"]
        dumped = json_files.dump_checksummed(manifest)
        manifest["seal"] = ""
        (CHECKPOINT / "manifest.json").write_text(dumped)
        use_checkpoint()

    fuzz(
        count,
        st.one_of(st.tuples(TREE_CHANGES, st.none()), st.tuples(st.none(), BYTE_EDITS)),
        check_example,
    )


@pytest.mark.parametrize("count", FUZZ_COUNTS)
@pytest.mark.parametrize("name", ["run.json", "best.json"])
def test_fuzzed_run_json_and_best_json(place: Path, count: int, name: str) -> None:
    path = SMALL_RUN / name
    original = path.read_text()
    expected = runs.open_run(SMALL_RUN).best()

    def check_example(example: tuple[Any, Any]) -> None:
        changes, edits = example
        tree = apply_changes(json.loads(original), changes) if changes else None
        text = (
            dump_tree(tree, json_files.dump_checksummed).encode()
            if changes
            else apply_edits(original.encode(), edits)
        )
        path.write_bytes(text)
        run = runs.open_run(SMALL_RUN)
        assert "/" not in (run.data_name or "")
        api.evaluate(run="done")
        best = run.best()
        assert run.checkpoint_path().parent == run.checkpoints
        if name == "best.json":
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                stored = json_files.read_checksummed(path, runs.RUN_FORMAT)
                recorded_best = {"step": int(stored["step"]), "val_loss": float(stored["val_loss"])}
                assert str(best) == str(recorded_best)  # as strings, NaN equals itself
                return
            assert best == expected, "what is damaged is not refused: the metrics know it"
            raise UserError("", "")

    fuzz(
        count,
        st.one_of(st.tuples(TREE_CHANGES, st.none()), st.tuples(st.none(), BYTE_EDITS)),
        check_example,
    )


@pytest.mark.parametrize("count", FUZZ_COUNTS)
def test_fuzzed_configs(place: Path, count: int) -> None:
    path = SMALL_RUN / "config.toml"
    original = path.read_text()
    tree = tomllib.loads(original)
    names = [(section, name) for section, part in tree.items() for name in part]
    values = st.one_of(
        HOSTILE_VALUES.map(dump_tree), st.sampled_from(["inf", "nan", "1e400", "[" * 3000])
    )

    def check_example(example: tuple[Any, Any]) -> None:
        pair, edits = example
        if pair:
            number, value = pair
            name = names[number % len(names)][1]
            lines = [
                f"{name} = {value}" if line.startswith(f"{name} =") else line
                for line in original.splitlines()
            ]
            content = "\n".join(lines).encode("utf-8", "surrogatepass")
        else:
            content = apply_edits(original.encode(), edits)
        path.write_bytes(content)
        config = toml.load_config(path)
        assert toml.load_config(path) == config
        use_checkpoint()
        api.evaluate(run="done")

    pairs = st.tuples(st.integers(0, 1000), values)
    fuzz(
        count,
        st.one_of(st.tuples(pairs, st.none()), st.tuples(st.none(), BYTE_EDITS)),
        check_example,
    )


@pytest.mark.parametrize("count", FUZZ_COUNTS)
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_fuzzed_tokenizers(home: Path, count: int, kind: str) -> None:
    path = home / "tokenizer.json"
    merges = [(b"a", b"b"), (b"ab", b"c"), (b" ", b"a")]
    tokenizer: Any = BPETokenizer(merges)
    if kind == "char":
        tokenizer = tokenizers.CharTokenizer("abcdef \n", end_of_text=True)
    original = tokenizer.to_json()
    tree = json.loads(original)

    def check_example(example: tuple[Any, Any]) -> None:
        changes, edits = example
        text = dump_tree(apply_changes(tree, changes)) if changes else None
        path.write_bytes(text.encode() if text else apply_edits(original.encode(), edits))
        loaded = tokenizer_json.load_tokenizer(path)
        assert loaded.decode(loaded.encode("abc a")) == "abc a"
        assert len(loaded.fingerprint) == 64

    fuzz(
        count,
        st.one_of(st.tuples(TREE_CHANGES, st.none()), st.tuples(st.none(), BYTE_EDITS)),
        check_example,
    )


@pytest.mark.parametrize("count", FUZZ_COUNTS)
@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin"])
def test_fuzzed_data_folders(place: Path, count: int, name: str) -> None:
    """meta.json has the hashes of the changed arrays."""
    folder = Path("data/words")
    original, meta = (folder / name).read_bytes(), json.loads((folder / "meta.json").read_text())
    del meta["seal"]

    def check_example(example: tuple[Any, Any, bool]) -> None:
        changes, edits, fix_token_count = example
        tree = apply_changes(meta, changes) if changes else meta
        if name != "meta.json":
            (folder / name).write_bytes(apply_edits(original, edits or []))
            split_name = name.removesuffix(".bin")
            if isinstance(tree, dict) and isinstance(tree.get(split_name), dict):
                tree[split_name]["sha256"] = files.sha256_file(folder / name)
                if fix_token_count:
                    tree[split_name]["tokens"] = (folder / name).stat().st_size // 2
        text = dump_tree(tree, json_files.dump_checksummed).encode()
        if name == "meta.json" and edits:
            text = apply_edits(original, edits)
        (folder / "meta.json").write_bytes(text)
        dataset = open_dataset(folder)
        for split in SPLITS:
            ids = getattr(dataset, split).ids
            dataset.tokenizer.decode(int(i) for i in ids[:40])
        dataset.train.get_batch(0, seed=1, batch_size=2, block_size=8)

    changes = st.one_of(st.none(), TREE_CHANGES)
    fuzz(count, st.tuples(changes, BYTE_EDITS, st.booleans()), check_example)


OPCODES = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
CALLS = st.sampled_from([b"cos\nmkdir\n(X\x06\0\0\0sprungtR", b"(S'sprung'\nios\nmkdir\n"])


@pytest.mark.parametrize("count", FUZZ_COUNTS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_fuzzed_nanogpt_vocabularies(home: Path, count: int, protocol: int) -> None:
    """Real pickles with changed values, changed bytes, or inserted opcodes."""
    characters = "\n !aé日🙂"
    tree = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: id for id, character in enumerate(characters)},
    }
    original = pickle.dumps(tree, protocol)
    path = home / "meta.pkl"

    def check_example(example: tuple[Any, Any, Any]) -> None:
        changes, edits, insertions = example
        content = pickle.dumps(apply_changes(tree, changes), protocol) if changes else original
        for share, code in insertions:
            index = int(share * len(content))
            content = content[:index] + code + content[index:]
        path.write_bytes(apply_edits(content, edits))
        try:
            text = meta_pickle.read_char_vocab(path)
            assert len(set(text)) == len(text) > 0
            text.encode()
        finally:
            assert list(home.iterdir()) == [path], "nothing ran"

    inserts = st.lists(st.tuples(st.floats(0, 1), st.one_of(OPCODES, CALLS)), max_size=2)
    none: Any = st.just([])
    kinds = [(TREE_CHANGES, none, none), (none, BYTE_EDITS, none), (none, none, inserts)]
    fuzz(count, st.one_of([st.tuples(*kind) for kind in kinds]), check_example)


@pytest.mark.parametrize("count", FUZZ_COUNTS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", "history.jsonl"])
def test_fuzzed_logs_of_a_run(place: Path, count: int, name: str) -> None:
    """Logs are never refused: unreadable entries are skipped."""
    path = SMALL_RUN / name
    original = path.read_bytes()

    def check_example(example: tuple[Any, Any]) -> None:
        changes, edits = example
        content = apply_edits(original, edits)
        if changes and name != "samples.txt":
            lines = [json.loads(line) for line in original.splitlines()]
            tree = apply_changes(lines, changes)
            content = "\n".join(map(dump_tree, tree if isinstance(tree, list) else [tree])).encode()
        path.write_bytes(content)
        run = runs.open_run(SMALL_RUN)
        run.truncate_after(8)
        assert all(record["step"] <= 8 for record in run.metrics())
        assert 0 < (median_step_seconds(run) or 1.0) < math.inf
        assert all(type(text) is str for pair in run.last_environment().items() for text in pair)
        raise UserError("", "")

    fuzz(count, st.tuples(st.one_of(st.none(), TREE_CHANGES), BYTE_EDITS), check_example)


@pytest.mark.parametrize("count", FUZZ_COUNTS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_fuzzed_source_files(home: Path, count: int, suffix: str) -> None:
    path = home / f"text{suffix}"
    rows = [{"text": "to be <|endoftext|> or"}, {"text": "Grüße"}, {"text": "日本\n🙂" * 9}]
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        original = path.read_bytes()
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        original = "\n".join(lines).encode()

    def check_example(edits: Any) -> None:
        path.write_bytes(apply_edits(original, edits))
        for text, _ in readers.read_documents(path):
            text.encode("utf-8")
        if suffix == ".txt":  # almost any bytes are valid text
            raise UserError("", "")

    fuzz(count, BYTE_EDITS, check_example)


def test_huge_model_config_is_refused_before_building_the_model(place: Path) -> None:
    path = SMALL_RUN / "config.toml"
    path.write_text(path.read_text().replace("n_layer = 2", "n_layer = 2000000000"))
    with pytest.raises(UserError, match="different model settings"):
        api.generate(run="done")
    manifest = CHECKPOINT / "manifest.json"
    tree = json.loads(manifest.read_text())
    del tree["seal"]
    tree["model"] = toml.load_config(path).model.fingerprint
    manifest.write_text(json_files.dump_checksummed(tree))
    with pytest.raises(UserError, match="but the checkpoint has"):
        api.generate(run="done")


def test_huge_array_header_is_refused(place: Path) -> None:
    array = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    for text in (json.dumps({"wte.weight": array}), "[" * 100_000, "{}"):
        for length in (len(text), 1 << 62):
            header = length.to_bytes(8, "little") + text.encode()
            (CHECKPOINT / "model.safetensors").write_bytes(header + np.zeros(8, "<f4").tobytes())
            manifest = json.loads((CHECKPOINT / "manifest.json").read_text())
            del manifest["seal"]
            manifest["sha256"]["model.safetensors"] = files.sha256_file(
                CHECKPOINT / "model.safetensors"
            )
            (CHECKPOINT / "manifest.json").write_text(json_files.dump_checksummed(manifest))
            with pytest.raises(UserError, match=r"damaged|but the checkpoint has"):
                use_checkpoint()


IMPORT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("count", FUZZ_COUNTS)
@pytest.mark.parametrize("name", IMPORT_FILES)
def test_fuzzed_model_imports(home: Path, count: int, name: str) -> None:
    folder = home / "m"
    write_gpt2_folder(folder)
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    tree = json.loads(tokenizer.read_text(encoding="utf-8"))
    if name in ("vocab.json", "merges.txt"):
        vocab = tree["model"]["vocab"] | {"<|endoftext|>": 279}
        (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = "\n".join(" ".join(pair) for pair in tree["model"]["merges"])
        (folder / "merges.txt").write_text(lines, encoding="utf-8")
        tokenizer.unlink()
    if name.endswith("index.json"):
        shard = "model-00001-of-00001.safetensors"
        weight_map = dict.fromkeys(mx.load(str(weights)), shard)
        weights.rename(folder / shard)
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    path = folder / name
    original = path.read_bytes()
    header, tail = original, b""
    if name == "model.safetensors":
        length = int.from_bytes(original[:8], "little")
        header, tail = original[8 : 8 + length], original[8 + length :]

    def check_example(example: tuple[Any, Any]) -> None:
        changes, edits = example
        content = apply_edits(original, edits) if edits else b""
        if changes and name != "merges.txt":
            content = dump_tree(apply_changes(json.loads(header), changes)).encode()
            if tail:
                content = len(content).to_bytes(8, "little") + content + tail
        path.write_bytes(content)
        imported = importing.read_model(str(folder))
        mx.eval(imported.parameters)
        assert imported.tokenizer.decode(imported.tokenizer.encode("once a €")) == "once a €"
        if content == original or name == "tokenizer_config.json":
            raise UserError("", "")  # most changes have no effect here

    edits = st.tuples(st.none(), BYTE_EDITS)
    fuzz(
        count,
        edits if name == "merges.txt" else st.one_of(st.tuples(TREE_CHANGES, st.none()), edits),
        check_example,
    )
