"""A diffusion language model served on one card in virtual time: the real replica and policy, modelled steps.

What fits is derived, not chosen: `Served.memory` says how many answers of the workload's mean `length` the card holds
beside activations and logits. That bounds the jobs of an engine with logits of whole sequences, and the blocks of one
with a row cap.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.errors import BadTrace
from penstock.core.events import Event, Finished, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Caps, Output, Request, RequestId, Sampling
from penstock.cost.diffusion import CanvasCost, CanvasMemory, sized_for
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy.admit.full_fit import FullFit
from penstock.policy.batch.diffusion import Diffusion
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs
from penstock.sim.canvases import ModelledCanvases
from penstock.sim.loop import run

BLOCK = 16
Asked = Sequence[tuple[float, int]]  # instants and prompt tokens


@dataclass(frozen=True, kw_only=True)
class Served:
    """One engine. `length`: positions that it is sized for. `masks`: of every answer, all of which are written."""

    memory: CanvasMemory
    length: int
    is_lockstep: bool
    masks: int = 256


@dataclass
class Watch:
    """Hears of steps and of answers that end."""

    most_running: int = 0
    last_start_at: float = 0.0
    instants: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    told: list[tuple[float, int]] = field(default_factory=list)  # instants and tokens of blocks

    def emit(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.most_running = max(self.most_running, event.num_running)
        elif isinstance(event, Finished):
            assert event.reason in ("length", "stop"), f"{event.request} ended by {event.reason}"
            assert event.admitted_at is not None, f"{event.request} never ran"
            self.last_start_at = max(self.last_start_at, event.admitted_at)
            self.instants.append(event.at)
            self.waits_s.append(event.at - event.arrived_at)
            self.names.append(event.request)

    def hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        at = asyncio.get_running_loop().time()
        self.told += [(at, output.num_tokens) for _, output in outputs]

    def tokens_per_s(self) -> float:
        """While all seats are taken: told after the first answer ended and until the last one began."""
        begin, end = min(self.instants), self.last_start_at
        if end <= begin:
            raise BadTrace(
                f"{len(self.instants)} answers, {self.most_running} at once: too few to tell what is served a second",
                hint="offer more requests",
            )
        return sum(tokens for at, tokens in self.told if begin < at <= end) / (end - begin)


def drawn_prompts(num: int, seed: int, median: float, spread: float) -> list[int]:
    """Lognormal, between 16 and 2048 tokens."""
    draw = stream(seed, "canvas prompts")
    return [min(2048, max(16, round(median * draw.lognormvariate(0, spread)))) for _ in range(num)]


def poisson(num: int, seed: int, rate_per_s: float | None) -> list[float]:
    """Instants; None: all at once."""
    if rate_per_s is None:
        return [0.0] * num
    draw, at, found = stream(seed, "canvas arrivals"), 0.0, []
    for _ in range(num):
        at += draw.expovariate(rate_per_s)
        found.append(at)
    return found


def serve(engine: Served, asked: Asked) -> dict[str, object]:
    """Figures by name, times in seconds. `batch`: what memory admits, `most_running`: what was reached."""
    length, watch = engine.length, Watch()
    longest = max(prompt for _, prompt in asked) + engine.masks
    batch = engine.memory.batch(length)
    if not batch:
        return {"batch": 0, "finished": "nothing"}
    if engine.memory.logits.row_cap is None:
        # Its logits bound the jobs: so many are held to fit, whatever their lengths.
        policy = Diffusion(
            max_jobs=batch, max_tokens=batch * longest, is_lockstep=engine.is_lockstep
        )
        num_blocks = batch * -(-longest // BLOCK)
    else:
        memory = sized_for(engine.memory, length)
        policy = Diffusion(max_tokens=memory.max_tokens, is_lockstep=engine.is_lockstep)
        least = -(-memory.rule.num_kept(longest) // BLOCK)
        num_blocks = max(least, memory.num_blocks(length, BLOCK))
    run(_played(engine, asked, policy, num_blocks, watch))
    waits = sorted(watch.waits_s)
    told = "\n".join(sorted(watch.names)).encode()
    is_full = all(at == asked[0][0] for at, _ in asked)
    return {
        "batch": batch,
        "most_running": watch.most_running,
        "tokens_per_s": watch.tokens_per_s() if is_full else None,
        "e2e_p50_s": waits[len(waits) // 2],
        "e2e_p99_s": waits[len(waits) * 99 // 100],
        "finished": hashlib.blake2b(told, digest_size=8).hexdigest(),
    }


async def _played(
    engine: Served, asked: Asked, policy: Diffusion, num_blocks: int, watch: Watch
) -> None:
    memory = engine.memory
    whole = memory.logits.row_cap is None
    price = CanvasCost(memory.shape, memory.card, has_whole_logits=whole)
    caps = Caps(
        num_layers=memory.shape.layers, max_context=memory.shape.max_context, canvas=memory.rule
    )
    nothing = Fitted({"step": 1.0}, name="", digest="", num_layers=1)
    replica = Replica(
        ReplicaConfig(num_blocks=num_blocks, block_size=BLOCK, has_prefix_cache=False),
        ModelledCanvases(price, caps=caps),
        ReplicaPolicies(
            order=Fcfs(), admit=FullFit(), batch=policy, evict=RecomputeLast(), blocks=Lru()
        ),
        Predictors(cost=StepPredictor(nothing, 1), lengths=RecentLengths()),
        log=watch,
        on_outputs=watch.hear,
    )
    loop = asyncio.get_running_loop()
    for place, (at, prompt) in enumerate(asked):
        if at > loop.time():
            await asyncio.sleep(at - loop.time())
        request = Request(
            id=RequestId(f"{place}"),
            model="model",
            prompt=TracedPrompt(prompt),
            sampling=Sampling(max_tokens=engine.masks),
        )
        replica.submit(request)
    await replica.drain()
    await replica.stop()
