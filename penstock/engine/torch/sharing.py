"""Context that is shared between replicas of one machine: what an executor has for it, and where it cannot be had."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from penstock.core.errors import BadConfig
from penstock.engine.torch.borrower import Borrower
from penstock.engine.torch.lender import Lender
from penstock.engine.torch.ports import Movable
from penstock.engine.torch.shared import KvTransport, region_of
from penstock.net.kv_shared import SharedTransport

if TYPE_CHECKING:
    from penstock.engine.torch.attention import KvLayout
    from penstock.engine.torch.build import EngineConfig
    from penstock.engine.torch.decoder import Decoder

HINT = "leave the fleet's lending out"


class Sharing(NamedTuple):
    """A core.sharing.ContextSharing."""

    lender: Lender
    borrower: Borrower

    def lend(self, loan: int, blocks: Sequence[int]) -> str:
        return self.lender.lend(loan, blocks)

    def take_back(self, loan: int, num_blocks: int | None = None) -> None:
        self.lender.give_back(loan, num_blocks)

    def borrow(self, loan: int, first: int, count: int, address: str) -> None:
        self.borrower.borrow(loan, first, count, address)

    def spill(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        self.borrower.spill(runs, _hopping(tell))

    def relocate(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        self.borrower.relocate(runs, _hopping(tell))

    def give_back(self, loan: int) -> None:
        self.borrower.give_back(loan)

    def close(self) -> None:
        self.lender.close()


def _hopping(tell: Callable[[str | None], None]) -> Callable[[str | None], None]:
    """The same, from another thread."""
    loop = asyncio.get_running_loop()

    def hop(error: str | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(tell, error)

    return hop


def open_sharing(
    decoder: Decoder, transport: KvTransport | None, layout: KvLayout, config: EngineConfig
) -> Sharing:
    """Raises BadConfig where context cannot be shared."""
    backend = decoder.attention
    masks = [getattr(layer.attention, "mask", None) for layer in decoder.layers]
    if any([mask is not None and mask.window is not None for mask in masks]):
        raise BadConfig("a model with sliding windows cannot keep context elsewhere", hint=HINT)
    if config.speculation is not None or config.host_blocks or config.lanes > 1:
        raise BadConfig(
            "lending goes with neither speculation, host memory nor several lanes", hint=HINT
        )
    if not isinstance(transport, SharedTransport) or not isinstance(backend, Movable):
        raise BadConfig(
            "lending needs replicas on CPUs of one Linux machine, and net.kv.kind shared or auto",
            hint=HINT,
        )
    lender = Lender(
        backend,
        region_of(backend.arena),
        kv_heads=layout.num_kv_heads,
        block_size=layout.block_size,
        threads=config.threads,
        latent=layout.latent,
        home=transport.card.address,
    )
    borrower = Borrower(
        backend,
        region_of(backend.arena),
        num_blocks=backend.arena.shape[1],
        block_size=layout.block_size,
        home=transport.card.address,
    )
    return Sharing(lender, borrower)
