"""Weights of few bits in safetensors: several tensors behind the name of one.

Which modules are packed is seen from their tensors, so lists of modules that were left out need no reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from torch import Tensor

from penstock.engine.torch.checkpoints.awq import Awq
from penstock.engine.torch.checkpoints.compressed import Compressed
from penstock.engine.torch.checkpoints.fp8 import Fp8
from penstock.engine.torch.checkpoints.gptq import Gptq
from penstock.engine.torch.checkpoints.scheme import Scheme
from penstock.engine.torch.checkpoints.stored import Part
from penstock.engine.torch.checkpoints.tensors import SafetensorsFiles
from penstock.engine.torch.quantised import Quantised

OF_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".output_scale",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".k_zero_point",
    ".v_zero_point",
)
TITLES = {"gptq": "GPTQ", "awq": "AWQ", "compressed": "compressed-tensors", "fp8": "FP8"}


class Packing(Protocol):
    """One way of packing. `pieces`: what follows a module's name in the names of the tensors that make a weight."""

    pieces: tuple[str, ...]

    def is_packed(self, files: SafetensorsFiles, module: str) -> bool: ...

    def shape(self, files: SafetensorsFiles, module: str) -> tuple[int, ...]: ...

    def read(
        self, files: SafetensorsFiles, module: str, rows: slice, columns: slice
    ) -> Quantised | Tensor: ...


class PackedTensors:
    """A `Stored` of a quantised checkpoint. Tensors that are no piece of a packed weight are read as they are."""

    def __init__(self, files: SafetensorsFiles, scheme: Scheme) -> None:
        self._files, self._title = files, TITLES[scheme.method]
        self._packing = _packing(scheme)
        self._modules: set[str] = set()
        self._names = self._logical()
        self._read: Counter[str] = Counter()

    @property
    def where(self) -> Path:
        return self._files.folder

    def names(self) -> Collection[str]:
        return self._names.keys()

    def place(self, name: str) -> Path:
        return self._files.place(self._names.get(name, name))

    def shape(self, name: str) -> tuple[int, ...]:
        module = self._module(name)
        if module is None:
            return self._files.shape(name)
        return self._packing.shape(self._files, module)

    def is_quantised(self, name: str) -> bool:
        return self._module(name) is not None

    def read(self, name: str, part: Part, *, as_numbers: bool = False) -> Tensor | Quantised:
        module = self._module(name)
        if module is None:
            return self._files.read(name, part)
        rows, columns = part
        found = self._packing.read(self._files, module, rows, columns)
        kind = "FP8, dequantised"
        if isinstance(found, Quantised):
            is_whole = found.group == columns.stop - columns.start
            kind = f"{found.bits} bits, a scale for " + (
                "each output" if is_whole else f"{found.group} inputs"
            )
        self._read[kind] += 1
        return found

    def said(self) -> str | None:
        kinds = "; ".join(kind for kind, _ in self._read.most_common())
        return f"{self._title}: {kinds}" if kinds else None

    def close(self) -> None:
        self._files.close()

    def _module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if module != name and module in self._modules else None

    def _logical(self) -> dict[str, str]:
        """Names that may be asked for, and a stored tensor of each."""
        found: dict[str, str] = {}
        for name in self._files.names():
            if name.endswith(OF_ACTIVATIONS):
                continue
            module, dot, last = name.rpartition(".")
            if dot + last in self._packing.pieces and self._is_packed(module):
                found.setdefault(f"{module}.weight", name)
            else:
                found[name] = name
        return found

    def _is_packed(self, module: str) -> bool:
        if module in self._modules:
            return True
        if self._packing.is_packed(self._files, module):
            self._modules.add(module)
            return True
        return False


def _packing(scheme: Scheme) -> Packing:
    if scheme.method == "gptq":
        return Gptq(scheme.zero_offset)
    if scheme.method == "awq":
        return Awq()
    return Compressed(scheme.block) if scheme.method == "compressed" else Fp8(scheme.block)
