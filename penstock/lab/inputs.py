"""A log's inputs as a mechanism takes them, and the executor that runs nothing because the log says what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from msgspec import UNSET

from penstock.core.events import Arrived, Completed, Event, Refused
from penstock.core.fetching import (
    BlocksBrought,
    Hinted,
    Pinned,
    SeekAnswered,
    SeekLate,
    Unpinned,
)
from penstock.core.images import parts_of
from penstock.core.lending import (
    LendingEvent,
    Loaned,
    LoanOver,
    Owed,
    Recalled,
    Relocated,
    Spilled,
)
from penstock.core.moving import JobState, Landed, MoveAsked, PauseAsked, Settled, Took, WentOn
from penstock.core.plans import Done, Filing, Plan, Sampled, Transfer
from penstock.core.ports import Completion, Grain
from penstock.core.prompt import HashedPrompt, TracedPrompt
from penstock.core.types import (
    BlockHash,
    Caps,
    Kind,
    PlanId,
    ProgramId,
    Prompt,
    Request,
    RequestId,
    Sampling,
)
from penstock.engine.joinings import Landing, Taking
from penstock.engine.loans import Borrowing, Copied, Lending, Returning
from penstock.engine.moves import FetchOrder, Order
from penstock.engine.partings import Offering, Settling
from penstock.engine.pauses import GoingOn, Pausing
from penstock.engine.pins import Pinning, Unpinning
from penstock.engine.recalls import Recalling, Relocating
from penstock.engine.seeks import Answering, Delaying, Fetched, Hinting


class ReplayedSharing:
    """Context that is lent, of which nothing is kept."""

    def lend(self, loan: int, blocks: Sequence[int]) -> str:
        return ""

    def take_back(self, loan: int, num_blocks: int | None = None) -> None:
        pass

    def borrow(self, loan: int, first: int, count: int, address: str) -> None:
        pass

    def spill(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        """Its end is in the log."""

    def relocate(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        """As spill."""

    def give_back(self, loan: int) -> None:
        pass


class ReplayedExecutor:
    """The executor port's third leaf: takes plans and runs nothing; the log says what came of them."""

    kv_block_bytes = 0

    def __init__(self, caps: Caps, found: Sequence[tuple[BlockHash, int]] = ()) -> None:
        self.caps, self.found, self.sharing = caps, found, ReplayedSharing()
        self.complete: Callable[[Completion], None] = lambda completion: None
        self.steps_of: Callable[[PlanId], int | None] = lambda plan: None

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self.complete = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        return plan.id

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> int | None:
        matters = self.caps.max_lanes > 1 or self.caps.moves_jobs
        return self.steps_of(plan) if grain == "step" and matters else None

    def resume(self, plan: PlanId) -> None:
        pass

    def abort(self, plan: PlanId) -> None:
        pass

    def close_jobs(self, seqs: Sequence[int]) -> None:
        pass

    def load_adapter(self, adapter: str, slot: int) -> None:
        """Its end is in the log."""

    def transfer(self, transfer: Transfer) -> None:
        pass

    def file(self, filing: Filing) -> None:
        pass

    def take_out(self, seq: int, num_output: int) -> tuple[tuple[int, ...], int | None]:
        return (), None

    async def stop(self) -> None:
        pass


def request_of(event: Arrived, block_size: int) -> Request:
    """The request as far as decisions could see it."""
    prompt = _prompt_of(event, block_size)
    hashes = prompt.blocks(block_size)
    kind: Kind = event.request_kind  # type: ignore[assignment]
    # Logs of 0.1 do not say it; there answers share hashes, private ones if need be, unless their prompt is scored.
    shares_nothing = event.is_scored or (
        event.n > 1 and not hashes and event.num_prompt >= block_size
    )
    return Request(
        id=RequestId(event.request),
        model=event.model,
        prompt=prompt,
        sampling=Sampling(
            max_tokens=event.max_tokens, prompt_logprobs=0 if shares_nothing else None
        ),
        slo=event.slo,
        n=event.n,
        tenant=event.tenant,
        priority=event.priority,
        adapter=event.adapter,
        program=None if event.program is None else ProgramId(event.program),
        kind=kind,
        parts=parts_of(event.images, event.num_prompt) if event.images else (),
    )


LOANS = get_args(LendingEvent)
FETCHES = (Hinted, SeekAnswered, SeekLate, BlocksBrought, Pinned, Unpinned)
MOVES = (MoveAsked, Took, Landed, Settled, PauseAsked, WentOn, *LOANS, *FETCHES)


def order_of(event: Event, coming: dict[int, Request]) -> Order:
    """What a movement's event made a replica do. `coming`: requests that arrived with a movement, by its number."""
    if isinstance(event, LOANS):
        return _loan_order(event)
    if isinstance(event, FETCHES):
        return _fetch_order(event)
    if isinstance(event, MoveAsked):
        return Offering(event.move, event.request, True, lambda offered: None)
    if isinstance(event, PauseAsked):
        return Pausing(event.request, event.before or "decode")
    if isinstance(event, WentOn):
        return GoingOn(event.request)
    if isinstance(event, Settled):
        return Settling(event.move, event.request, event.how)
    if isinstance(event, Landed):
        return Landing(event.move, event.error, lambda: None)
    assert isinstance(event, Took)
    return Taking(
        event.move,
        event.request,
        state_of(event),
        event.is_last,
        event.waits,
        coming.pop(event.move, None),
        tuple(range(event.num_blocks)),
        lambda pairs: None,
    )


def _loan_order(event: LendingEvent) -> Order:
    if isinstance(event, Loaned):
        return Lending(event.loan, event.num_blocks, lambda address, error: None)
    if isinstance(event, Owed):
        return Borrowing(event.loan, event.request, event.num_blocks, "")
    if isinstance(event, Spilled):
        return Copied(event.request, event.num_blocks, event.error)
    if isinstance(event, Recalled):
        into = tuple([(loan, count, "") for loan, count in event.into])
        return Recalling(event.loan, event.num_blocks, into, lambda error: None)
    if isinstance(event, Relocated):
        return Relocating(event.loan, event.error)
    assert isinstance(event, LoanOver)
    return Returning(event.loan, None if event.num_blocks is UNSET else event.num_blocks)


def _fetch_order(
    event: Hinted | SeekAnswered | SeekLate | BlocksBrought | Pinned | Unpinned,
) -> FetchOrder:
    if isinstance(event, Hinted):
        return Hinting(event.request, event.peer, event.num_blocks, lambda *wanted: None)
    if isinstance(event, SeekAnswered):
        blocks = tuple(range(event.num_blocks))
        return Answering(event.seek, blocks, event.error, lambda pairs: None)
    if isinstance(event, SeekLate):
        return Delaying(event.seek)
    if isinstance(event, BlocksBrought):
        return Fetched(event.seek, event.num_bytes, event.error)
    if isinstance(event, Pinned):
        names, before = (
            tuple([BlockHash(bytes.fromhex(each)) for each in told])
            for told in (event.names, event.before)
        )
        return Pinning(event.seek, names, before, event.reads_host, lambda blocks, hosts: None)
    return Unpinning(event.seek)


def resumed(event: Arrived) -> JobState | None:
    """What came along with a request that goes on from its tokens; None for all others."""
    if not isinstance(event.num_output, int):
        return None
    age_s, first_token_age_s = event.ages if isinstance(event.ages, tuple) else (0.0, None)
    return JobState(num_output=event.num_output, age_s=age_s, first_token_age_s=first_token_age_s)


def state_of(event: Took) -> JobState:
    """The job as it came, without token ids."""
    return JobState(
        num_output=event.num_output,
        computed=event.computed,
        cached=event.cached,
        filled=tuple(BlockHash(bytes.fromhex(each)) for each in event.filled),
        num_preemptions=event.num_preemptions,
        num_recomputed=event.num_recomputed,
        age_s=event.age_s,
        admitted_age_s=event.admitted_age_s,
        first_token_age_s=event.first_token_age_s,
        last_token_age_s=event.last_token_age_s,
        encoded=event.encoded or 0,
    )


def stranger_of(event: Refused) -> Request:
    """A request that was turned away before it arrived, as far as its refusal tells."""
    assert event.tenant is not None
    return Request(
        id=RequestId(event.request),
        model="",
        prompt=TracedPrompt(1),
        slo=event.slo,
        n=event.n,
        tenant=event.tenant,
        priority=event.priority,
    )


def _prompt_of(event: Arrived, block_size: int) -> Prompt:
    if event.hash_ids and event.traced_size is not None:
        return TracedPrompt(event.num_prompt, event.hash_ids, event.traced_size, event.salt)
    hashes = tuple(BlockHash(bytes.fromhex(each)) for each in event.hashes)
    return HashedPrompt(event.num_prompt, hashes, block_size)


def done_of(event: Completed, drafted: Mapping[int, int]) -> Done:
    """The completion as the replica was told it, without token ids. `drafted`: guesses by seq, from their event."""
    errors = dict(event.errors)
    outputs = [
        Sampled(
            seq,
            tokens,
            is_stop=is_stop,
            filled=tuple(BlockHash(bytes.fromhex(each)) for each in filled),
            error=errors.get(seq),
            drafted=drafted.get(seq, 0),
        )
        for seq, tokens, is_stop, filled in event.outputs
    ]
    return Done(PlanId(event.plan), event.steps_run, tuple(outputs), event.ends, event.error)
