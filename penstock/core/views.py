"""What policies see and say: read-only windows on jobs, requests, memory and costs, and the words of a decision.

Views are valid during the call only. They hold no token ids, block ids, clocks or tensors, so the same policy
object runs in the simulator, in the engine and on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeVar

from msgspec import Struct

from penstock.core.moving import MoveMode
from penstock.core.types import (
    BlockHash,
    Kind,
    Phase,
    ProgramId,
    Prompt,
    RequestId,
    Sampling,
    Slo,
    Status,
    WorkOption,
)

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray


class RequestView(Protocol):
    """A request without what only executors may know."""

    @property
    def id(self) -> RequestId: ...
    @property
    def model(self) -> str: ...
    @property
    def prompt(self) -> Prompt: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def slo(self) -> Slo: ...
    @property
    def n(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def program(self) -> ProgramId | None: ...


class JobView(Protocol):
    """A job, read-only; see Job for the meaning of each name."""

    @property
    def seq(self) -> int: ...
    @property
    def request(self) -> RequestView: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrived_at(self) -> float: ...
    @property
    def num_prompt(self) -> int: ...
    @property
    def num_output(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def known(self) -> int: ...
    @property
    def computed(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def carried(self) -> tuple[int, int] | None: ...
    @property
    def todo(self) -> int: ...
    @property
    def is_prefilling(self) -> bool: ...
    @property
    def status(self) -> Status: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def admitted_at(self) -> float | None: ...
    @property
    def first_token_at(self) -> float | None: ...
    @property
    def last_token_at(self) -> float | None: ...
    def frontier(self) -> list[WorkOption]: ...


class BlockView(Protocol):
    """A cached block that nobody uses at the moment."""

    @property
    def num_blocks(self) -> int: ...


class Chunk(NamedTuple):
    """`tokens` positions of one job, through `layers` (first, last+1; None = the whole model)."""

    job: JobView
    tokens: int
    layers: tuple[int, int] | None = None
    phase: Phase = "extend"


class Singles(Struct, gc=False):
    """One position of each of `jobs`, all of which yield a token, then `others`. Reads like a tuple of chunks.

    Without others it is the plain decode step, which nearly every step is.
    """

    jobs: tuple[JobView, ...]
    others: tuple[Chunk, ...] = ()

    def __len__(self) -> int:
        return len(self.jobs) + len(self.others)

    def __iter__(self) -> Iterator[Chunk]:
        yield from [Chunk(job, 1) for job in self.jobs]
        yield from self.others


class Lane(NamedTuple):
    """Chunks that share one slice of the device; 0 < share <= 1."""

    chunks: tuple[Chunk, ...] | Singles
    share: float = 1.0


class Flying(NamedTuple):
    """A plan that was launched and has not ended. `ran_s`: seconds it has run, without those it was suspended.

    `activation_bytes`: what a suspended one holds outside the blocks of its jobs; 0 while it runs. `is_stopping`: it
    was asked to stop and has not reached a boundary yet.
    """

    plan: int
    lane: int
    chunks: tuple[Chunk, ...] | Singles
    ran_s: float
    activation_bytes: int = 0
    is_stopping: bool = False


class Batch(NamedTuple):
    """One step: lanes side by side. `nano` names a registered intra-step template, None = the plain forward."""

    lanes: tuple[Lane, ...] = ()
    nano: str | None = None


Item = TypeVar("Item")


class Eviction(NamedTuple, Generic[Item]):
    """One item that leaves fast memory. For jobs `drop` means: free its blocks, recompute later.

    "host" means: copy what it computed to host memory, and back when it is admitted again. A replica without such
    memory drops.
    """

    item: Item
    to: Literal["drop", "host", "peer"] = "drop"


class Move(Struct, frozen=True, gc=False):
    """One request's change of place; the modes are those of policy.move."""

    request: RequestId
    source: str
    target: str
    mode: MoveMode = "live"


class Loan(Struct, frozen=True, gc=False):
    """Blocks of a request that runs at one replica, for another to keep; see cluster.lendings."""

    request: RequestId
    debtor: str
    creditor: str
    num_blocks: int


class Behind(NamedTuple):
    """Blocks of a prompt in a row behind those on the device: in host memory, and behind these on disk."""

    host: int = 0
    disk: int = 0


class BlockFinder(Protocol):
    """What replicas hold by hash, as far as anybody heard: the blocks of chained hashes that each has in a row."""

    def match(self, hashes: Sequence[BlockHash]) -> Mapping[str, int]:
        """Blocks of the beginning of `hashes` on the device, by replica; those that hold none are left out."""
        ...

    @property
    def has_tiers(self) -> bool:
        """Whether replicas tell of memory behind the device's."""
        ...

    def behind(self, hashes: Sequence[BlockHash]) -> Mapping[str, Behind]:
        """What lies behind those in other memory, by replica; those where nothing does are left out."""
        ...

    def depth(self, hashes: Sequence[BlockHash], name: str) -> int:
        """`match` of one replica."""
        ...


class PhaseCost(Protocol):
    """What the two phases of a request take on a replica of this fleet; for policies about other machines."""

    def prefill_s(self, new: int, cached: int = 0) -> float:
        """Of `new` prompt tokens behind `cached` ones, alone in a step."""
        ...

    def decode_s(self, num_jobs: int, tokens: int) -> float:
        """Of one step of so many decodes that read `tokens` positions together."""
        ...


class Rng(Protocol):
    """The seeded stream that a mechanism hands to one policy."""

    def random(self) -> float: ...
    def randrange(self, stop: int, /) -> int: ...


class LedgerFork(Protocol):
    """A what-if copy of a replica's block accounting: booking here touches nothing real."""

    @property
    def block_size(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int:
        """Blocks that can be taken: unused ones and cached ones nobody holds."""
        ...

    def held(self, job: JobView) -> int:
        """Blocks the job holds, with what was booked in this fork."""
        ...

    def cached(self, job: JobView) -> int:
        """Positions a waiting job would not have to compute if admitted now (at most known - 1).

        It finds them in the prefix cache, or gets them back from host memory, for which `need` counts blocks.
        """
        ...

    def need(self, job: JobView, upto: int) -> int:
        """Blocks that leave `free` if the job is to hold positions [0, upto), adopted cached ones included."""
        ...

    def reserve(self, job: JobView, upto: int) -> bool:
        """Book positions [0, upto) and answer True, or book nothing and answer False."""
        ...

    def release(self, job: JobView) -> int:
        """Give back all the job's blocks; the number that became free."""
        ...

    def freeable(self, job: JobView) -> int:
        """Blocks that only this job holds."""
        ...


class Ledger(Protocol):
    """The real accounting, seen by policies only through forks."""

    def fork(self) -> LedgerFork: ...


class Cost(Protocol):
    """Predicts the outside. `share` is the lane's slice of the device."""

    def predict(self, chunks: Iterable[Chunk], share: float = 1.0) -> float:
        """Seconds that one step of these chunks takes."""
        ...


class Lengths(Protocol):
    """Estimates of how many tokens a job will still produce."""

    def quantile(self, job: JobView, q: float) -> int:
        """Total output length not exceeded with probability q, given that it passed num_output."""
        ...

    def quantiles(self, jobs: Sequence[JobView], q: float) -> Sequence[int]:
        """`quantile` of each of these jobs, for policies that ask about hundreds at once."""
        ...

    def sample(self, job: JobView, u: float) -> int:
        """The total output length at uniform draw u of the same conditional distribution."""
        ...


class Outlook(NamedTuple):
    """What is expected of the agent run that a job is one call of, by runs that began alike.

    stages_left: rounds of calls after this one. tokens_left: output tokens of these that are written one after the
    other, tokens_most: as many as nine of ten runs do not exceed. waits_s: of tools between them. others: output tokens
    of all other calls, ended and to come. deadline_at: when the run is due, due_at: when this call is, so that the rest
    may follow.
    """

    stages_left: float
    tokens_left: float
    tokens_most: float
    waits_s: float
    others: float
    deadline_at: float
    due_at: float


class Programs(Protocol):
    """Estimates about the agent runs that several requests belong to."""

    def outlook(self, job: JobView) -> Outlook | None:
        """None for a job of no run, or of one that nobody is promised anything about."""
        ...


class NoPrograms:
    """Knows of none."""

    def outlook(self, job: JobView) -> Outlook | None:
        return None


NO_PROGRAMS = NoPrograms()
Answer = Literal["yes", "no", "later"]
Admit = Callable[[JobView, int, LedgerFork], Answer]
Victims = Callable[[JobView, int, Sequence[JobView], LedgerFork], Sequence[Eviction[JobView]]]


class Columns(Protocol):
    """Struct of arrays over the running or the waiting jobs, in the order of the sequence beside it.

    Names: seq, priority, arrived_at, num_prompt, num_output, known, computed, todo, max_tokens, deadline_at (the next
    instant promised), last_at (that of the last token; both inf where there is none), tenant (a number, good for this
    call). For policies that rank thousands of jobs a step.
    """

    def __getitem__(self, name: str) -> NDArray[float64]: ...
    def __len__(self) -> int: ...
