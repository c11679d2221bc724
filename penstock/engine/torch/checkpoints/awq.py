"""AWQ in its `gemm` version.

qweight int32 [in, out / 8]      eight outputs in a word, in the order below
qzeros  int32 [groups, out / 8]  the same
scales  fp16  [groups, out]
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.groups import codes_in, groups_of, unless_middle
from penstock.engine.torch.checkpoints.hints import SAME
from penstock.engine.torch.checkpoints.tensors import SafetensorsFiles
from penstock.engine.torch.quantised import Quantised

LACED = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word outputs 0 to 7 lie: even ones first


class Awq:
    pieces: tuple[str, ...] = (".qweight", ".qzeros", ".scales")

    def is_packed(self, files: SafetensorsFiles, module: str) -> bool:
        return f"{module}.qweight" in files

    def shape(self, files: SafetensorsFiles, module: str) -> tuple[int, int]:
        num_in, words = files.shape(f"{module}.qweight")
        return words * 8, num_in

    def read(
        self, files: SafetensorsFiles, module: str, rows: slice, columns: slice
    ) -> Quantised | Tensor:
        num_out, num_in = self.shape(files, module)
        num_groups, scaled = files.shape(f"{module}.scales")
        if scaled != num_out:
            raise BadModel(
                f"{files.place(f'{module}.qweight')}: {module} has {num_out} outputs in 4 bits, "
                f"but {scaled} scales",
                hint=SAME,
            )
        groups = groups_of(columns, num_in, num_groups, module)
        codes = _outputs(files, f"{module}.qweight", columns, rows)
        return Quantised(
            bits=4,
            codes=codes,
            scales=files.read(f"{module}.scales", (groups.which, rows)).float().T.contiguous(),
            zeros=unless_middle(_outputs(files, f"{module}.qzeros", groups.which, rows), 4),
            group=groups.size,
        )


def _outputs(files: SafetensorsFiles, name: str, lines: slice, rows: slice) -> Tensor:
    """uint8 [rows, lines] of a tensor [lines, outputs / 8]."""
    first = rows.start // 8
    words = files.read(name, (lines, slice(first, -(-rows.stop // 8))))
    codes = codes_in(words, 4).view(len(words), -1, 8)[..., torch.tensor(LACED)].flatten(1)
    return codes[:, rows.start - first * 8 : rows.stop - first * 8].T.contiguous()
