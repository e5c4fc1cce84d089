"""Seeds of all randomness, derived from (seed, purpose, step); there is no generator state."""

import hashlib


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 64-bit seed that is a pure function of its arguments.

    Different purposes never share random numbers, so evaluating more often or drawing samples
    changes nothing in a training, and a resumed run needs to restore nothing.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
