"""What a reader of checkpoints is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from torch import Tensor

from penstock.engine.torch.quantised import Quantised

Part = tuple[slice, ...]  # of a tensor, one slice a dimension, each with a start and a stop


class Stored(Protocol):
    """Tensors under their Hugging Face names. Whatever is wrong with a file is a BadModel that names it."""

    @property
    def where(self) -> Path:
        """The folder or file, for errors."""
        ...

    def names(self) -> Collection[str]:
        """A weight in few bits has one name, `....weight`, however many tensors hold it."""
        ...

    def place(self, name: str) -> Path:
        """The file in which a tensor is."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def is_quantised(self, name: str) -> bool:
        """Whether `read` gives codes."""
        ...

    def read(self, name: str, part: Part, *, as_numbers: bool = False) -> Tensor | Quantised:
        """Part of a tensor, on the CPU, as it is stored. `as_numbers`: codes are not needed, numbers may be exacter."""
        ...

    def said(self) -> str | None:
        """How the weights read so far were stored and what became of them; None where nothing is to be said."""
        ...

    def close(self) -> None: ...
