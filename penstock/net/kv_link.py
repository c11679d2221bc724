"""How keys and values travel between replicas: what the configuration says of it (`net.kv`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

KvKind = Literal["auto", "shared", "tcp", "either"]
LAST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class KvLink:
    """`kind`: shared memory, TCP, or either: shared memory where the peer's can be read, else TCP. auto: shared for
    processes of one machine, either for replicas of a cluster.

    `host`: the address by which peers reach this machine. None: what its cluster calls it, else 127.0.0.1.
    `ports`: the first and the last of those that replicas may serve blocks on. None: any that is free.
    """

    kind: KvKind = "auto"
    host: str | None = None
    ports: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.ports is None:
            return
        if len(self.ports) != 2 or not 0 < self.ports[0] <= self.ports[1] <= LAST_PORT:
            raise ValueError(
                f"ports must be the first and the last of a range, got {list(self.ports)}"
            )

    @property
    def reaches_far(self) -> bool:
        """Whether peers on other machines can read."""
        return self.kind in ("tcp", "either")

    def on_nodes(self) -> KvLink:
        """Of replicas that may stand on several machines."""
        return replace(self, kind="either") if self.kind == "auto" else self

    def at(self, host: str) -> KvLink:
        """On a machine that peers know by this address."""
        return self if self.host is not None else replace(self, host=host)
