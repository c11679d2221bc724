"""What the model has to beat: xz and a byte-level 5-gram model, given the same bytes to learn from and to predict."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]
BYTE = np.uint64(8)


def xz_bits_per_byte(train: bytes, held_out: bytes) -> tuple[float, float]:
    """Bits a held-out byte costs xz on its own, and after the training bytes in a window that holds them all."""
    window = max(1 << 16, 1 << (len(train) + len(held_out) - 1).bit_length())
    filters: list[dict[str, Any]] = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    ]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))

    alone = 8 * size(held_out) / len(held_out)
    after = 8 * (size(train + held_out) - size(train)) / len(held_out)
    return alone, after


@dataclass(frozen=True, slots=True)
class _Order:
    """The tables of one n-gram length: what every gram adds and what every context leaves to shorter ones."""

    grams: Keys
    direct: Floats
    contexts: Keys
    left: Floats


class NGram:
    """Interpolated modified Kneser-Ney over bytes; a zero byte stands between documents."""

    def __init__(self, documents: Iterable[bytes], order: int = 5) -> None:
        if not 1 <= order <= 7:
            raise ValueError(f"an order of {order} does not fit a 64-bit key; choose 1 to 7")
        self.order = order
        text = np.frombuffer(b"\0" * order + b"\0".join(documents) + b"\0", dtype=np.uint8)
        grams, counts = np.unique(_pack(text, order)[order - 1 :], return_counts=True)
        self.tables: list[_Order] = []
        for length in range(order, 0, -1):
            self.tables.append(_table(grams, counts.astype(np.int64)))
            shorter = grams & np.uint64((1 << (8 * (length - 1))) - 1)
            grams, counts = np.unique(shorter, return_counts=True)
        self.tables.reverse()

    def bits(self, document: bytes) -> float:
        """Bits to predict every byte of a document from the bytes before it."""
        text = np.frombuffer(b"\0" * self.order + document, dtype=np.uint8)
        chance = np.full(len(document), 1 / 256)
        for length, table in enumerate(self.tables, start=1):
            keys = _pack(text, length)[self.order :]
            chance = _find(table.grams, table.direct, keys, 0.0) + (
                _find(table.contexts, table.left, keys >> BYTE, 1.0) * chance
            )
        return float(-np.log2(chance).sum())


def _pack(text: NDArray[np.uint8], length: int) -> Keys:
    """At every position the last `length` bytes as one number, the newest byte lowest."""
    keys = np.zeros(len(text), dtype=np.uint64)
    for back in range(length):
        shifted = text[: len(text) - back].astype(np.uint64) << np.uint64(8 * back)
        keys[back:] |= shifted
    return keys


def _table(grams: Keys, counts: NDArray[np.int64]) -> _Order:
    """Discounts by the count of counts, then the two terms of the interpolation; grams are sorted."""
    seen = [int((counts == times).sum()) for times in (1, 2, 3, 4)]
    cut = np.array([0.0, *_discounts(seen)])
    discount = cut[np.minimum(counts, 3)]
    contexts, starts = np.unique(grams >> BYTE, return_index=True)
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    sizes = np.diff(np.append(starts, len(grams)))
    direct = (counts - discount) / np.repeat(totals, sizes)
    return _Order(grams, direct, contexts, np.add.reduceat(discount, starts) / totals)


def _discounts(seen: list[int]) -> tuple[float, float, float]:
    """Chen and Goodman's three discounts, kept within what a count can give."""
    if 0 in seen:
        return 0.5, 0.75, 0.9
    share = seen[0] / (seen[0] + 2 * seen[1])
    raw = [times - (times + 1) * share * seen[times] / seen[times - 1] for times in (1, 2, 3)]
    first, second, third = (
        min(max(value, 0.05), times - 0.05) for times, value in enumerate(raw, start=1)
    )
    return first, second, third


def _find(sorted_keys: Keys, values: Floats, wanted: Keys, missing: float) -> Floats:
    places = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return np.where(sorted_keys[places] == wanted, values[places], missing)


def ngram_bits_per_byte(train: list[bytes], held_out: list[bytes], order: int = 5) -> float:
    """Bits a held-out byte costs the n-gram model, every document from its own start."""
    model = NGram(train, order)
    total = math.fsum(model.bits(document) for document in held_out)
    return total / sum(len(document) for document in held_out)
