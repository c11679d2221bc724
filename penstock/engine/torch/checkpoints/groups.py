"""The inputs that share a scale, what a slice of a weight needs of them, and codes out of 32-bit words."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.hints import SAME
from penstock.engine.torch.quantised import MIDDLE, Bits


class Groups(NamedTuple):
    """`which` groups of a weight a slice of its columns touches, and how many of the slice's columns share a scale."""

    which: slice
    size: int


def groups_of(columns: slice, num_in: int, num_groups: int, where: str) -> Groups:
    """Raises BadModel where groups do not divide the inputs, or a slice cuts through them."""
    if not num_groups or num_in % num_groups:
        raise BadModel(f"{where}: {num_groups} groups do not divide {num_in} inputs", hint=SAME)
    size = num_in // num_groups
    first, last = columns.start // size, (columns.stop - 1) // size
    if first == last:
        return Groups(slice(first, first + 1), columns.stop - columns.start)
    if columns.start % size or columns.stop % size:
        raise BadModel(
            f"{where}: inputs {columns.start} to {columns.stop} cut through groups of {size}",
            hint="choose a smaller tensor_parallel, whose shares are whole groups",
        )
    return Groups(slice(first, last + 1), size)


def codes_in(words: Tensor, bits: Bits) -> Tensor:
    """int32 [R, C] -> uint8 [R, C * 32 / bits], the lowest bits of a word first."""
    bytes_ = words.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_
    return torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1)


def words_of(columns: slice, bits: Bits, where: str) -> slice:
    """The 32-bit words in which these codes of a row lie."""
    each = 32 // bits
    if columns.start % each:
        raise BadModel(
            f"{where}: inputs {columns.start} to {columns.stop} begin inside a word of {each} codes",
            hint="choose a smaller tensor_parallel",
        )
    return slice(columns.start // each, -(-columns.stop // each))


def bits_of(num_words: int, num_codes: int, where: str) -> Bits:
    """How wide codes are, of which so many lie in so many words. Raises BadModel."""
    for bits in (4, 8):
        if num_words == -(-num_codes * bits // 32):
            return bits
    raise BadModel(
        f"{where}: {num_codes} codes in {num_words} words of 32 bits have neither 4 nor 8 bits each",
        hint="quantised weights of 4 and 8 bits are read",
    )


def unless_middle(zeros: Tensor, bits: Bits) -> Tensor | None:
    """Zero points, or None where all are what no zero points mean."""
    return None if bool((zeros == MIDDLE[bits]).all()) else zeros.contiguous()
