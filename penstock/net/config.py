"""What the configuration says of channels and wires (`net`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.net.kv_link import KvLink


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    """`report_s`: replicas say how they are at most this often. The link's figures are for modelled channels, and
    `kv_bytes_per_s` for each device's modelled wires for keys and values, one out and one in (None: it takes none).
    `kv`: how real ones carry them.
    """

    report_s: float = 0.1
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    kv_bytes_per_s: float | None = None
    kv: KvLink = KvLink()

    def __post_init__(self) -> None:
        if not self.report_s > 0:
            raise ValueError(f"report_s must be a positive number of seconds, got {self.report_s}")
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(
                f"latency_s must be a number of seconds from 0 up, got {self.latency_s}"
            )
        if self.bytes_per_s is not None and not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s must be positive, got {self.bytes_per_s}")
        if self.kv_bytes_per_s is not None and not self.kv_bytes_per_s > 0:
            raise ValueError(f"kv_bytes_per_s must be positive, got {self.kv_bytes_per_s}")
