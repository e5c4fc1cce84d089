"""Random seeds, derived from (seed, purpose, step) instead of a generator state."""

import hashlib


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """Derive a 64-bit seed, a pure function of the arguments.

    Different purposes never share random numbers, so evaluating or sampling more often does not
    affect training, and resuming a run needs no generator state.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
