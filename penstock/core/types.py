"""The vocabulary: every word that two rooms share, with one meaning each.

A `Request` is what a caller asks: frozen, it crosses machines. A `Job` is one answer to it in progress
inside one replica: mutable, it never leaves (a movement sends a core.moving.JobState). A replica advances jobs in
steps. One step runs a `Batch` of `Lane`s of `Chunk`s. Positions of a job fall into three runs:

    0 ........ computed ........ computed + in_flight ........ known
      KV valid          launched, not confirmed        still to do

`known` grows by one with every sampled token, so a decode is a job whose `todo` is 1 and a prefill one whose
`todo` is larger; nothing else tells them apart. Policies get jobs and requests through the read-only
protocols of core.views and never see token ids, block ids or the true output length.

Times are seconds of the running loop's clock, sizes are tokens unless the name says bytes or blocks.
This module, core.adapters and core.views import the standard library, msgspec and no asyncio: `policy` imports them
and must be pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, NewType, Protocol, runtime_checkable

from msgspec import UNSET, Struct, UnsetType

from penstock.core.adapters import AdapterReport
from penstock.core.asks import Grammar as Grammar
from penstock.core.asks import Sampling as Sampling
from penstock.core.asks import Slo as Slo
from penstock.core.job import Job as Job

SCHEMA = 1  # major version of everything written or sent; see core.schema

RequestId = NewType("RequestId", str)
ProgramId = NewType("ProgramId", str)
PlanId = NewType("PlanId", int)
BlockHash = NewType("BlockHash", bytes)

Kind = Literal["generate", "embed", "score"]
Stage = Literal["encode", "prefill", "decode"]
# The stages that a replica takes requests for. Images of a prompt are encoded where it is computed unless somebody
# takes that stage.
Role = Literal["any", "encode", "prefill", "decode", "encode-decode"]
Phase = Literal["extend", "refresh", "reuse", "commit", "full", "verify"]
Status = Literal["waiting", "blocked", "running", "suspended", "offloaded", "in_transfer", "ended"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@runtime_checkable
class Prompt(Protocol):
    """What a request starts from. Real prompts hash their token ids, traced ones carry their hashes."""

    @property
    def num_tokens(self) -> int: ...

    def blocks(self, size: int) -> tuple[BlockHash, ...]:
        """Chained hashes of the full blocks of `size` tokens; empty when the prompt shares nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of a prompt that is not text (images, of modelled replicas): its kind, digest, and its tokens."""

    kind: Literal["image", "audio", "video"]
    digest: bytes
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a caller asks of a fleet.

    `priority`: lower goes first. `n`: answers wanted; each becomes a Job and they share the prompt's blocks.
    `true_output`: the length a modelled executor will produce, known from a trace; no policy sees it.
    `second_at`: where the second of a pair of texts begins in the prompt, for models that tell them apart.
    `text` is never part of a request: tokenising is the gateway's work.
    """

    id: RequestId
    model: str
    prompt: Prompt
    sampling: Sampling = Sampling()
    slo: Slo = Slo()
    n: int = 1
    tenant: str = "default"
    priority: int = 0
    adapter: str | None = None
    cache_salt: str = ""
    kind: Kind = "generate"
    parts: tuple[Part, ...] = ()
    program: ProgramId | None = None
    true_output: int | None = None
    second_at: int | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if self.prompt.num_tokens < 1:
            raise ValueError("the prompt is empty: it needs at least one token")
        if self.sampling.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.sampling.max_tokens}")

    @property
    def scores_prompt(self) -> bool:
        """Whether every prompt token must be computed, cached or not: something is read off each of them."""
        return self.kind != "generate" or self.sampling.prompt_logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The agent run that several requests belong to: mirrored into views, owned above the replica."""

    id: ProgramId
    stage: int = 0
    stages_left: int | None = None
    deadline_at: float | None = None


class WorkOption(NamedTuple):
    """One legal next piece of a job's work. A batch policy narrows it to a Chunk.

    `rows`: of logits that it may need. `holds`: positions that the job's blocks must hold, None = those up to its end.
    """

    phase: Phase
    tokens_min: int
    tokens_max: int
    samples: bool  # the chunk that reaches tokens_max yields a token
    rows: int = 1
    holds: int | None = None


class TokenLogprob(NamedTuple):
    """Natural-log probability of a token and of the most likely alternatives at its position."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLink:
    """What a copy between device and host takes: a start for each piece, and the bytes; each way has its own wire.

    `pieces`: copies that a run of consecutive blocks needs (keys and values of every layer lie apart).
    """

    dispatch_s: float
    bytes_per_s: float
    block_bytes: int
    pieces: int

    def seconds(self, num_runs: int, num_blocks: int, threads: int = 1) -> float:
        dispatch_s = num_runs * self.pieces * self.dispatch_s / threads
        return dispatch_s + num_blocks * self.block_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasRule:
    """How canvases are filled. `steps`: of a block, at most. `threshold` None: a step reveals its share of the masks.

    `delay` 0 keeps from the first step on. `refresh_every` None: once a block; 1: never reuses.
    """

    block_tokens: int = 32
    steps: int = 32
    delay: int = 1
    refresh_every: int | None = None
    retention: float = 0.5
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("block_tokens", "steps", "refresh_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.delay < 0:
            raise ValueError(f"delay counts steps, got {self.delay}")
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention must lie in (0, 1], got {self.retention}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {self.threshold}")

    def phase(self, step: int) -> Phase:
        """Of the block's step number `step`."""
        since = step - self.delay
        if since < 0:
            return "full"
        every = self.refresh_every
        is_refresh = since == 0 or (every is not None and since % every == 0)
        return "refresh" if is_refresh else "reuse"

    def num_kept(self, positions: int) -> int:
        return math.ceil(self.retention * positions - 1e-9)


class StepTemplate(NamedTuple):
    """A pipeline of nano-batches that an executor knows by name, for steps of up to so many tokens."""

    tokens: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What an executor can do. Batch policies must stay inside it; the replica validates.

    `host_blocks`: slower memory that blocks can be copied to, 0 = none; `link`: what that takes, None = not known.
    `tier_blocks`: so many more behind these, for cached blocks; `disk_blocks`: on disk behind those (engine.tiers).
    `templates`: pipelines that a step may be run under (`Batch.nano`), the smallest first.
    """

    num_layers: int
    max_context: int
    max_batch_tokens: int = 1 << 30
    max_jobs: int = 1 << 30
    max_lanes: int = 1
    max_total_share: float = 1.0
    max_repeat: int = 1  # > 1: may run identical decode steps as one launch
    has_layer_ranges: bool = False
    yield_grain: Literal["step", "layer", "operator"] = "step"
    async_depth: int = 1
    canvas: CanvasRule | None = (
        None  # how answers are filled in; None = they are written from left to right
    )
    host_blocks: int = 0
    tier_blocks: int = 0
    disk_blocks: int = 0
    max_adapters: int = 0  # that can be resident at once, and so be used in one step
    link: HostLink | None = None
    templates: tuple[StepTemplate, ...] = ()
    moves_jobs: bool = False  # jobs can be taken out and in; see core.ports.PortableExecutor
    lends: bool = False  # see core.sharing.LendingExecutor
    encodes: bool = False  # images (Plan.images)


class Output(NamedTuple):
    """What a caller is told: new tokens of the request's `answer`-th answer, and why it ended if it did.

    `vector`: what a request of kind "embed" ends with, as little-endian fp32. `data`: bytes of the answer to an
    exchange that is passed on (core.forward).
    """

    answer: int
    ids: tuple[int, ...]
    num_tokens: int
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    num_cached: int = 0  # prompt tokens taken from the prefix cache
    error: str | None = None
    code: str | None = None  # class of core.errors that `error` is raised as; None = StepFailed
    vector: bytes = b""
    data: bytes = b""


class JobReport(Struct, array_like=True, gc=False):
    """One job of a replica, told where a policy chooses among jobs of other machines. `computed`: positions."""

    request: str
    answer: int
    status: Status
    priority: int
    waited_s: float  # since it arrived
    num_prompt: int
    num_output: int
    max_tokens: int
    computed: int
    num_blocks: int


class BroughtReport(NamedTuple):
    """What came from one place ("host", "disk", "peer"): seconds are those of the copies, `num_failed` blocks of host
    and disk, or fetches from peers, that came to nothing. `num_lost`: blocks that were to be saved there and had to go
    before they were."""

    place: str
    num_blocks: int
    num_bytes: int
    seconds: float
    num_failed: int
    num_lost: int = 0


class Report(Struct, kw_only=True, gc=False):
    """What a replica last said about itself: possibly stale, the only thing other machines see. Read-only.

    `lanes`: where plans run side by side, (share of the device, tokens) of the one in each lane; (0, 0) of an idle one.
    `drafts`: guesses verified so far, and the right ones among them; not written where there were none.
    `cached_tokens`: of `waiting_tokens`, those not to be computed; counted by replicas that tell of their blocks.
    `is_accepting`: nobody waits, and its next step has room for another prompt.
    `absorbed`: the highest number among the requests it was sent (Submit.seq); None: it does not look at numbers.
    `brought`: cached blocks that came from other places than the device since it began; not written where none did.
    `jobs`: only where a policy wants them (engine.reports).
    """

    replica: str
    at: float
    role: Role = "any"
    is_alive: bool = True
    is_draining: bool = False
    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0  # prompt tokens not yet computed
    free_blocks: int = 0
    total_blocks: int = 0
    block_size: int = 16
    max_context: int = 0
    step_s: float = 0.0  # duration of the last step
    lanes: tuple[tuple[float, int], ...] = ()
    adapters: AdapterReport | None = None  # None: there can be none
    drafts: tuple[int, int] | UnsetType = UNSET
    is_suspect: bool | UnsetType = (
        UNSET  # said by its link, never by itself: nothing was heard of it for a while
    )
    prefill_tokens: int = 0  # of running prompts, not computed yet
    cached_tokens: int = 0
    num_decoding: int = 0
    decode_tokens: int = 0  # positions that their next step reads
    num_urgent: int = 0  # running jobs that go before those of priority 0
    waiting_blocks: int = 0  # that all waiting jobs will take
    head_blocks: int = 0  # that the first of them will
    oldest_wait_s: float = 0.0
    num_preemptions: int = 0  # since it started
    is_accepting: bool = True
    moving_in: int = 0  # jobs on their way
    moving_out: int = 0
    absorbed: int | None = None
    lent_blocks: int | UnsetType = UNSET  # kept for other replicas' requests, where it can lend
    away_blocks: int | UnsetType = UNSET  # of its own requests, kept by others
    brought: tuple[BroughtReport, ...] | UnsetType = UNSET
    image_tokens: int | UnsetType = UNSET  # of images to encode, where it holds any
    jobs: tuple[JobReport, ...] | UnsetType = UNSET
    schema: int = SCHEMA
