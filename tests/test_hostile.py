"""What a stranger's files can do: be refused in one line, and nothing else."""

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
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.external_models import folder_of
from tests.helpers.hostile_files import CHANGES, EDITS, VALUES, as_json, changed, edited

pytestmark = pytest.mark.usefixtures("no_check")
ROOM = 2 << 30  # bytes of memory that a reader may take beside what is there
FEW, MANY = 150, 10_000

fuzzed = [pytest.param(FEW), pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def no_more_memory() -> Iterator[None]:
    """A file of some kilobytes that asks for gigabytes does not get them."""
    told = Path("/proc/self/statm")
    if not told.exists():  # a Mac takes no notice of this limit
        yield
        return
    used = int(told.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(count: int, strategy: st.SearchStrategy[Any], body: Any) -> None:
    """Call `body` with so many values; nothing but UserError may come out of it."""
    read = refused = 0

    @settings(
        max_examples=count,
        phases=[Phase.generate],  # a failing file is shown as it is
        database=None,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(strategy)
    def one(value: Any) -> None:
        nonlocal read, refused
        read += 1
        try:
            body(value)
        except UserError:
            refused += 1

    one()
    print(f"{read} read, {refused} of them refused")
    assert refused > read // 3, "most changes are found"


SMALL_RUN = Path("runs/done")
STEP = SMALL_RUN / "checkpoints/step-0000012"


def use_checkpoint() -> None:
    """All that is done with a run's checkpoint."""
    run = runs.open_run(SMALL_RUN)
    model, _ = loading.load_model(run, "12")
    assert all(isinstance(value, mx.array) for value in model.parameters()["wte"].values())
    saved = run.load_first_valid([STEP], with_optimizer=True)
    SpikeGuard.from_tree(saved.guard)
    assert saved.optimizer is not None
    make_train_step(run.config).restore(saved.parameters, saved.optimizer)


@pytest.mark.parametrize("count", fuzzed)
def test_manifests(place: Path, count: int) -> None:
    path = STEP / "manifest.json"
    good = path.read_text()

    def read(given: tuple[Any, Any]) -> None:
        changes, edits = given
        tree = changed(json.loads(good), changes) if changes else None
        text = (
            as_json(tree, files.dump_checksummed).encode()
            if changes
            else edited(good.encode(), edits)
        )
        path.write_bytes(text)
        use_checkpoint()

    fuzz(count, st.one_of(st.tuples(CHANGES, st.none()), st.tuples(st.none(), EDITS)), read)


@pytest.mark.parametrize("count", fuzzed)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_arrays_of_a_checkpoint(place: Path, count: int, name: str) -> None:
    """The manifest's hash is that of the changed file."""
    good, manifest = (STEP / name).read_bytes(), json.loads((STEP / "manifest.json").read_text())
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def read(given: tuple[Any, Any]) -> None:
        changes, edits = given
        if changes:
            text = as_json(changed(header, changes)).encode()
            content = len(text).to_bytes(8, "little") + text + good[8 + length :]
        else:
            content = edited(good, edits)
        (STEP / name).write_bytes(content)
        manifest["sha256"][name] = files.sha256_file(STEP / name)
        del manifest["seal"]
        sealed = files.dump_checksummed(manifest)
        manifest["seal"] = ""
        (STEP / "manifest.json").write_text(sealed)
        use_checkpoint()

    fuzz(count, st.one_of(st.tuples(CHANGES, st.none()), st.tuples(st.none(), EDITS)), read)


@pytest.mark.parametrize("count", fuzzed)
@pytest.mark.parametrize("name", ["run.json", "best.json"])
def test_identities_of_a_run(place: Path, count: int, name: str) -> None:
    path = SMALL_RUN / name
    good = path.read_text()
    true = runs.open_run(SMALL_RUN).best()

    def read(given: tuple[Any, Any]) -> None:
        changes, edits = given
        tree = changed(json.loads(good), changes) if changes else None
        text = (
            as_json(tree, files.dump_checksummed).encode()
            if changes
            else edited(good.encode(), edits)
        )
        path.write_bytes(text)
        run = runs.open_run(SMALL_RUN)
        assert "/" not in (run.data_name or "")
        api.evaluate(run="done")
        best = run.best()
        assert run.checkpoint_path().parent == run.checkpoints
        if name == "best.json":
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                sealed = files.read_checksummed(path, runs.RUN_FORMAT)
                named = {"step": int(sealed["step"]), "val_loss": float(sealed["val_loss"])}
                assert str(best) == str(named)  # where NaN equals itself
                return
            assert best == true, "what is damaged is not refused: the metrics know it"
            raise UserError("", "")

    fuzz(count, st.one_of(st.tuples(CHANGES, st.none()), st.tuples(st.none(), EDITS)), read)


@pytest.mark.parametrize("count", fuzzed)
def test_configs(place: Path, count: int) -> None:
    path = SMALL_RUN / "config.toml"
    good = path.read_text()
    tree = tomllib.loads(good)
    names = [(section, name) for section, part in tree.items() for name in part]
    values = st.one_of(VALUES.map(as_json), st.sampled_from(["inf", "nan", "1e400", "[" * 3000]))

    def read(given: tuple[Any, Any]) -> None:
        pair, edits = given
        if pair:
            number, value = pair
            name = names[number % len(names)][1]
            lines = [
                f"{name} = {value}" if line.startswith(f"{name} =") else line
                for line in good.splitlines()
            ]
            content = "\n".join(lines).encode("utf-8", "surrogatepass")
        else:
            content = edited(good.encode(), edits)
        path.write_bytes(content)
        config = toml.load_config(path)
        assert toml.load_config(path) == config
        use_checkpoint()
        api.evaluate(run="done")

    pairs = st.tuples(st.integers(0, 1000), values)
    fuzz(count, st.one_of(st.tuples(pairs, st.none()), st.tuples(st.none(), EDITS)), read)


@pytest.mark.parametrize("count", fuzzed)
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_tokenizers(home: Path, count: int, kind: str) -> None:
    path = home / "tokenizer.json"
    merges = [(b"a", b"b"), (b"ab", b"c"), (b" ", b"a")]
    tokenizer: Any = BPETokenizer(merges)
    if kind == "char":
        tokenizer = tokenizers.CharTokenizer("abcdef \n", end_of_text=True)
    good = tokenizer.to_json()
    tree = json.loads(good)

    def read(given: tuple[Any, Any]) -> None:
        changes, edits = given
        text = as_json(changed(tree, changes)) if changes else None
        path.write_bytes(text.encode() if text else edited(good.encode(), edits))
        loaded = tokenizer_json.load_tokenizer(path)
        assert loaded.decode(loaded.encode("abc a")) == "abc a"
        assert len(loaded.fingerprint) == 64

    fuzz(count, st.one_of(st.tuples(CHANGES, st.none()), st.tuples(st.none(), EDITS)), read)


@pytest.mark.parametrize("count", fuzzed)
@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin"])
def test_data_folders(place: Path, count: int, name: str) -> None:
    """The hashes in meta.json are those of the changed arrays."""
    folder = Path("data/words")
    good, meta = (folder / name).read_bytes(), json.loads((folder / "meta.json").read_text())
    del meta["seal"]

    def read(given: tuple[Any, Any, bool]) -> None:
        changes, edits, fits = given
        tree = changed(meta, changes) if changes else meta
        if name != "meta.json":
            (folder / name).write_bytes(edited(good, edits or []))
            side = name.removesuffix(".bin")
            if isinstance(tree, dict) and isinstance(tree.get(side), dict):
                tree[side]["sha256"] = files.sha256_file(folder / name)
                if fits:
                    tree[side]["tokens"] = (folder / name).stat().st_size // 2
        text = as_json(tree, files.dump_checksummed).encode()
        if name == "meta.json" and edits:
            text = edited(good, edits)
        (folder / "meta.json").write_bytes(text)
        dataset = open_dataset(folder)
        for split in SPLITS:
            ids = getattr(dataset, split).ids
            dataset.tokenizer.decode(int(i) for i in ids[:40])
        dataset.train.get_batch(0, seed=1, batch_size=2, block_size=8)

    changes = st.one_of(st.none(), CHANGES)
    fuzz(count, st.tuples(changes, EDITS, st.booleans()), read)


OPCODES = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
CALLS = st.sampled_from([b"cos\nmkdir\n(X\x06\0\0\0sprungtR", b"(S'sprung'\nios\nmkdir\n"])


@pytest.mark.parametrize("count", fuzzed)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_vocabularies_of_nanogpt(home: Path, count: int, protocol: int) -> None:
    """Real pickles with values changed, bytes changed, or opcodes put between."""
    characters = "\n !aé日🙂"
    tree = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: id for id, character in enumerate(characters)},
    }
    good = pickle.dumps(tree, protocol)
    path = home / "meta.pkl"

    def read(given: tuple[Any, Any, Any]) -> None:
        changes, edits, inserted = given
        content = pickle.dumps(changed(tree, changes), protocol) if changes else good
        for share, code in inserted:
            at = int(share * len(content))
            content = content[:at] + code + content[at:]
        path.write_bytes(edited(content, edits))
        try:
            text = meta_pickle.read_char_vocab(path)
            assert len(set(text)) == len(text) > 0
            text.encode()
        finally:
            assert list(home.iterdir()) == [path], "nothing ran"

    inserts = st.lists(st.tuples(st.floats(0, 1), st.one_of(OPCODES, CALLS)), max_size=2)
    none: Any = st.just([])
    kinds = [(CHANGES, none, none), (none, EDITS, none), (none, none, inserts)]
    fuzz(count, st.one_of([st.tuples(*kind) for kind in kinds]), read)


@pytest.mark.parametrize("count", fuzzed)
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", "history.jsonl"])
def test_notes_of_a_run(place: Path, count: int, name: str) -> None:
    """They are never refused: what cannot be read is left out."""
    path = SMALL_RUN / name
    good = path.read_bytes()

    def read(given: tuple[Any, Any]) -> None:
        changes, edits = given
        content = edited(good, edits)
        if changes and name != "samples.txt":
            lines = [json.loads(line) for line in good.splitlines()]
            tree = changed(lines, changes)
            content = "\n".join(map(as_json, tree if isinstance(tree, list) else [tree])).encode()
        path.write_bytes(content)
        run = runs.open_run(SMALL_RUN)
        run.truncate_after(8)
        assert all(record["step"] <= 8 for record in run.metrics())
        assert 0 < (median_step_seconds(run) or 1.0) < math.inf
        assert all(type(text) is str for pair in run.last_environment().items() for text in pair)
        raise UserError("", "")

    fuzz(count, st.tuples(st.one_of(st.none(), CHANGES), EDITS), read)


@pytest.mark.parametrize("count", fuzzed)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_texts(home: Path, count: int, suffix: str) -> None:
    path = home / f"text{suffix}"
    rows = [{"text": "to be <|endoftext|> or"}, {"text": "Grüße"}, {"text": "日本\n🙂" * 9}]
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        good = path.read_bytes()
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        good = "\n".join(lines).encode()

    def read(edits: Any) -> None:
        path.write_bytes(edited(good, edits))
        for text, _ in readers.read_documents(path):
            text.encode("utf-8")
        if suffix == ".txt":  # nearly any bytes are a text
            raise UserError("", "")

    fuzz(count, EDITS, read)


def test_a_config_of_a_giant_builds_nothing(place: Path) -> None:
    path = SMALL_RUN / "config.toml"
    path.write_text(path.read_text().replace("n_layer = 2", "n_layer = 2000000000"))
    with pytest.raises(UserError, match="other settings of the model"):
        api.generate(run="done")
    manifest = STEP / "manifest.json"
    tree = json.loads(manifest.read_text())
    del tree["seal"]
    tree["model"] = toml.load_config(path).model.fingerprint
    manifest.write_text(files.dump_checksummed(tree))
    with pytest.raises(UserError, match="and the checkpoint has"):
        api.generate(run="done")


def test_a_header_of_a_giant_is_refused(place: Path) -> None:
    array = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    for text in (json.dumps({"wte.weight": array}), "[" * 100_000, "{}"):
        for length in (len(text), 1 << 62):
            header = length.to_bytes(8, "little") + text.encode()
            (STEP / "model.safetensors").write_bytes(header + np.zeros(8, "<f4").tobytes())
            manifest = json.loads((STEP / "manifest.json").read_text())
            del manifest["seal"]
            manifest["sha256"]["model.safetensors"] = files.sha256_file(STEP / "model.safetensors")
            (STEP / "manifest.json").write_text(files.dump_checksummed(manifest))
            with pytest.raises(UserError, match=r"damaged|and the checkpoint has"):
                use_checkpoint()


FOREIGN = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("count", fuzzed)
@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_others(home: Path, count: int, name: str) -> None:
    folder = home / "m"
    folder_of(folder)
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
        places = dict.fromkeys(mx.load(str(weights)), shard)
        weights.rename(folder / shard)
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    path = folder / name
    good = path.read_bytes()
    header, rest = good, b""
    if name == "model.safetensors":
        length = int.from_bytes(good[:8], "little")
        header, rest = good[8 : 8 + length], good[8 + length :]

    def read(given: tuple[Any, Any]) -> None:
        changes, edits = given
        content = edited(good, edits) if edits else b""
        if changes and name != "merges.txt":
            content = as_json(changed(json.loads(header), changes)).encode()
            if rest:
                content = len(content).to_bytes(8, "little") + content + rest
        path.write_bytes(content)
        foreign = importing.read_model(str(folder))
        mx.eval(foreign.parameters)
        assert foreign.tokenizer.decode(foreign.tokenizer.encode("once a €")) == "once a €"
        if content == good or name == "tokenizer_config.json":
            raise UserError("", "")  # hardly any change of these matters

    edits = st.tuples(st.none(), EDITS)
    fuzz(
        count,
        edits if name == "merges.txt" else st.one_of(st.tuples(CHANGES, st.none()), edits),
        read,
    )
