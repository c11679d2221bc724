"""Seeded streams: one for each user of chance, independent of each other and of PYTHONHASHSEED."""

from __future__ import annotations

import hashlib
import random


def stream(seed: int, *names: str) -> random.Random:
    """The stream of `names` under `seed`: same arguments, same numbers, on every machine."""
    told = "\0".join((str(seed), *names)).encode()
    return random.Random(int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big"))
