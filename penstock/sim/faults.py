"""What goes wrong, when and where: drawn from one seed, so that it goes wrong again in the same way.

    kill         a replica's process is gone, in the middle of what it was sending; a successor comes up
    stall        a replica stands still: for a moment, or so long that its heartbeats run out and it is ended
    delay        messages between fleet and replica take longer for a while
    cut          the connection to a replica is lost, in the middle of messages; each end hears of it at another time
    stale        reports of a replica come late, all at once
    skew         a replica's clock is wrong by up to SKEW_S
    socket       the queues of all connections hold a few messages (for the whole run)
    log          the disk under the log is full for a while
    host-memory  there is less host memory than what is moved there (for the whole run)
    step         a step fails, or one job of a step
    client       callbacks raise, cancel their own request or others, and start new ones (for the whole run)
    cancels      many requests are cancelled at one instant
    move         many requests are moved to other replicas, in all ways
    wire         blocks cannot be copied to a replica for a while: copies break off, or do not end (and requests move)
    scale        a replica is drained and put out, and another one comes
    restart      the controller is gone with all its callers, and another one takes the replicas over
    fetch        replicas fetch cached prefixes from each other, and for a while what comes is not what the peer holds,
                 or breaks off, or does not end, or the peer has forgotten what it was said to hold

On a connection nothing is dropped, doubled or put out of order: see sim.cable.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.rng import Stream

SKEW_S = 1000.0
DEAD_AFTER_S = 0.5  # heartbeats; shorter than the real ones, as answers are
MORE = {"step": 1, "move": 5, "wire": 2, "fetch": 4}  # of those that do little each time
WHOLE_RUN = frozenset({"socket", "host-memory", "client"})
KINDS = (
    "kill", "stall", "delay", "cut", "stale", "skew", "socket", "log", "host-memory", "step", "client", "cancels",
    "move", "wire", "scale", "restart", "fetch",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`luck` in [0, 1) decides what the kind leaves open: how much of a message was written, who is cancelled, ..."""

    kind: str
    at: float
    replica: int
    for_s: float
    luck: float


def draw_faults(
    rng: Stream, kinds: tuple[str, ...], *, num_replicas: int, within_s: float
) -> tuple[Fault, ...]:
    """A few of each kind, in the order of their instants; none of those that hold for the whole run."""
    found = [
        Fault(
            kind=kind,
            at=rng.uniform(0.0, within_s),
            replica=rng.randrange(num_replicas),
            for_s=rng.choice((0.05, 0.2, 1.0)) * rng.uniform(0.5, 1.5),
            luck=rng.random(),
        )
        for kind in kinds
        if kind not in WHOLE_RUN
        for _ in range(rng.choice((1, 1, 2, 3)) + MORE.get(kind, 0))
    ]
    return tuple(sorted(found, key=lambda fault: fault.at))
