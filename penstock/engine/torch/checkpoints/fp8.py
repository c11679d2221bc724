"""Weights of eight-bit floats, dequantised as they are read: one scale for a block, a row or a whole weight.

    weight            float8_e4m3fn or e5m2 [out, in]
    weight_scale_inv  float32 [out / rows of a block, in / columns of a block], rounded up  (DeepSeek)
    weight_scale      [out, 1], [1] or as above                             (fbgemm, AutoFP8, compressed-tensors)

Both are what the stored numbers are multiplied by. A fixed scale of activations (`input_scale`) is left unread:
activations stay as wide as the engine computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.hints import SAME
from penstock.engine.torch.checkpoints.tensors import SafetensorsFiles

FLOATS = ("F8_E4M3", "F8_E5M2")
SCALES = (".weight_scale_inv", ".weight_scale")


class Fp8:
    """`block`: rows and columns that share a scale, where scales have both."""

    pieces: tuple[str, ...] = (".weight", *SCALES)

    def __init__(self, block: tuple[int, int] | None) -> None:
        self._block = block

    def is_packed(self, files: SafetensorsFiles, module: str) -> bool:
        name = f"{module}.weight"
        return name in files and files.kind(name) in FLOATS

    def shape(self, files: SafetensorsFiles, module: str) -> tuple[int, ...]:
        return files.shape(f"{module}.weight")

    def read(self, files: SafetensorsFiles, module: str, rows: slice, columns: slice) -> Tensor:
        there = [f"{module}{one}" for one in SCALES if f"{module}{one}" in files]
        if not there:
            raise BadModel(
                f"{files.place(f'{module}.weight')}: {module}.weight is FP8 but has no scale",
                hint=SAME,
            )
        weight = files.read(f"{module}.weight", (rows, columns)).float()
        return weight.mul_(self._scales(files, there[0], rows, columns))

    def _scales(self, files: SafetensorsFiles, name: str, rows: slice, columns: slice) -> Tensor:
        """What a slice is multiplied by: as large as it, or one of its dimensions is 1."""
        scales = files.whole(name).float()
        if scales.numel() == 1:
            return scales.reshape(1, 1)
        num_out, num_in = files.shape(f"{name.rpartition('.')[0]}.weight")
        if scales.numel() == num_out:
            return scales.reshape(num_out, 1)[rows]
        if self._block is None:
            raise BadModel(
                f"{files.place(name)}: {name} has shape {list(scales.shape)} for a weight of "
                f"{num_out} x {num_in}, and config.json states no size of blocks",
                hint=SAME,
            )
        height, width = self._block
        if scales.shape != (-(-num_out // height), -(-num_in // width)):
            raise BadModel(
                f"{files.place(name)}: {name} has shape {list(scales.shape)}, blocks of {height} x {width} "
                f"of a weight of {num_out} x {num_in} need another",
                hint=SAME,
            )
        at_row = torch.arange(rows.start, rows.stop) // height
        at_column = torch.arange(columns.start, columns.stop) // width
        return scales[at_row][:, at_column]
