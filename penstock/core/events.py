"""The event log: what happened, one event a step and never one a token.

Metrics, progress, Prometheus, reports and `replay` are functions of it. Each process writes its own log: a
Header, then events in the order in which its mechanisms consumed or caused them. `who` names the mechanism
("replica-0", "fleet"). Instants `at` are seconds of that process's loop clock; the header's anchor places them in
the world. Inputs (Arrived, Cancelled, Completed, Reported...) are complete enough to run the same mechanisms again;
decisions carry a digest and a `why`. No prompt and no output text is ever written.

Every record is a msgspec Struct whose first field `kind` names it: the JSON line starts with it. Records are read-only
to everybody. Structs and not dataclasses, because a simulation makes and writes hundreds of thousands of them: they are
made five times and written twice as fast.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from penstock.core.fetching import FetchEvent
from penstock.core.heard import Begun as Begun
from penstock.core.heard import BlocksTold as BlocksTold
from penstock.core.lending import LendingEvent
from penstock.core.lending import Loaned as Loaned
from penstock.core.lending import LoanOver as LoanOver
from penstock.core.lending import Owed as Owed
from penstock.core.lending import Spilled as Spilled
from penstock.core.moving import (
    Departed,
    Granted,
    Landed,
    Migrated,
    MoveAsked,
    Parted,
    PauseAsked,
    Settled,
    Took,
    WentOn,
)
from penstock.core.reshaping import Reshaped as Reshaped
from penstock.core.steered import Left as Left
from penstock.core.steered import Scaled as Scaled
from penstock.core.steered import Served as Served
from penstock.core.steered import Steered as Steered
from penstock.core.types import SCHEMA, FinishReason, Report, Slo


class Header(Struct, kw_only=True, frozen=True, gc=False):
    """First record of a log. `profile` is the digest of the cost profile predictions came from, "" for none."""

    kind: Literal["header"] = "header"
    schema: int = SCHEMA
    version: str = ""
    who: str = ""
    config: str = ""  # TOML of the whole configuration
    seed: int = 0
    profile: str = ""
    loop_at: float = 0.0
    wall_at: float = 0.0


class Opened(Struct, kw_only=True, frozen=True, gc=False):
    """A mechanism begins (input). `made` is the JSON of all it was made of, enough to make it again."""

    kind: Literal["opened"] = "opened"
    at: float
    who: str
    what: Literal["replica", "fleet"]
    made: str


class Arrived(Struct, kw_only=True, gc=False):
    """A request reached `who` (input). `hashes` are hex block hashes at the replica's block size.

    A prompt of a trace carries what its hashes are made of instead: `hash_ids` of runs of `traced_size` tokens, `salt`.
    `is_scored`: every prompt token is computed, so nothing of it is shared. `images`: tokens of each.
    `num_output` tokens of its answer came along with a request that went on elsewhere before, asked for and begun so
    many seconds ago (`ages`); `move`: it comes from another replica, and Took follows.
    """

    kind: Literal["arrived"] = "arrived"
    at: float
    who: str
    request: str
    seq: int  # of its first job (replicas), 0 in fleets
    model: str
    num_prompt: int
    max_tokens: int
    n: int
    tenant: str
    priority: int
    slo: Slo
    adapter: str | None = None
    program: str | None = None
    request_kind: str = "generate"
    hashes: tuple[str, ...] = ()
    hash_ids: tuple[int, ...] = ()
    traced_size: int | None = None
    salt: str = ""
    is_scored: bool = False
    num_output: int | UnsetType = UNSET
    ages: tuple[float, float | None] | UnsetType = UNSET
    move: int | UnsetType = UNSET
    images: tuple[int, ...] | UnsetType = UNSET


class Routed(Struct, kw_only=True, gc=False):
    """A fleet chose (decision). `replica` None = refused for now.

    `tried`: of a request that is handed on, those it was not to choose; of others it follows from what stands before.
    """

    kind: Literal["routed"] = "routed"
    at: float
    who: str
    request: str
    replica: str | None
    stage: str
    why: str
    tried: tuple[str, ...] | UnsetType = UNSET


class Refused(Struct, kw_only=True, frozen=True, gc=False):
    """A request was turned away; `code` is the error's class name.

    Of one that had not arrived (a fleet's bound, draining) it says whose it was: `tenant` is None for the others.
    """

    kind: Literal["refused"] = "refused"
    at: float
    who: str
    request: str
    code: str
    why: str
    tenant: str | None = None
    priority: int = 0
    slo: Slo = Slo()
    n: int = 1


class Cancelled(Struct, kw_only=True, frozen=True, gc=False):
    """The caller went away or had enough (input)."""

    kind: Literal["cancelled"] = "cancelled"
    at: float
    who: str
    request: str


class Stepped(Struct, kw_only=True, gc=False):
    """One call of the policies and what was launched (decision); `plan` None = nothing could run.

    `digest` covers ranking, admissions, evictions and lanes, and is "" when this event says all that was decided;
    `chunks` lists (seq, tokens) of each lane in order.
    `repeat` identical steps were asked for; Completed says how many were run. `partial`: the seqs whose chunk does not
    reach the last layer. `interrupted` and `resumed`: plans that were asked to stop inside their forward, or to go on.
    `share`: of the device that the plan has beside other lanes.
    `offloaded`: those of `evicted` whose blocks are kept in host memory; `loaded`: those of `admitted` that get them
    back. `images`: (seq, number) of those that are encoded.
    """

    kind: Literal["stepped"] = "stepped"
    at: float
    who: str
    plan: int | None
    lane: int
    digest: str
    repeat: int
    chunks: tuple[tuple[int, int], ...]
    admitted: tuple[int, ...]
    evicted: tuple[int, ...]
    num_running: int
    num_waiting: int
    free_blocks: int
    why: str = ""
    partial: tuple[int, ...] = ()
    interrupted: tuple[int, ...] = ()
    resumed: tuple[int, ...] = ()
    offloaded: tuple[int, ...] = ()
    loaded: tuple[int, ...] = ()
    share: float = 1.0
    images: tuple[tuple[int, int], ...] | UnsetType = UNSET


class Suspended(Struct, kw_only=True, gc=False):
    """A plan stopped inside its forward (input): it goes on when a decision resumes it."""

    kind: Literal["suspended"] = "suspended"
    at: float
    who: str
    plan: int
    activation_bytes: int = 0


class Transferred(Struct, kw_only=True, gc=False):
    """A copy of blocks to host memory, or back, has ended (input). `num_runs` pieces of consecutive blocks.

    `seq` None: of cached blocks, which no job holds.
    """

    kind: Literal["transferred"] = "transferred"
    at: float
    who: str
    transfer: int
    seq: int | None
    is_out: bool
    num_blocks: int
    num_runs: int


class FiledAway(Struct, kw_only=True, gc=False):
    """Cached blocks were written to disk (`is_out`) or read back (input).

    `bad`: those that could not be, by their place; `error`: why nothing more is written.
    """

    kind: Literal["filed_away"] = "filed_away"
    at: float
    who: str
    filing: int
    is_out: bool
    num_blocks: int
    bad: tuple[int, ...] = ()
    error: str | None = None


class AdapterLoaded(Struct, kw_only=True, frozen=True, gc=False):
    """An adapter is in a slot, or `error` says why it cannot be (input)."""

    kind: Literal["adapter_loaded"] = "adapter_loaded"
    at: float
    who: str
    adapter: str
    slot: int
    error: str | None = None


class Completed(Struct, kw_only=True, gc=False):
    """A plan ended (input). `outputs` lists (seq, tokens, is_stop, hex hashes of blocks its tokens filled).

    `ends` are the end instants of each of the `steps_run` repeats.
    """

    kind: Literal["completed"] = "completed"
    at: float
    who: str
    plan: int
    steps_run: int
    ends: tuple[float, ...]
    outputs: tuple[tuple[int, int, bool, tuple[str, ...]], ...]
    errors: tuple[tuple[int, str], ...] = ()
    error: str | None = None  # the whole step failed


class Drafted(Struct, kw_only=True, gc=False):
    """Guesses were verified by the plan whose Completed follows (input): (seq, guesses, those that were right)."""

    kind: Literal["drafted"] = "drafted"
    at: float
    who: str
    plan: int
    guesses: tuple[tuple[int, int, int], ...]


class Finished(Struct, kw_only=True, gc=False):
    """One answer ended. Times are instants on `who`'s clock; first/last are None when no token was produced."""

    kind: Literal["finished"] = "finished"
    at: float
    who: str
    request: str
    answer: int
    reason: FinishReason
    arrived_at: float
    admitted_at: float | None
    first_token_at: float | None
    last_token_at: float | None
    num_prompt: int
    num_cached: int
    num_output: int
    num_preemptions: int
    tenant: str
    priority: int
    slo: Slo
    num_recomputed: int = 0  # positions computed again after preemptions


class Reported(Struct, kw_only=True, gc=False):
    """A report reached a fleet (input)."""

    kind: Literal["reported"] = "reported"
    at: float
    who: str
    report: Report


class Ended(Struct, kw_only=True, gc=False):
    """A fleet heard that a request is over (input): its outstanding count goes down."""

    kind: Literal["ended"] = "ended"
    at: float
    who: str
    request: str
    replica: str


class Refitted(Struct, kw_only=True, frozen=True, gc=False):
    """A predictor changed its coefficients (input): `values` by name."""

    kind: Literal["refitted"] = "refitted"
    at: float
    who: str
    what: str
    values: tuple[tuple[str, float], ...]


Event = (
    Header
    | Opened
    | Arrived
    | Routed
    | Refused
    | Cancelled
    | Stepped
    | Suspended
    | Transferred
    | FiledAway
    | AdapterLoaded
    | Drafted
    | Completed
    | Finished
    | PauseAsked
    | WentOn
    | MoveAsked
    | Parted
    | Took
    | Granted
    | Landed
    | Settled
    | Departed
    | Migrated
    | LendingEvent
    | FetchEvent
    | Reported
    | BlocksTold
    | Begun
    | Ended
    | Steered
    | Served
    | Scaled
    | Left
    | Reshaped
    | Refitted
)
