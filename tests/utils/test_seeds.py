from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.utils.seeds import derive_seed


def test_derived_seeds_never_change() -> None:
    # A different value would break resuming existing runs.
    assert derive_seed(1337, "data") == 0xDB91D8000D1D2D7C


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_derived_seeds_differ_by_seed_purpose_and_step(seed: int, step: int) -> None:
    seeds = {
        derive_seed(seed, "data", step),
        derive_seed(seed, "dropout", step),
        derive_seed(seed, "dropout", step + 1),
        derive_seed(seed + 1, "dropout", step),
    }
    assert len(seeds) == 4
    assert all(0 <= value < 2**64 for value in seeds)
