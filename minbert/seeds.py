"""Seeds for everything random, each a pure function of the run's seed and of what it is for."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a run's seed and what it is for, such as `derive_seed(seed, "dropout", step)`.

    The same on every platform, Python version and process; different parts give unrelated seeds.
    """
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
