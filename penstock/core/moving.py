"""A job that goes on at another replica: what travels, and the events that tell of it.

At the source MoveAsked, Parted, Settled; at the target Took, Granted, Landed, Settled; in the fleet Migrated. Departed
is the end of a job that has no Finished: of the source's when it was released, of the target's when it was dropped.
They are written and read like those of core.events, which lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from penstock.core.types import SCHEMA, BlockHash, Stage

MoveMode = Literal["live", "blocking", "queued", "pull"]
SettleHow = Literal["release", "resume", "confirm", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A job as it travels, beside its request: all that another replica needs to go on with it.

    `computed`: positions whose keys and values come along, 0 = none. `encoded`: images whose embeddings do.
    `output_ids` is empty where tokens are modelled. `filled`: hashes of full blocks behind those of the prompt.
    `chance`: what its tokens are drawn from; None = the replica's own choice. Instants travel as ages, in seconds
    before the state was taken, as clocks of machines differ.
    """

    answer: int = 0
    num_output: int = 0
    output_ids: tuple[int, ...] = ()
    computed: int = 0
    cached: int = 0
    filled: tuple[BlockHash, ...] = ()
    chance: int | None = None
    is_streamed: bool = True
    num_preemptions: int = 0
    num_recomputed: int = 0
    age_s: float = 0.0
    admitted_age_s: float | None = None
    first_token_age_s: float | None = None
    last_token_age_s: float | None = None
    encoded: int = 0
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCard:
    """What the blocks of a replica's KV memory are, and where peers read them.

    Between replicas of equal `layout` blocks can be copied as bytes. `address` is for a transport: "shared:...",
    "tcp:...", "inside:...". `devices`: that a modelled replica's blocks are divided over, each with wires of its own.
    """

    layout: str
    address: str
    block_size: int
    block_bytes: int
    devices: int = 1


class MoveAsked(Struct, kw_only=True, frozen=True, gc=False):
    """A replica was told to let a request go (input): Parted follows as soon as no plan holds it, or it ends first."""

    kind: Literal["move_asked"] = "move_asked"
    at: float
    who: str
    move: int
    request: str


class PauseAsked(Struct, kw_only=True, frozen=True, gc=False):
    """A replica was told to stop a request behind its first token (input): it stands still until it moves or WentOn.

    `before`: the stage that it is not to begin, where that is another one than "decode".
    """

    kind: Literal["pause_asked"] = "pause_asked"
    at: float
    who: str
    request: str
    before: Stage | UnsetType = UNSET


class WentOn(Struct, kw_only=True, frozen=True, gc=False):
    """A request that pauses, or was to, goes on where it is (input)."""

    kind: Literal["went_on"] = "went_on"
    at: float
    who: str
    request: str


class Parted(Struct, kw_only=True, frozen=True, gc=False):
    """A job was taken out of the running, to go on elsewhere; its blocks stay held until Settled."""

    kind: Literal["parted"] = "parted"
    at: float
    who: str
    move: int
    request: str
    seq: int
    num_output: int
    computed: int


class Took(Struct, kw_only=True, frozen=True, gc=False):
    """A replica was told to take a job in (input), with so much of it, in `num_blocks` of the source's.

    `filled`: hex hashes of blocks that its answer filled. `encoded`: images whose embeddings come.
    Instants of the job's life come as ages.
    """

    kind: Literal["took"] = "took"
    at: float
    who: str
    move: int
    request: str
    is_last: bool
    waits: bool
    num_output: int
    computed: int
    cached: int
    num_blocks: int = 0
    filled: tuple[str, ...] = ()
    num_preemptions: int = 0
    num_recomputed: int = 0
    age_s: float = 0.0
    admitted_age_s: float | None = None
    first_token_age_s: float | None = None
    last_token_age_s: float | None = None
    encoded: int | UnsetType = UNSET


class Granted(Struct, kw_only=True, frozen=True, gc=False):
    """There are blocks for it: `num_blocks` are to be copied, those before were here. `error`: there are none."""

    kind: Literal["granted"] = "granted"
    at: float
    who: str
    move: int
    request: str
    num_blocks: int
    error: str | None = None


class Landed(Struct, kw_only=True, frozen=True, gc=False):
    """What was granted has been copied, or `error` says why not (input). After the last one the job goes on."""

    kind: Literal["landed"] = "landed"
    at: float
    who: str
    move: int
    request: str
    error: str | None = None


class Settled(Struct, kw_only=True, frozen=True, gc=False):
    """A movement is over for this replica (input); see core.messages.Settle."""

    kind: Literal["settled"] = "settled"
    at: float
    who: str
    move: int
    request: str
    how: SettleHow


class Departed(Struct, kw_only=True, frozen=True, gc=False):
    """A job is no longer here, and its answer did not end here: it goes on elsewhere, or never began here."""

    kind: Literal["departed"] = "departed"
    at: float
    who: str
    request: str
    seq: int


MoveOutcome = Literal[
    "committed",
    "refused",  # it could not begin: `why`
    "finished_first",
    "cancelled",
    "source_aborted",  # preempted, or too many stages
    "target_aborted",  # no room, or the copy failed
    "source_lost",
    "target_lost",
    "timed_out",
]


class Migrated(Struct, kw_only=True, frozen=True, gc=False):
    """A movement ended, as the fleet saw it (input): if committed, the request counts for `target` from now on.

    `pause_s`: from the word that the source had let it go to the word that the target runs it. `num_blocks` and
    `num_bytes` were copied, in `stages`.
    """

    kind: Literal["migrated"] = "migrated"
    at: float
    who: str
    request: str
    source: str
    target: str
    mode: MoveMode
    outcome: MoveOutcome
    why: str = ""
    asked_at: float = 0.0
    stages: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    pause_s: float | None = None
