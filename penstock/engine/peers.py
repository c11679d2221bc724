"""Whether replicas fetch cached prefixes from each other, and for how long one waits for the other."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersConfig:
    """`timeout_s`: after which a prefix that has not come is computed.

    `least_blocks`: so many more than its own replica somebody must hold of a prompt for the request to be told.
    """

    timeout_s: float = 1.0
    least_blocks: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s must be a positive number, got {self.timeout_s}")
        if self.least_blocks < 1:
            raise ValueError(f"least_blocks must be at least 1, got {self.least_blocks}")
