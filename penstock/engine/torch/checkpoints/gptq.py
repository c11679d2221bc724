"""GPTQ, as AutoGPTQ and GPTQModel save it.

    qweight int32 [in * bits / 32, out]      codes of one output below each other, the first in the lowest bits
    qzeros  int32 [groups, out * bits / 32]  zero points, less one in the first format
    scales  fp16  [groups, out]
    g_idx   int32 [in]                       the group of each input

With `desc_act` inputs were quantised in the order of how much they matter, and a group holds inputs from anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import BadModel
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


class Gptq:
    """`zero_offset`: 1 in the first format, 0 in the second."""

    pieces: tuple[str, ...] = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, zero_offset: int) -> None:
        self._offset = zero_offset

    def is_packed(self, files: SafetensorsFiles, module: str) -> bool:
        return f"{module}.qweight" in files

    def shape(self, files: SafetensorsFiles, module: str) -> tuple[int, int]:
        words, num_out = files.shape(f"{module}.qweight")
        return num_out, words * 32 // self._bits(files, module)

    def read(
        self, files: SafetensorsFiles, module: str, rows: slice, columns: slice
    ) -> Quantised | Tensor:
        bits, (_, num_in) = self._bits(files, module), self.shape(files, module)
        num_groups = files.shape(f"{module}.scales")[0]
        groups = groups_of(columns, num_in, num_groups, module)
        order = order_of(files, f"{module}.g_idx", columns, num_in)
        words = files.read(f"{module}.qweight", (words_of(columns, bits, module), rows))
        codes = codes_in(words.T, bits)
        return Quantised(
            bits=bits,
            codes=codes if order is None else codes[:, order],
            scales=files.read(f"{module}.scales", (groups.which, rows)).float().T.contiguous(),
            zeros=self._zeros(files, module, groups, rows),
            group=groups.size,
            order=order,
        )

    def _bits(self, files: SafetensorsFiles, module: str) -> Bits:
        num_out = files.shape(f"{module}.scales")[1]
        return bits_of(files.shape(f"{module}.qzeros")[1], num_out, f"{module}.qzeros")

    def _zeros(
        self, files: SafetensorsFiles, module: str, groups: Groups, rows: slice
    ) -> Tensor | None:
        bits = self._bits(files, module)
        stored = codes_in(files.whole(f"{module}.qzeros")[groups.which], bits)[:, rows].T
        zeros = stored + self._offset  # of 8 bits it wraps by itself, as it did when saved
        return unless_middle(zeros & 15 if bits == 4 else zeros, bits)


def order_of(files: SafetensorsFiles, name: str, columns: slice, num_in: int) -> Tensor | None:
    """The inputs group by group, from the group of each; None where they lie so already. Raises BadModel."""
    if name not in files:
        return None
    group_of = files.whole(name).long()
    if len(group_of) != num_in:
        raise BadModel(f"{files.place(name)}: {name} has {len(group_of)} entries", hint=SAME)
    sizes = torch.bincount(group_of)
    if torch.equal(group_of, torch.arange(num_in) // max(1, int(sizes[0]))):
        return None
    if bool((sizes != sizes[0]).any()):
        raise BadModel(f"{files.place(name)}: groups of {name} are not of one size")
    if columns.stop - columns.start < num_in:
        raise BadModel(
            f"{files.place(name)}: groups of {name} hold inputs from anywhere (desc_act), which "
            "cannot be shared out",
            hint="use tensor_parallel = 1",
        )
    return torch.argsort(group_of, stable=True)
