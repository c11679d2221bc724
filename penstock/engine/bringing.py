"""Whether cached blocks that lie elsewhere are brought for a job that waits: the policy of kind `fetch`, asked.

It is told what such copies took lately, and what the cost model says of computing. What a copy takes is a start and so
much a block, both from the copies there were, older ones counting less; while all of them were of one size it is the
mean of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import UNSET, Struct, UnsetType

from penstock.core.types import BroughtReport, Job
from penstock.core.views import Chunk, Cost, Rng
from penstock.engine.parts import Parts
from penstock.engine.run import Run
from penstock.policy import fetch

NEAR = 4  # waiting jobs for which something is brought
MEMORY = 0.9  # of what copies took
MEMORY_OF_MEAN = 0.8  # the same where a mean is kept


class CopyTime(Struct, gc=False):
    """Weighted least squares of seconds over blocks, with no negative coefficient."""

    weight: float = 0.0
    blocks: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0

    def learn(self, blocks: int, seconds: float) -> None:
        self.weight = MEMORY * self.weight + 1
        self.blocks = MEMORY * self.blocks + blocks
        self.squares = MEMORY * self.squares + blocks * blocks
        self.seconds = MEMORY * self.seconds + seconds
        self.products = MEMORY * self.products + blocks * seconds

    def of(self, blocks: int) -> float | None:
        """None: nothing was copied yet."""
        if not self.weight:
            return None
        spread = self.weight * self.squares - self.blocks * self.blocks
        if spread > 1e-3 * self.weight * self.squares:
            slope = (self.weight * self.products - self.blocks * self.seconds) / spread
            slope = max(0.0, slope)
            start = (self.seconds - slope * self.blocks) / self.weight
            if start > 0:
                return start + slope * blocks
        return blocks * self.seconds / self.blocks


@dataclass(slots=True)
class Brought:
    """What has come from one place since the replica began, and what could not."""

    num_blocks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    num_failed: int = 0
    num_lost: int = 0  # that were to be saved there


@dataclass(slots=True)
class Bringing:
    """One per replica; `brought`: from each place; `block_s`: what a block from there took lately, in the mean."""

    parts: Parts
    policy: fetch.Policy
    cost: Cost
    rng: Rng
    brought: dict[fetch.Place, Brought] = field(default_factory=dict)
    block_s: dict[fetch.Place, float] = field(default_factory=dict)

    def fits(self, job: Job, here: Mapping[Run, int]) -> bool:
        """Whether the whole prompt of one that waits would fit: what is brought for others is gone when they run.

        `here`: what it finds on the device. What nobody holds of that is among the free blocks.
        """
        parts = self.parts
        held = sum([size for run, size in here.items() if run.refs])
        need = -(-job.known // parts.ledger.block_size) - held
        return need + len(parts.roster.running) <= parts.ledger.free

    def wants(
        self, now: float, place: fetch.Place, job: Job, *, have: int, more: int,
        copy_s: float | None,
    ) -> bool:  # fmt: skip
        """Whether `more` blocks behind the `have` first ones are to be brought."""
        size, predict = self.parts.ledger.block_size, self.cost.predict
        cached, tokens = have * size, more * size
        before_s = predict((Chunk(job, cached),)) if cached else 0.0
        view = fetch.View(
            now=now,
            rng=self.rng,
            place=place,
            tokens=tokens,
            cached=cached,
            copy_s=copy_s,
            compute_s=max(0.0, predict((Chunk(job, cached + tokens),)) - before_s),
        )
        return self.policy.decide(view).fetches

    def learn(
        self, place: fetch.Place, num_blocks: int, num_bytes: int, seconds: float, failed: int = 0
    ) -> None:
        """A copy from there has ended; `num_blocks` are what came of it."""
        block_s = seconds / (num_blocks + failed)
        self.block_s[place] = blended(self.block_s.get(place), block_s)
        self.count(place, num_blocks, num_bytes, seconds, failed)

    def count(
        self, place: fetch.Place, num_blocks: int, num_bytes: int, seconds: float, failed: int = 0
    ) -> None:
        found = self.brought.setdefault(place, Brought())
        found.num_blocks += num_blocks
        found.num_bytes += num_bytes
        found.seconds += seconds
        found.num_failed += failed

    def lose(self, place: fetch.Place, num_blocks: int) -> bool:
        """So many were to be saved there and are gone; whether these are the first."""
        found = self.brought.setdefault(place, Brought())
        found.num_lost += num_blocks
        return found.num_lost == num_blocks

    @property
    def told(self) -> tuple[BroughtReport, ...] | UnsetType:
        """For reports."""
        if not self.brought:
            return UNSET
        return tuple(
            [
                BroughtReport(
                    place,
                    each.num_blocks,
                    each.num_bytes,
                    each.seconds,
                    each.num_failed,
                    each.num_lost,
                )  # fmt: skip
                for place, each in sorted(self.brought.items())
            ]
        )


def blended(known: float | None, fresh: float) -> float:
    """A mean in which older ones count less."""
    return fresh if known is None else MEMORY_OF_MEAN * known + (1 - MEMORY_OF_MEAN) * fresh
