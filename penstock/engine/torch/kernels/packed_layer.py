"""What layers packed for our kernels share: their call, alone or recorded, and their bias in the type of the rows."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.torch.kernels import library as native
from penstock.engine.torch.kernels.program import Entry, Recorder


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedLayer(ABC):
    """out = x weight^T + bias, in the type of x."""

    library: native.Library
    table: int
    bias: Tensor | None
    num_out: int
    num_in: int

    def __call__(self, x: Tensor) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        out = torch.empty(x.shape[0], self.num_out, dtype=x.dtype)
        bias = self._bias_for(x)  # held until the call is done
        call = self._call(x, out, bias)
        self._entry(self.table, ctypes.byref(call), torch.get_num_threads())
        return out

    def record(self, into: Recorder, x: Tensor, out: Tensor) -> None:
        bias = self._bias_for(x)
        if bias is not None:
            into.tensors.append(bias)
        into.call(self._entry, self._call(x, out, bias), {"num_rows": into.ROWS})

    def _bias_for(self, x: Tensor) -> Tensor | None:
        assert x.dim() == 2 and x.shape[1] == self.num_in and x.stride(1) == 1
        return None if self.bias is None else self.bias.to(x.dtype)

    @property
    @abstractmethod
    def _entry(self) -> Entry:
        """Of the library."""

    @abstractmethod
    def _call(self, x: Tensor, out: Tensor, bias: Tensor | None) -> ctypes.Structure:
        """What the entry is given."""
