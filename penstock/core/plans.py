"""What crosses the executor port: plans going in, completions coming out. Plain numbers, no live objects.

Read-only once made; Plan and Done are not declared frozen because one of each is made for every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import Struct

from penstock.core.moving import JobState
from penstock.core.types import BlockHash, Phase, PlanId, Request, TokenLogprob


class Work(NamedTuple):
    """A chunk as executors see it: plain numbers, no live job.

    The executor computes positions [start, start + tokens) of job `seq`. `blocks` are the ids of the blocks it
    got since it was last planned (all of them after an admission, with `is_fresh` set). `samples` = draw a token.

    In the phase "verify" the first position is that of the job's last token, and behind it there is room for
    `tokens` - 1 guesses, of which the executor may make fewer, or none: it answers with 1 token, and with one more
    for each guess that was right. What it wrote behind those counts as never written.
    """

    seq: int
    start: int
    tokens: int
    samples: bool
    blocks: tuple[int, ...] = ()
    is_fresh: bool = False
    layers: tuple[int, int] | None = None
    phase: Phase = "extend"

    @property
    def num_rows(self) -> int:
        """Rows that a token is drawn from."""
        return self.tokens if self.phase == "verify" else int(self.samples)


class Decodes(Struct, gc=False):
    """Work of which the first part is written by columns: job `seqs[i]` computes position `starts[i]` and samples.

    Without `others`, which come behind, it is a plain decode step. Reads like a tuple of Work. `fresh`: by seq, the ids
    of blocks that a job of the first part got since it was last planned.
    """

    seqs: tuple[int, ...]
    starts: tuple[int, ...]
    fresh: dict[int, tuple[int, ...]]
    others: tuple[Work, ...] = ()

    def __len__(self) -> int:
        return len(self.seqs) + len(self.others)

    def __iter__(self) -> Iterator[Work]:
        get = self.fresh.get
        for seq, start in zip(self.seqs, self.starts, strict=True):
            yield Work(seq, start, 1, True, get(seq, ()))
        yield from self.others


class Opening(NamedTuple):
    """A job the executor has not met: sent with the first plan that runs it.

    `state`: of one that went on elsewhere before.
    """

    seq: int
    request: Request
    answer: int
    state: JobState | None = None


class Encoding(NamedTuple):
    """The next images of a job, by the tokens that each stands for."""

    seq: int
    tokens: tuple[int, ...]


class Plan(Struct, gc=False):
    """What an executor runs: one lane of one step, self-contained (it may cross a process boundary).

    `images` are encoded before the work, of which there may be none then.
    """

    id: PlanId
    work: tuple[Work, ...] | Decodes
    opened: tuple[Opening, ...] = ()
    closed: tuple[int, ...] = ()  # jobs whose state the executor may drop
    lane: int = 0
    share: float = 1.0
    nano: str | None = None
    num_running: int = 0  # for charging scheduler time in simulation
    num_waiting: int = 0
    images: tuple[Encoding, ...] = ()


class Sampled(NamedTuple):
    """What one job got from a completed plan.

    tokens: how many tokens were produced. ids: the tokens, empty when modelled. is_stop: the last one ends the
    answer. filled: hashes of blocks that generated tokens completed. logprobs: one entry a token when asked.
    vector: of a job that embeds, with its last chunk.
    drafted: guesses that were verified; all tokens but the last one were among them.
    """

    seq: int
    tokens: int
    ids: tuple[int, ...] = ()
    is_stop: bool = False
    filled: tuple[BlockHash, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    error: str | None = None
    vector: bytes = b""
    drafted: int = 0


@dataclass(slots=True)
class Done:
    """A plan ran `steps_run` times. `ends` holds the end instant of each run, oldest first."""

    plan: PlanId
    steps_run: int
    outputs: tuple[Sampled, ...]
    ends: tuple[float, ...]
    error: str | None = None  # the whole step failed: every job of the plan ends with it


Count = tuple[int, int, bool, tuple[()]]  # seq, tokens, is_stop, nothing filled


class Counted(Done):
    """A completion of bare counts, which is all that a modelled leaf has to say: one for each chunk that samples, in
    the plan's order. `outputs` says the same for whoever asks.
    """

    __slots__ = ("counts",)

    def __init__(
        self,
        plan: PlanId,
        steps_run: int,
        counts: tuple[Count, ...],
        ends: tuple[float, ...],
    ) -> None:
        self.plan, self.steps_run, self.counts, self.ends = plan, steps_run, counts, ends
        self.error = None

    @property
    def outputs(self) -> tuple[Sampled, ...]:  # type: ignore[override]
        return tuple([Sampled(seq, tokens, (), is_stop) for seq, tokens, is_stop, _ in self.counts])


class Transfer(Struct, frozen=True, gc=False):
    """Blocks to be copied to slower memory (`is_out`) or back: `runs` of (device block, host block, count).

    `seq`: the job that holds them; None of cached blocks, which nobody holds. `is_sync`: no plan that is launched later
    begins before it has ended. `threads` start the copies side by side.
    """

    id: int
    seq: int | None
    is_out: bool
    runs: tuple[tuple[int, int, int], ...]
    is_sync: bool = False
    threads: int = 1

    @property
    def num_blocks(self) -> int:
        return sum([count for _, _, count in self.runs])


class Moved(Struct, frozen=True, gc=False):
    """A transfer has ended."""

    transfer: int
    at: float


class Filing(Struct, frozen=True, gc=False):
    """Host blocks to be written to disk (`is_out`) or read back: `pairs` of (host block, slot), and their names."""

    id: int
    is_out: bool
    pairs: tuple[tuple[int, int], ...]
    names: tuple[BlockHash, ...]


class Filed(Struct, frozen=True, gc=False):
    """A filing has ended. `bad`: places in its `pairs` that were not written, or do not hold what they should.

    `error`: why the disk takes no more; it is asked for nothing further to be written.
    """

    filing: int
    at: float
    bad: tuple[int, ...] = ()
    error: str | None = None


class Adapted(Struct, frozen=True, gc=False):
    """An adapter is in its slot, or `error` says why it cannot be."""

    adapter: str
    slot: int
    at: float
    error: str | None = None


class Yielded(Struct, frozen=True, gc=False):
    """A plan stopped inside its forward and can be resumed; `activation_bytes` stay held meanwhile."""

    plan: PlanId
    at: float
    activation_bytes: int = 0
