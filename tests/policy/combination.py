"""One set of policies in one set of circumstances, played by a real replica on the model of hashes.

`play` serves the requests and holds everything to account: every answer ends once with the reference's text (a
cancelled one with a beginning of it), no block stays held, no plan stays suspended, and nobody takes so many steps that
he starves. The replica itself holds every decision to its law and recounts its books after every turn.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.core.clock import sleep_until
from penstock.core.events import Event, Finished, Stepped
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Caps, HostLink, Output, Request, RequestId, Sampling, Slo
from penstock.core.views import Batch, Eviction
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.cost.sharing import SHARINGS
from penstock.engine.limits import BoundLimits
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.swap import SwapConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import batch, find
from penstock.sim.loop import run
from tests.policy.hashed_model import LAYERS, VOCAB, Hashed, LanedHashed, Memory, Reference

SIZE = 4  # positions in a block
MOST_STEPS = 6000
STEP = Fitted({"step": 0.01, "token": 1e-3}, name="", digest="", num_layers=LAYERS)
LINK = HostLink(dispatch_s=1e-3, bytes_per_s=1e5, block_bytes=500, pieces=2)
Parameters = dict[str, Any]
ORDERS: dict[str, Parameters] = {"sjf": {"patience_s": 0.3}, "drr": {"quantum": 20.0}}


def small(batching: str, tokens: int) -> Parameters:
    """Parameters that matter where everything is small: steps of about so many tokens."""
    sglang = {"chunk_tokens": tokens, "clip_tokens": 8, "decay_steps": 9, "retract_steps": 3}
    known: dict[str, Parameters] = {
        "split-fuse": {"max_tokens": tokens, "max_sequences": 4},
        "jit": {"max_tokens": tokens, "max_sequences": 4, "renew_tokens": 3},
        "sglang": sglang,
        "semi-pd": sglang,
        "layered": {"round_tokens": 4 * tokens, "group_tokens": max(1, tokens // 2)},
        "flow-prefill": {"max_tokens": 2 * tokens, "batch_tokens": tokens},
        "prefill-first": {"decodes_between": 1},
        "speculative": {"max_drafts": 5, "probe_every": 2},
    }
    return known.get(batching, {"max_tokens": tokens})


@dataclass(frozen=True, kw_only=True)
class Case:
    """`num_ousted`: jobs that leave at random, whatever the policies say. `lanes` are used by who knows how."""

    order: str = "fcfs"
    admit: str = "full-fit"
    batch: str = "vllm-v1"
    inner: str = "vllm-v1"  # of a batch policy that wraps another
    evict: str = "recompute-last"
    blocks: str = "lru"
    limit: str = "fixed"
    num_blocks: int = 12
    host_blocks: int = 0
    mode: Any = "adaptive"
    lanes: int = 1
    max_jobs: int = 5
    max_tokens: int = 1 << 20
    max_repeat: int = 1
    has_prefix_cache: bool = True
    store: Any = "hash"
    has_layer_ranges: bool = True
    tokens: int | None = 12  # of a step; None: what each policy is made for
    num_ousted: int = 0
    num_requests: int = 8
    seed: int = 0

    @property
    def is_counted(self) -> bool:
        """Repeated steps take blocks that no executor hears of in time to write them and name them."""
        return self.max_repeat > 1

    def caps(self) -> Caps:
        return Caps(
            num_layers=LAYERS,
            max_context=1000,
            max_batch_tokens=self.max_tokens,
            max_jobs=self.max_jobs,
            max_lanes=self.lanes,
            max_total_share=float(self.lanes),
            max_repeat=self.max_repeat,
            has_layer_ranges=self.has_layer_ranges,
            yield_grain="operator",
            host_blocks=self.host_blocks,
            link=LINK if self.host_blocks else None,
        )

    def policies(self) -> ReplicaPolicies:
        parameters = {} if self.tokens is None else small(self.batch, self.tokens)
        batching = find("batch", self.batch)(**parameters)
        if self.limit != "fixed" and hasattr(batching, "bind_limits"):
            batching.bind_limits(BoundLimits(find("limit", self.limit)()))
        if hasattr(batching, "wrap"):
            told = {} if self.tokens is None else small(self.inner, self.tokens)
            batching.wrap(find("batch", self.inner)(**told))
        if self.num_ousted:
            batching = Ousting(batching, self.num_ousted, random.Random(f"oust {self.seed}"))
        return ReplicaPolicies(
            order=find("order", self.order)(**ORDERS.get(self.order, {})),
            admit=find("admit", self.admit)(),
            batch=batching,
            evict=find("evict", self.evict)(),
            blocks=find("evict", self.blocks)(),
        )


class Ousting:
    """A batch policy, and chance: now and then somebody else leaves as well. Each lane keeps a chunk."""

    def __init__(self, inner: Any, left: int, chance: random.Random) -> None:
        self._inner, self._left, self._chance = inner, left, chance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def decide(self, view: batch.View) -> batch.Decision:
        said: batch.Decision = self._inner.decide(view)
        lanes = [list(lane.chunks) for lane in said.batch.lanes]
        gone = {eviction.item.seq for eviction in said.evicted}
        ousted = []
        for job in view.running:
            if self._left < 1 or job.in_flight or job.seq in gone or self._chance.random() < 0.9:
                continue
            if any(len(lane) == 1 and lane[0].job is job for lane in lanes) or not lanes:
                continue
            self._left -= 1
            ousted.append(Eviction(job, self._chance.choice(("drop", "host"))))  # type: ignore[arg-type]
            lanes = [[chunk for chunk in lane if chunk.job is not job] for lane in lanes]
        if not ousted:
            said.outlasts = False  # for chance does not
            return said
        pairs = zip(said.batch.lanes, lanes, strict=True)
        left = tuple(lane._replace(chunks=tuple(chunks)) for lane, chunks in pairs)
        return batch.Decision(
            Batch(left, said.batch.nano), said.admitted, (*said.evicted, *ousted), said.why
        )


def requests(case: Case) -> list[Request]:
    """Of three families that share beginnings; some with several answers, stops, promises, or no answer at all."""
    rng = random.Random(case.seed)
    families = [[rng.randrange(VOCAB) for _ in range(40)] for _ in range(3)]
    room = case.num_blocks * SIZE
    asked = []
    for number in range(case.num_requests):
        most = min(40, room - 2)
        size = rng.choice((rng.randint(1, most), rng.randint(1, 12)))
        ids = rng.choice(families)[:size]
        cut = rng.randint(0, size)
        ids = [*ids[:cut], *(rng.randrange(VOCAB) for _ in range(size - cut))]
        if case.is_counted:  # else blocks without a name get one when their job leaves
            ids += [7] * (SIZE - len(ids))
        kind = "embed" if rng.random() < 0.08 else "generate"
        asked.append(_request(case, rng, number, ids, kind))
    return asked


def _request(case: Case, rng: random.Random, number: int, ids: list[int], kind: Any) -> Request:
    room = case.num_blocks * SIZE - len(ids)
    request = Request(
        id=RequestId(f"r{number}"),
        model="m",
        prompt=TokenPrompt(ids),
        sampling=Sampling(
            max_tokens=min(room, rng.randint(1, 16)),
            temperature=rng.choice((0.0, 1.0)),
            stop_ids=tuple(range(rng.choice((0, 0, 5)))),
        ),
        slo=Slo(
            ttft_s=rng.choice((None, 0.1, 0.3, 5.0)),
            tpot_s=rng.choice((None, 0.05)),
            deadline_s=rng.choice((None, 0.5, 9.0)),
        ),
        n=rng.choice((1, 1, 1, 2, 3)) if kind == "generate" else 1,
        tenant=rng.choice("abc"),
        priority=rng.randrange(3),
        kind=kind,
    )
    return with_length(request)


def with_length(request: Request) -> Request:
    """A modelled executor ends an answer by its true length, of which a request has one: several answers end alike."""
    if request.n > 1 and request.sampling.temperature > 0:
        request = replace(request, sampling=replace(request.sampling, stop_ids=()))
    reference = Reference(request, 0)
    is_stop = reference.is_stop(request)
    return replace(request, true_output=len(reference.ids) if is_stop else None)


@dataclass
class Played:
    case: Case
    asked: list[Request] = field(default_factory=list)
    told: dict[tuple[str, int], list[Output]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    num_steps: int = 0

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Stepped):
            self.num_steps += 1
            assert self.num_steps < MOST_STEPS, f"somebody starves: {event}"

    def hear(self, items: Sequence[tuple[str, Output]]) -> None:
        for name, output in items:
            heard = self.told.setdefault((name, output.answer), [])
            assert not heard or heard[-1].finish is None, "told of an answer that has ended"
            heard.append(output)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def num_preemptions(self) -> int:
        return sum(event.num_preemptions for event in self.of(Finished))


Asking = Callable[["Played", Replica], Awaitable[None]]


def play(case: Case, ask: Asking | None = None) -> Played:
    """`ask` submits the requests, and notes them in `asked`; default: those of `requests`, some of them cancelled."""
    played = Played(case)
    run(_serve(played, ask or _ask))
    return played


async def _serve(played: Played, ask: Asking) -> None:
    case = played.case
    memory = Memory(case.num_blocks, SIZE, case.host_blocks, case.seed)
    if case.lanes == 1:
        executor: Any = Hashed(STEP, caps=case.caps())
    else:
        executor = LanedHashed(STEP, caps=case.caps(), sharing=SHARINGS["fair"], bytes_per_s=1e12)
    executor.remember(memory, is_counted=case.is_counted, seed=case.seed)
    swap = SwapConfig(host_blocks=case.host_blocks, mode=case.mode, group_blocks=3)
    replica = Replica(
        ReplicaConfig(
            num_blocks=case.num_blocks,
            block_size=SIZE,
            has_prefix_cache=case.has_prefix_cache,
            store=case.store,
            seed=case.seed,
            is_checked=True,
            swap=swap,
        ),
        executor,
        case.policies(),
        Predictors(cost=StepPredictor(STEP, LAYERS), lengths=RecentLengths()),
        log=played,
        on_outputs=played.hear,
    )
    ended = asyncio.get_running_loop().create_task(replica.run())
    asking = asyncio.ensure_future(ask(played, replica))
    await asyncio.wait({ended, asking}, return_when="FIRST_COMPLETED")
    if asking.done():
        asking.result()
    await asyncio.wait(
        {ended, asyncio.ensure_future(replica.drain())}, return_when="FIRST_COMPLETED"
    )
    if ended.done():
        ended.result()  # raises what broke
    await _settled(replica, executor)
    await replica.stop()
    await ended
    _hold_to_account(played, replica, executor)


async def _ask(played: Played, replica: Replica) -> None:
    """Requests in bursts; some are cancelled, at a moment or at a token (which is how a stop string ends one)."""
    rng, loop = random.Random(f"ask {played.case.seed}"), asyncio.get_running_loop()
    at = 0.0

    def cancel(name: str) -> None:
        played.cancelled.add(name)
        replica.cancel(name)

    def when_told(name: str, count: int) -> None:
        if _told(played, name) >= count:
            cancel(name)
        elif not _is_over(played, name):
            loop.call_later(0.004, when_told, name, count)

    for request in requests(played.case):
        at += rng.choice((0.0, 0.01, 0.03, 0.2))
        await sleep_until(at)
        played.asked.append(request)
        replica.submit(request, every_token=rng.random() < 0.8)
        chance = rng.random()
        if chance < 0.15:
            loop.call_later(rng.uniform(0, 0.6), cancel, request.id)
        elif chance < 0.25:
            when_told(request.id, rng.randint(1, 5))


def _told(played: Played, name: str) -> int:
    return sum(output.num_tokens for output in played.told.get((name, 0), ()))


def _is_over(played: Played, name: str) -> bool:
    heard = played.told.get((name, 0))
    return bool(heard) and heard[-1].finish is not None


async def _settled(replica: Replica, executor: Any) -> None:
    """Copies that nobody waits for any more may still be under way."""
    while executor.transfers:
        await asyncio.sleep(0.1)


def _hold_to_account(played: Played, replica: Replica, executor: Any) -> None:
    ledger = replica.ledger
    assert ledger.free == ledger.total and not ledger.tables, "blocks are still held"
    assert not executor.yielded and not executor.passing, "a plan is neither ended nor aborted"
    assert not executor.memory.answers, "the executor keeps a job that has ended"
    replica.check()
    for request in played.asked:
        for answer in range(request.n):
            _hold_answer(played, request, answer, executor.memory)


def _hold_answer(played: Played, request: Request, answer: int, memory: Memory) -> None:
    heard = played.told.get((request.id, answer), [])
    assert heard and heard[-1].finish is not None, f"{request.id}.{answer} was never ended"
    want = Reference(request, answer).ids if request.kind == "generate" else []
    finish, got = heard[-1].finish, memory.texts.get((request.id, answer), [])
    told = sum(output.num_tokens for output in heard)
    if finish == "cancelled":
        assert request.id in played.cancelled, "nobody cancelled it"
        assert told <= len(got) <= len(want) and got == want[: len(got)], (
            f"{request.id}: the text changed"
        )
        return
    if finish == "error" and played.case.admit == "in-time":
        assert request.slo.ttft_s is not None and not told, f"{request.id} was not refused in time"
        assert heard[-1].error == "its first token would be late", heard[-1].error
        return
    is_stop = request.kind != "generate" or want[-1] in request.sampling.stop_ids
    assert finish == ("stop" if is_stop else "length"), (
        f"{request.id} ended by {finish}: {heard[-1].error}"
    )
    assert got == want, f"{request.id}.{answer}: the text changed"
    assert told == len(want), f"{request.id}.{answer}: {told} tokens told of {len(want)}"
    ids = [token for output in heard for token in output.ids]
    assert played.case.is_counted or not ids or ids == want, "other tokens told than drawn"
