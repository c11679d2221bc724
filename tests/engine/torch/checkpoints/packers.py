"""Weights packed by the formulas that the makers of each format publish, a code at a time and without our reader.

Each packer gives the tensors of one module, and the weight that they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds output AWQ_ORDER[i]


@dataclass
class Packed:
    tensors: dict[str, Tensor]
    weight: Tensor


Packer = Callable[[Tensor], Packed]


def words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R, ceil(C / n)], n codes a word, the first lowest."""
    each = 32 // bits
    whole = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % each))
    out = (whole.view(len(codes), -1, each) << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def grouped(
    weight: Tensor, bits: int, group_of: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, fp16 scales, what they mean); zeros [out, groups] are given."""
    groups, top = int(group_of.max()) + 1, 2**bits - 1
    spread = torch.stack([weight[:, group_of == group].abs().amax(1) for group in range(groups)], 1)
    scales = (spread / (top / 2 - 2)).half()
    by_input, zero = scales.float()[:, group_of], zeros.float()[:, group_of]
    codes = (weight / by_input + zero).round().clamp(0, top)
    return codes.to(torch.uint8), scales, by_input * (codes - zero)


def some_zeros(weight: Tensor, groups: int, bits: int, low: int = 1) -> Tensor:
    middle = 2 ** (bits - 1)
    return torch.randint(max(low, middle - 3), middle + 3, (len(weight), groups))


def gptq(
    bits: int = 4,
    size: int = 32,
    *,
    is_symmetric: bool = False,
    act_order: bool = False,
    second: bool = False,
) -> Packer:
    """`second`: the format whose zero points are stored as they are."""

    def pack(weight: Tensor) -> Packed:
        num_in = weight.shape[1]
        group_of = torch.arange(num_in) // size
        if act_order:  # the same for all weights of these inputs, as their inputs are
            group_of = group_of[
                torch.randperm(num_in, generator=torch.Generator().manual_seed(num_in))
            ]
        zeros = some_zeros(weight, num_in // size, bits)
        if is_symmetric:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        codes, scales, meant = grouped(weight, bits, group_of, zeros)
        stored = zeros if second else zeros - 1
        return Packed(
            {
                "qweight": _down(codes, bits),
                "qzeros": words(stored.T, bits),
                "scales": scales.T.contiguous(),
                "g_idx": group_of.int(),
            },
            meant,
        )

    return pack


def _down(codes: Tensor, bits: int) -> Tensor:
    """Words that run down the inputs: int32 [in / n, out]."""
    return words(codes, bits).T.contiguous()


def awq(size: int = 32) -> Packer:
    def lace(codes: Tensor) -> Tensor:
        """[lines, out] with outputs in AWQ's order."""
        return words(codes.view(len(codes), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1), 4)

    def pack(weight: Tensor) -> Packed:
        num_in = weight.shape[1]
        zeros = some_zeros(weight, num_in // size, 4, low=0)
        codes, scales, meant = grouped(weight, 4, torch.arange(num_in) // size, zeros)
        return Packed(
            {
                "qweight": lace(codes.T),
                "qzeros": lace(zeros.T.to(torch.uint8)),
                "scales": scales.T.contiguous(),
            },
            meant,
        )

    return pack


def compressed(bits: int = 4, size: int | None = 32, *, is_symmetric: bool = True) -> Packer:
    """`size` None: one scale for each output."""

    def pack(weight: Tensor) -> Packed:
        num_in = weight.shape[1]
        width = size or num_in
        zeros = some_zeros(weight, num_in // width, bits)
        if is_symmetric:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        codes, scales, meant = grouped(weight, bits, torch.arange(num_in) // width, zeros)
        found = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not is_symmetric:
            found["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        return Packed(found, meant)

    return pack


def integers(weight: Tensor) -> Packed:
    """W8A8: a byte a code, a scale an output."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scales.float()).round().clamp(-128, 127)
    return Packed({"weight": codes.to(torch.int8), "weight_scale": scales}, codes * scales.float())


def fp8(kind: str) -> Packer:
    """`kind`: "row", "whole" or "block" (32 x 48)."""

    def pack(weight: Tensor) -> Packed:
        if kind == "block":
            rows, columns = -(-len(weight) // 32), -(-weight.shape[1] // 48)
            scales = 0.01 + torch.rand(rows, columns) / 100
            spread = scales.repeat_interleave(32, 0).repeat_interleave(48, 1)
            spread = spread[: len(weight), : weight.shape[1]]
            name = "weight_scale_inv"
        elif kind == "row":
            scales = spread = weight.abs().amax(1, keepdim=True) / 448
            name = "weight_scale"
        else:
            spread = weight.abs().max() / 448
            scales, name = spread.reshape(1), "weight_scale"
        stored = (weight / spread).to(torch.float8_e4m3fn)
        return Packed(
            {"weight": stored, name: scales, "input_scale": torch.ones(1)}, stored.float() * spread
        )

    return pack
