"""What a replica or a fleet was made of, as its log's Opened event says it: enough to make the same one again.

The configuration alone would not do: how many blocks there are and what the executor can do is found out when it opens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from penstock.core.errors import BadTrace
from penstock.core.events import Opened
from penstock.core.types import Caps


@dataclass(frozen=True, kw_only=True)
class MadeReplica:
    """`spec`: the replica's ReplicaSpec as a table. `num_blocks` and `caps` are what its executor said.

    `found`: names (hex) and slots of what a disk of cached blocks held; None: there is no disk.
    """

    spec: dict[str, object]
    num_blocks: int
    caps: Caps
    found: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MadeFleet:
    """`route`, `route_decode`, `move`, `scale`: the tables of the fleet's policies; None: there is none.

    `rules`: of what may move (cluster.arbiter), and `bounds` of its size. `dispatch`: of cluster.sight.DispatchConfig.
    `prefill` and `decode`: coefficients of the predictions (cost.phases). `finds_peers`, `has_tiers`: see
    cluster.sight; None: no.
    """

    route: dict[str, object] = field(default_factory=dict)
    seed: int = 0
    route_decode: dict[str, object] | None = None
    move: dict[str, object] | None = None
    scale: dict[str, object] | None = None
    rules: dict[str, int | float] | None = None
    bounds: dict[str, int] | None = None
    dispatch: dict[str, object] = field(default_factory=dict)
    prefill: tuple[float, float, float] | None = None
    decode: tuple[float, float, float] | None = None
    finds_peers: bool | None = None
    has_tiers: bool | None = None


def opened(at: float, who: str, made: MadeReplica | MadeFleet) -> Opened:
    """The event that records `made`; what it has not is left out."""
    told = msgspec.to_builtins(made)
    told = {name: value for name, value in told.items() if value is not None}
    if isinstance(made, MadeReplica) and not made.caps.encodes:
        del told["caps"]["encodes"]  # so that logs without images are what they were
    return Opened(
        at=at,
        who=who,
        what="replica" if isinstance(made, MadeReplica) else "fleet",
        made=msgspec.json.encode(told).decode(),
    )


def made_of(event: Opened) -> MadeReplica | MadeFleet:
    """Raises BadTrace when the record is not whole."""
    cls: type[MadeReplica | MadeFleet] = MadeReplica if event.what == "replica" else MadeFleet
    try:
        return msgspec.json.decode(event.made, type=cls)
    except msgspec.MsgspecError as error:
        raise BadTrace(f"the log does not say how {event.who} was made: {error}") from None
