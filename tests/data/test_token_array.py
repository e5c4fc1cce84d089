from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.config import DataConfig
from mlxgpt.data import meta, token_array
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.data.token_array import TokenArray, blocks_per_epoch
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError


def make_counting_array(n: int) -> TokenArray:
    """The array 0, 1, 2, …, whose values equal their positions."""
    return TokenArray(np.arange(n), vocab_size=n)


@given(
    st.integers(3, 400),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_targets_are_the_inputs_shifted_by_one(
    extra: int, block_size: int, batch_size: int, micro_batches: int, step: int
) -> None:
    array = make_counting_array(block_size + extra)
    inputs, targets, weights, _ = array.get_batch(
        step,
        seed=1,
        batch_size=batch_size,
        block_size=block_size,
        micro_batches=micro_batches,
    )
    assert inputs.shape == targets.shape == (micro_batches, batch_size, block_size)
    assert inputs.dtype == targets.dtype == np.int32
    assert weights is None
    assert (targets == inputs + 1).all()
    assert (np.diff(inputs, axis=-1) == 1).all()


@given(st.integers(20, 500), st.integers(1, 10), st.integers(0, 3))
def test_epoch_visits_each_block_once(length: int, block_size: int, epoch: int) -> None:
    array, blocks = make_counting_array(length), blocks_per_epoch(length, block_size)
    starts = [
        int(array.get_batch(step, seed=3, batch_size=1, block_size=block_size)[0][0, 0, 0])
        for step in range(epoch * blocks, (epoch + 1) * blocks)
    ]
    offset = min(starts)
    assert sorted(starts) == [offset + block_size * n for n in range(blocks)]
    assert offset < block_size or blocks == 1


def test_epochs_have_their_own_order_and_offset() -> None:
    array, blocks = make_counting_array(1000), blocks_per_epoch(1000, 10)
    orders = [
        [
            int(
                array.get_batch(epoch * blocks + n, seed=3, batch_size=1, block_size=10)[0][0, 0, 0]
            )
            for n in range(blocks)
        ]
        for epoch in range(8)
    ]
    assert len({min(order) for order in orders}) > 3, "offsets"
    assert len({tuple(block_start // 10 for block_start in order) for order in orders}) == 8, (
        "orders"
    )
    assert orders[0] != sorted(orders[0])


def test_batch_depends_only_on_step_and_seed() -> None:
    array, options = make_counting_array(5000), {"seed": 9, "batch_size": 4, "block_size": 16}
    batches = [array.get_batch(n, **options)[0] for n in range(50)]
    for n in reversed(range(50)):
        assert (array.get_batch(n, **options)[0] == batches[n]).all()
    assert not (array.get_batch(0, **{**options, "seed": 10})[0] == batches[0]).all()


def test_micro_batches_contain_the_same_tokens() -> None:
    array, options = make_counting_array(5000), {"seed": 9, "block_size": 16}
    full_batch = array.get_batch(7, batch_size=12, **options)[0]
    micro_batches = array.get_batch(7, batch_size=3, micro_batches=4, **options)[0]
    assert (full_batch.reshape(4, 3, 16) == micro_batches).all()
    assert len(np.unique(micro_batches[:, :, 0])) == 12, "and every sequence is another one"


def test_batch_order_never_changes() -> None:
    # Must not change: other values would break resuming of existing runs.
    inputs, *_ = make_counting_array(1000).get_batch(5, seed=1337, batch_size=4, block_size=8)
    assert inputs[0, :, 0].tolist() == [785, 505, 833, 641]


def test_batch_with_an_id_outside_the_vocabulary_is_refused() -> None:
    array = TokenArray(np.array([1, 2, 3, 5, 1, 2, 3]), vocab_size=5)
    with pytest.raises(UserError, match="id 5, but the largest id in the vocabulary is 4"):
        array.get_batch(0, seed=0, batch_size=4, block_size=2)


def test_data_shorter_than_a_block_is_refused() -> None:
    assert blocks_per_epoch(9, 8) == 1
    with pytest.raises(UserError, match="8 tokens, too few for block size 8") as excinfo:
        blocks_per_epoch(8, 8)
    assert "--block-size 7" in excinfo.value.remedy


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")]
)
def test_ids_fit_their_dtype(vocab_size: int, dtype: str) -> None:
    assert token_array.dtype_for(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text("hello<|endoftext|>world")
    (tmp_path / "val.txt").write_text("held")
    data = DataConfig((str(tmp_path / "train.txt"),), (str(tmp_path / "val.txt"),))
    return find_or_prepare(PrepareRequest(data, name="x"), tmp_path).folder


def test_prepared_folder_is_opened(folder: Path) -> None:
    dataset = open_dataset(folder)
    end = dataset.tokenizer.end_of_text
    assert end is not None
    assert dataset.tokenizer.decode(dataset.train.ids) == "hello<|endoftext|>world<|endoftext|>"
    assert isinstance(dataset.train.ids, np.memmap)
    assert dataset.meta.train.tokens == 12
    assert dataset.meta.train.bytes == 10
    assert dataset.meta.fingerprint == open_dataset(folder).meta.fingerprint


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_detected(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[content.index(b'"sha256": "') + 12 if name == "meta.json" else 6] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError):
        open_dataset(folder)


def test_another_tokenizer_of_the_same_size_is_detected(folder: Path) -> None:
    tokenizer = open_dataset(folder).tokenizer
    changed = CharTokenizer(
        tokenizer.decode(range(tokenizer.vocab_size - 1)).replace("h", "H"), end_of_text=True
    )
    assert changed.vocab_size == tokenizer.vocab_size
    (folder / "tokenizer.json").write_text(changed.to_json())
    with pytest.raises(UserError, match=r"were not encoded with its tokenizer\.json"):
        open_dataset(folder)


def test_array_with_an_id_outside_the_vocabulary_is_refused(folder: Path) -> None:
    """Even if hash and seal match the file."""
    tree = json_files.read_checksummed(folder / "meta.json", meta.META_FORMAT_VERSION)
    ids = np.fromfile(folder / "train.bin", dtype="<u2")
    for token_id, is_valid in ((tree["vocab_size"] - 1, True), (tree["vocab_size"], False)):
        ids[3] = token_id
        ids.tofile(folder / "train.bin")
        tree["train"]["sha256"] = files.sha256_file(folder / "train.bin")
        (folder / "meta.json").write_text(json_files.dump_checksummed(tree))
        if is_valid:
            open_dataset(folder)
        else:
            with pytest.raises(UserError, match=r"does not match meta\.json"):
                open_dataset(folder)


def test_arrays_of_another_dtype_are_refused(folder: Path) -> None:
    tree = json_files.read_checksummed(folder / "meta.json", meta.META_FORMAT_VERSION)
    (folder / "meta.json").write_text(json_files.dump_checksummed({**tree, "dtype": "<i2"}))
    with pytest.raises(UserError, match="its fields are inconsistent"):
        open_dataset(folder)


def test_fingerprint_depends_on_both_arrays_and_the_tokenizer(folder: Path) -> None:
    original = open_dataset(folder).meta
    variants = [
        replace(original, train=replace(original.train, sha256="0")),
        replace(original, val=replace(original.val, sha256="0")),
        replace(original, tokenizer="0"),
    ]
    assert len({original.fingerprint, *(variant.fingerprint for variant in variants)}) == 4


def test_newer_format_asks_for_an_update(folder: Path) -> None:
    tree = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(
        json.dumps({**tree, "format": meta.EXAMPLES_FORMAT_VERSION + 1})
    )
    with pytest.raises(UserError, match="newer mlxgpt") as excinfo:
        open_dataset(folder)
    assert "update" in excinfo.value.remedy
