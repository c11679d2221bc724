"""Blocks of quantised numbers, out of bytes uint8 [rows, blocks * bytes of a block].

    Q4_0      fp16 scale, 32 codes of 4 bits around 8                      as they are, 4 bits
    Q5_0      fp16 scale, 32 codes of 5 bits around 16                     as they are, in 8 bits
    Q8_0      fp16 scale, 32 codes of 8 bits                               as they are
    IQ4_NL    fp16 scale, 32 places in a table of 16 whole numbers         as they are, in 8 bits
    Q4_1, Q5_1         scale and lowest value, both fp16                   numbers
    Q4_K, Q5_K, Q6_K   256 numbers in blocks of 32 or 16, whose scales are codes themselves      numbers
    others             by the `gguf` package                               numbers

Codes of 4 bits lie low ones first: a byte holds numbers i and i + 16. Numbers that a layer is to hold in few bits are
quantised again, to 8 bits in groups of 32: an error of at most 1/254 of the largest of each group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from penstock.core.errors import missing_extra
from penstock.engine.torch.checkpoints.gguf.format import Kind
from penstock.engine.torch.quantised import Bits, Quantised

GROUP = 32
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def exact(kind: Kind, data: Tensor) -> Quantised | None:
    """The codes and scales as they are; None where `Quantised` cannot hold them."""
    make = {"Q4_0": _q4_0, "Q5_0": _q5_0, "Q8_0": _q8_0, "IQ4_NL": _iq4_nl}.get(kind.name)
    if make is None:
        return None
    blocks = data.view(len(data), -1, kind.num_bytes)
    bits, codes = make(blocks)
    scales = _halves(blocks[..., :2])
    return Quantised(bits=bits, codes=codes.flatten(1), scales=scales[..., 0], group=GROUP)


def numbers(kind: Kind, data: Tensor) -> Tensor:
    """What bytes mean, [rows, columns]: floats as they are, else float32. Raises MissingExtra."""
    if kind.name in FLOATS:
        return data.view(FLOATS[kind.name])
    held = exact(kind, data)
    if held is not None:
        return held.expand()
    read = READERS.get(kind.name)
    if read is None:
        return _by_package(kind, data)
    return read(data.view(len(data), -1, kind.num_bytes)).flatten(1)


def _halves(data: Tensor) -> Tensor:
    """fp16 numbers of the last dimension's bytes, as float32."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """[..., n] -> [..., 2n]: the low halves of all bytes, then the high ones."""
    return torch.cat((data & 15, data >> 4), -1)


def _fifth_bits(data: Tensor) -> Tensor:
    """32 bits in 4 bytes -> 16 or 0 for each of 32 numbers."""
    bits = data[..., None] >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).flatten(-2) << 4


def _q4_0(blocks: Tensor) -> tuple[Bits, Tensor]:
    return 4, _nibbles(blocks[..., 2:])


def _q5_0(blocks: Tensor) -> tuple[Bits, Tensor]:
    return 8, (_nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])) + (128 - 16)


def _q8_0(blocks: Tensor) -> tuple[Bits, Tensor]:
    return 8, blocks[..., 2:] ^ 128


def _iq4_nl(blocks: Tensor) -> tuple[Bits, Tensor]:
    table = torch.tensor(NONLINEAR, dtype=torch.int16) + 128
    return 8, table.to(torch.uint8)[_nibbles(blocks[..., 2:]).int()]


def _q4_1(blocks: Tensor) -> Tensor:
    told = _halves(blocks[..., :4])
    return told[..., :1] * _nibbles(blocks[..., 4:]) + told[..., 1:]


def _q5_1(blocks: Tensor) -> Tensor:
    told = _halves(blocks[..., :4])
    return (
        told[..., :1] * (_nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])) + told[..., 1:]
    )


def _scales_of_eight(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: scale and offset of each 32 numbers, 6 bits each in 12 bytes, times two fp16 numbers."""
    told, packed = _halves(blocks[..., :4]), blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), -1)
    offsets = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), -1)
    return (told[..., :1] * scales)[..., None], (told[..., 1:] * offsets)[..., None]


def _cut(data: Tensor, *sizes: int) -> Tensor:
    """[..., n] -> [..., *sizes]"""
    return data.reshape(*data.shape[:-1], *sizes)


def _in_eight(data: Tensor) -> Tensor:
    """128 bytes -> 8 x 32 codes: each 32 bytes hold 64, the low halves first."""
    return _cut(_nibbles(_cut(data, 4, 32)).flatten(-2), 8, 32)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, offsets = _scales_of_eight(blocks)
    codes = _in_eight(blocks[..., 16:])
    return (scales * codes - offsets).flatten(-2)


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K; byte i of 32 holds the fifth bits of the i-th of each 32 numbers."""
    scales, offsets = _scales_of_eight(blocks)
    low = _in_eight(blocks[..., 48:])
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (blocks[..., None, 16:48] >> places & 1) << 4
    return (scales * (low | high) - offsets).flatten(-2)


def _q6_k(blocks: Tensor) -> Tensor:
    """Two halves of 128 numbers: 64 bytes of low 4 bits, 32 of high 2; a scale for each 16; around 32."""
    low = _nibbles(_cut(blocks[..., :128], 2, 64))  # [..., 2, 128]
    places = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = (_cut(blocks[..., 128:192], 2, 1, 32) >> places & 3).flatten(-2)
    codes = _cut((low | high << 4).flatten(-2), 16, 16).float() - 32
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float() * _halves(blocks[..., 208:])
    return (codes * scales[..., None]).flatten(-2)


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _by_package(kind: Kind, data: Tensor) -> Tensor:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    found = dequantize(data.numpy(), GGMLQuantizationType[kind.name])
    return torch.from_numpy(np.ascontiguousarray(found, np.float32))
