from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data.example_array import ROW_MULTIPLE, ExampleArray, PairArray, pack_examples

VOCAB_SIZE = 50


@st.composite
def examples(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """Examples of 2 to 12 tokens, each with a trained token after the first."""
    result = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(2, 12))
        ids = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=size, max_size=size))
        trained = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        trained[draw(st.integers(1, size - 1))] = True
        result.append((np.array(ids), np.array(trained)))
    return result


def make_array(parts: list[tuple[np.ndarray, np.ndarray]]) -> ExampleArray:
    return ExampleArray(pack_examples(parts), VOCAB_SIZE)


@given(parts=examples())
def test_packed_examples_are_read_back(parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    array = make_array(parts)
    assert len(array) == len(parts)
    for n, (ids, trained) in enumerate(parts):
        example = array.example(n)
        assert (example.ids == ids).all()
        assert (example.trained == trained[1:]).all()
        prompt = array.prompt(n)
        assert (prompt == ids[: len(prompt)]).all()
        assert trained[len(prompt)]
        assert not trained[1 : len(prompt)].any()


@given(
    parts=examples(),
    batch_size=st.integers(1, 4),
    micro_batches=st.integers(1, 3),
    step=st.integers(0, 5),
)
def test_a_batch_contains_whole_examples_and_weights_only_trained_targets(
    parts: list[tuple[np.ndarray, np.ndarray]], batch_size: int, micro_batches: int, step: int
) -> None:
    array = make_array(parts)
    sizes = {"batch_size": batch_size, "micro_batches": micro_batches}
    inputs, targets, weights, _ = array.get_batch(step, seed=3, block_size=64, **sizes)
    assert inputs.shape == (micro_batches, batch_size, ROW_MULTIPLE)
    assert inputs.dtype == targets.dtype == np.int32
    assert np.isclose(weights.mean(), 1)
    assert len(set(weights[weights > 0].tolist())) == 1
    expected = {(*ids.tolist(), *trained[1:].tolist()) for ids, trained in parts}
    rows = (array.reshape(-1, ROW_MULTIPLE) for array in (inputs, targets, weights))
    for row, row_targets, row_weights in zip(*rows, strict=True):
        matches = [
            parts
            for parts in expected
            if (size := len(parts) // 2)
            and [row[0], *row_targets[:size]] == list(parts[: size + 1])
            and (row_weights[:size] > 0).tolist() == list(parts[size + 1 :])
            and not row_weights[size:].any()
            and (row[1:size] == row_targets[: size - 1]).all()
        ]
        assert matches


def test_every_epoch_has_each_example_once_in_another_order() -> None:
    parts = [(np.array([n, n]), np.array([False, True])) for n in range(12)]
    array = make_array(parts)

    def read_epoch(first_step: int, seed: int = 1) -> list[int]:
        batches = [
            array.get_batch(first_step + n, seed=seed, batch_size=4, block_size=8) for n in range(3)
        ]
        return [int(row[0]) for batch in batches for row in batch.inputs[0]]

    first, second = read_epoch(0), read_epoch(3)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first == read_epoch(0)
    assert first != read_epoch(0, seed=2)


def test_rows_are_as_long_as_the_longest_example_but_not_beyond_the_block_size() -> None:
    array = make_array([(np.zeros(n, int), np.ones(n, bool)) for n in (10, 40)])
    assert array.row_length(128) == 64
    assert array.row_length(39) == 39
    assert array.tokens_per_row == 24


def test_evaluation_reads_examples_spread_over_the_array() -> None:
    array = make_array([(np.array([n, n]), np.array([False, True])) for n in range(10)])
    assert [int(w.ids[0]) for w in array.windows(8, bos=3)] == list(range(10))
    assert [int(w.ids[0]) for w in array.windows(8, None, limit=6)] == [0, 3, 6]


@st.composite
def pair_arrays(draw: st.DrawFn) -> PairArray:
    """Pairs with different lengths, and a reference that tells them apart."""
    parts = [part for _ in range(draw(st.integers(1, 4))) for part in draw(examples())]
    parts = parts[: len(parts) // 2 * 2] or parts * 2
    reference = np.arange(len(parts), dtype=np.float32).reshape(-1, 2)
    return PairArray(pack_examples(parts), VOCAB_SIZE, reference)


@given(
    array=pair_arrays(),
    batch_size=st.integers(1, 4),
    micro_batches=st.integers(1, 3),
    step=st.integers(0, 5),
)
def test_a_row_of_a_batch_is_a_pair_with_its_reference(
    array: PairArray, batch_size: int, micro_batches: int, step: int
) -> None:
    batch = array.get_batch(
        step, seed=3, batch_size=batch_size, block_size=64, micro_batches=micro_batches
    )
    assert batch.inputs.shape == (micro_batches, batch_size, 2 * ROW_MULTIPLE)
    assert batch.reference.shape == (micro_batches, batch_size, 2)
    rows = (part.reshape(-1, 2, part.shape[-1] // 2) for part in batch)
    for inputs, targets, mask, reference in zip(*rows, strict=True):
        for half in (0, 1):
            ids, trained = array.example(int(reference[half, 0]))
            size = len(trained)
            assert int(reference[half, 0]) % 2 == half
            assert inputs[half, :size].tolist() == ids[:-1].tolist()
            assert targets[half, :size].tolist() == ids[1:].tolist()
            assert mask[half, :size].astype(bool).tolist() == trained.tolist()
            assert not mask[half, size:].any()


def test_every_epoch_has_each_pair_once() -> None:
    parts = [(np.array([n, n]), np.array([False, True])) for n in range(12)]
    array = PairArray(pack_examples(parts), VOCAB_SIZE, np.zeros((6, 2), np.float32))
    batches = [array.get_batch(n, seed=1, batch_size=2, block_size=8) for n in range(3)]
    chosen = [int(row[0]) for batch in batches for row in batch.inputs[0]]
    assert sorted(chosen) == [0, 2, 4, 6, 8, 10]
    assert chosen != sorted(chosen)
    assert [int(w.ids[0]) for w in array.windows(8, None)] == [0, 2, 4, 6, 8, 10]
    assert [int(w.ids[0]) for w in array.windows(8, None, limit=12)] == [0, 4, 8]
    assert array.tokens_per_row == 2
