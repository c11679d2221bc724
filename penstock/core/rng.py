"""Seeded streams: one for each user of chance, independent of each other and of PYTHONHASHSEED."""

from __future__ import annotations

import hashlib
import random

Stream = random.Random  # for annotations


def stream(seed: int, *names: str) -> Stream:
    """The stream of `names` under `seed`: same arguments, same numbers, on every machine."""
    told = "\0".join((str(seed), *names)).encode()
    return random.Random(int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big"))
