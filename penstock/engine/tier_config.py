"""How much memory lies behind the device's for cached blocks; see engine.tiers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("~/.cache/penstock/blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersConfig:
    """`host_bytes` of each replica's host memory, and `disk_bytes` in a file of each in `dir`; None = no such tier.

    `host_gb_s`, `dispatch_s` and `disk_gb_s` are what a modelled executor charges for copies.
    """

    host_bytes: int | None = None
    disk_bytes: int | None = None
    dir: Path = FOLDER
    host_gb_s: float = 25.0
    dispatch_s: float = 8e-6
    disk_gb_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("host_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; leave it out for none")
        if self.disk_bytes is not None and self.host_bytes is None:
            raise ValueError("disk_bytes needs host_bytes: blocks go to disk and back through it")
        if not (self.host_gb_s > 0 and self.disk_gb_s > 0 and self.dispatch_s >= 0):
            raise ValueError(
                "host_gb_s and disk_gb_s must be positive, dispatch_s must not be negative"
            )

    @property
    def folder(self) -> Path:
        return self.dir.expanduser()

    def blocks(self, block_bytes: int) -> tuple[int, int]:
        """Of host memory and of disk; at least one where there are any bytes."""
        host, disk = (
            0 if told is None else max(1, told // block_bytes)
            for told in (self.host_bytes, self.disk_bytes)
        )
        return host, disk
