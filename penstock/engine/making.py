"""The pieces of one replica (engine.parts), made for its executor and its memory."""

from __future__ import annotations

from itertools import count
from typing import cast

from penstock.core.events import Completed, Stepped
from penstock.core.ports import AdaptingExecutor, Executor
from penstock.core.rng import stream
from penstock.engine.briefing import Briefing
from penstock.engine.bringing import Bringing
from penstock.engine.ledger import BlockLedger
from penstock.engine.parts import Ears, Parts
from penstock.engine.residents import Residents
from penstock.engine.roster import Roster
from penstock.engine.swap import Swap, SwapConfig
from penstock.engine.tiers import Tiers
from penstock.engine.turn import Council, Predictors


def make_parts(
    name: str,
    ledger: BlockLedger,
    executor: Executor,
    ears: Ears,
    *,
    swap: SwapConfig,
    max_context: int,
    interrupts: bool,
) -> Parts:
    """`interrupts`: plans may be suspended."""
    caps, emit = executor.caps, ears.emitter()
    residents = None
    if caps.max_adapters:
        residents = Residents(caps.max_adapters, cast(AdaptingExecutor, executor).load_adapter)
    roster = Roster(
        name, ledger, emit, max_context=max_context, canvas=caps.canvas, residents=residents
    )
    # Beside a plan that is suspended or in another lane nobody may share what it has not written yet.
    names_ahead = ledger.names_ahead and caps.max_lanes == 1 and not interrupts
    ledger.names_ahead = names_ahead
    briefing = Briefing(ledger, caps.num_layers, names_ahead=names_ahead)
    numbers, swapping = count(), None
    if swap.host_blocks:
        assert caps.host_blocks >= swap.host_blocks, "no such host memory"
        swapping = Swap(swap, ledger, caps.link, numbers)
    return Parts(
        name=name,
        ledger=ledger,
        roster=roster,
        briefing=briefing,
        executor=executor,
        swap=swapping,
        emit=emit,
        emit_step=ears.emitter(Stepped, Completed),
        names_ahead=names_ahead,
        numbers=numbers,
    )


def bringing_of(parts: Parts, council: Council, predictors: Predictors, *, seed: int) -> Bringing:
    """Who says what is brought from elsewhere."""
    rng = stream(seed, parts.name, "fetch")
    return Bringing(parts, council.policies.fetch, predictors.cost, rng)


def add_tiers(parts: Parts, council: Council, bringing: Bringing) -> Tiers | None:
    """Memory for cached blocks behind the device's, where the executor has some."""
    if parts.executor.caps.tier_blocks:
        parts.tiers = Tiers(parts, bringing, numbers=parts.numbers, ask_again=council.ask_again)
    return parts.tiers
