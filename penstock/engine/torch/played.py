"""What a recorded step leaves (cuda/graphs.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from penstock.engine.torch.mlp import Taken


def _nothing(num_rows: int) -> Taken:
    return {}


class Played(NamedTuple):
    """`hidden` of the rows that sample: None where no step was played. `logits` fp32, where these were recorded too.

    `taken`: by how many rows, from the first on, each expert was taken.
    """

    hidden: Tensor | None = None
    logits: Tensor | None = None
    taken: Callable[[int], Taken] = _nothing


NOT_PLAYED = Played()
