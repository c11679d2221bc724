"""compressed-tensors: whole numbers packed into words, or a byte each.

    weight_packed      int32 [out, in * bits / 32]      codes from zero up, the first in the lowest bits
    weight_shape       int64 [2]                        out and in
    weight             int8  [out, in]                  instead of both: one code a byte, around zero
    weight_scale       [out, groups], [out, 1] or [1]
    weight_zero_point  where codes are not around zero: int32 [out * bits / 32, groups], or int8 as the scales
    weight_g_idx       int32 [in]                       the group of each input, as GPTQ's

Weights of FP8 are read by fp8.py. Scales of activations are left unread: activations here are quantised, where they
are at all, by the scale of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.fp8 import FLOATS, Fp8
from penstock.engine.torch.checkpoints.gptq import order_of
from penstock.engine.torch.checkpoints.groups import (
    Groups,
    bits_of,
    codes_in,
    groups_of,
    unless_middle,
    words_of,
)
from penstock.engine.torch.checkpoints.hints import SAME
from penstock.engine.torch.checkpoints.tensors import SafetensorsFiles
from penstock.engine.torch.quantised import Bits, Quantised


class Compressed:
    """`block`: rows and columns that share a scale of FP8."""

    pieces: tuple[str, ...] = (
        ".weight",
        ".weight_packed",
        ".weight_shape",
        ".weight_scale",
        ".weight_zero_point",
        ".weight_g_idx",
    )

    def __init__(self, block: tuple[int, int] | None) -> None:
        self._floats = Fp8(block)

    def is_packed(self, files: SafetensorsFiles, module: str) -> bool:
        if f"{module}.weight_packed" in files or f"{module}.weight_scale" in files:
            return True
        name = f"{module}.weight"
        return name in files and files.kind(name) in ("I8", *FLOATS)

    def shape(self, files: SafetensorsFiles, module: str) -> tuple[int, int]:
        if f"{module}.weight_packed" not in files:
            num_out, num_in = files.shape(f"{module}.weight")
            return num_out, num_in
        num_out, num_in = files.whole(f"{module}.weight_shape").tolist()
        return num_out, num_in

    def read(
        self, files: SafetensorsFiles, module: str, rows: slice, columns: slice
    ) -> Quantised | Tensor:
        if f"{module}.weight_packed" in files:
            return self._packed(files, module, rows, columns)
        kind = files.kind(f"{module}.weight")
        if kind in FLOATS:
            return self._floats.read(files, module, rows, columns)
        if kind != "I8":
            raise BadModel(
                f"{files.place(f'{module}.weight')}: {module} has scales, but its weight is {kind}",
                hint=SAME,
            )
        groups, scales = self._scales(files, module, rows, columns)
        codes = files.read(f"{module}.weight", (rows, columns))
        zeros = None
        if f"{module}.weight_zero_point" in files:
            points = _spread(
                files, f"{module}.weight_zero_point", rows, self.shape(files, module)[0]
            )[:, groups.which]
            zeros = unless_middle(_from_zero(points.to(torch.int8)), 8)
        return Quantised(
            bits=8, codes=_from_zero(codes), scales=scales, zeros=zeros, group=groups.size
        )

    def _packed(
        self, files: SafetensorsFiles, module: str, rows: slice, columns: slice
    ) -> Quantised:
        num_in = self.shape(files, module)[1]
        bits = bits_of(files.shape(f"{module}.weight_packed")[1], num_in, module)
        groups, scales = self._scales(files, module, rows, columns)
        order = order_of(files, f"{module}.weight_g_idx", columns, num_in)
        words = files.read(f"{module}.weight_packed", (rows, words_of(columns, bits, module)))
        codes = codes_in(words, bits)[:, : columns.stop - columns.start]
        return Quantised(
            bits=bits,
            codes=codes.contiguous() if order is None else codes[:, order],
            scales=scales,
            zeros=_points(files, module, bits, rows, groups),
            group=groups.size,
            order=order,
        )

    def _scales(
        self, files: SafetensorsFiles, module: str, rows: slice, columns: slice
    ) -> tuple[Groups, Tensor]:
        num_out, num_in = self.shape(files, module)
        scales = _spread(files, f"{module}.weight_scale", rows, num_out).float()
        groups = groups_of(columns, num_in, scales.shape[1], module)
        return groups, scales[:, groups.which].contiguous()


def _spread(files: SafetensorsFiles, name: str, rows: slice, num_out: int) -> Tensor:
    """Of some rows, [rows, groups]; a weight may have one for all its rows."""
    stored = files.whole(name)
    if stored.numel() == 1:
        return stored.reshape(1, 1).expand(rows.stop - rows.start, 1)
    if len(stored) != num_out:
        raise BadModel(
            f"{files.place(name)}: {name} has shape {list(stored.shape)} for {num_out} outputs",
            hint="a scale for each weight, output or group is read",
        )
    return stored.reshape(num_out, -1)[rows]


def _points(
    files: SafetensorsFiles, module: str, bits: Bits, rows: slice, groups: Groups
) -> Tensor | None:
    """Packed zero points, uint8 [rows, groups]."""
    name = f"{module}.weight_zero_point"
    if name not in files:
        return None
    stored = codes_in(files.whole(name)[:, groups.which].T, bits)
    return unless_middle(stored[:, rows].T, bits)


def _from_zero(codes: Tensor) -> Tensor:
    """int8 around zero to uint8 around 128."""
    return codes.contiguous().view(torch.uint8) ^ 128
