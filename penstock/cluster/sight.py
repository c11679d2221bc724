"""What a fleet's policies see beside plain reports, kept up to date by the calls that the router gets anyway.

    dispatches   what was sent and no report holds yet               always, unless told not to (`counts`)
    blocks       what replicas hold by hash                          where the policy `needs_blocks`, or peers fetch
    queued       what waits at a replica as the fleet sees it        where the policy `needs_queued`
    token_s      what a prompt token takes, by the predictions made for what was sent lately
    ages         seconds since each report, to look ahead from it    where `foresees`

All of it is a function of the router's inputs, which are in its log, so `replay` makes it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from penstock.cluster.dispatches import Dispatches
from penstock.core.messages import BlockNews
from penstock.core.types import Report, Request
from penstock.core.views import PhaseCost
from penstock.engine.peers import PeersConfig
from penstock.policy.block_index import TTL_S
from penstock.policy.loads import Sent
from penstock.policy.route import Queued
from penstock.policy.tier_index import TierIndex

USUAL_PROMPT = 1024  # tokens, until some were sent
MEMORY = 0.98  # of the mean of what a token takes


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """`counts`: loads are those of the reports and what was sent since. `foresees`: less what was done since.

    `block_ttl_s`: how long a prompt that was sent somewhere is taken to be there while nobody says so.
    """

    counts: bool = True
    foresees: bool = False
    block_ttl_s: float = TTL_S

    def __post_init__(self) -> None:
        if not self.block_ttl_s > 0:
            raise ValueError(
                f"block_ttl_s must be a positive number of seconds, got {self.block_ttl_s}"
            )


def needs(policies: Iterable[object], what: str) -> bool:
    """Whether one of them says so."""
    return any(getattr(each, f"needs_{what}", False) for each in policies)


class Sight:
    """One router's. Its `policies` say by their class what they need; `cost` None: nobody can predict."""

    def __init__(
        self,
        policies: Sequence[object],
        config: DispatchConfig = DispatchConfig(),
        cost: PhaseCost | None = None,
        *,
        peers: PeersConfig | None = None,
        has_tiers: bool = False,
    ) -> None:
        """`peers`: replicas fetch from each other; `has_tiers`: they tell of host memory and disk too."""
        self._config = config
        self.peers = peers
        self.cost = cost  # whoever of the fleet's policies needs it
        self.blocks: TierIndex | None = None
        if peers is not None or needs(policies, "blocks"):
            self.blocks = TierIndex(config.block_ttl_s, has_tiers=has_tiers)
        self.dispatches = Dispatches(counts=config.counts, keeps_queue=needs(policies, "queued"))
        self.token_s = (
            0.0 if self.cost is None else self.cost.prefill_s(USUAL_PROMPT) / USUAL_PROMPT
        )
        self._seconds, self._tokens = self.token_s * USUAL_PROMPT, float(USUAL_PROMPT)
        self._heard_at: dict[str, float] = {}

    @property
    def sent(self) -> Mapping[str, Sent]:
        return self.dispatches.sent

    @property
    def queued(self) -> Mapping[str, Mapping[str, Queued]]:
        return self.dispatches.queued

    def ages(self, now: float) -> Mapping[str, float]:
        if not self._config.foresees:
            return {}
        return {name: now - at for name, at in self._heard_at.items()}

    def hear(self, now: float, report: Report) -> None:
        self.dispatches.hear(report)
        self._heard_at[report.replica] = now
        if self.blocks is not None:
            if report.is_alive:
                self.blocks.expire(now, report.replica)
            else:
                self.blocks.forget(report.replica)

    def forget(self, replica: str) -> None:
        """It left the fleet."""
        self._heard_at.pop(replica, None)
        self.dispatches.forget(replica)
        if self.blocks is not None:
            self.blocks.forget(replica)

    def tell(self, replica: str, news: BlockNews) -> None:
        if self.blocks is not None:
            self.blocks.tell(replica, news)

    def held(self, request: Request, block_size: int) -> Mapping[str, int]:
        """Blocks of a prompt's beginning that each replica has in memory which peers can read, or is about to have."""
        hashes = request.prompt.blocks(block_size)
        return self.blocks.match_near(hashes) if self.blocks is not None and hashes else {}

    def send(self, now: float, request: Request, report: Report, hit: int) -> None:
        """A request goes to the replica of `report`, which seems to hold `hit` tokens of its prompt."""
        self.dispatches.send(now, request, report, hit)
        new = request.prompt.num_tokens - hit
        if self.cost is not None:
            self._seconds = MEMORY * self._seconds + self.cost.prefill_s(new, hit)
            self._tokens = MEMORY * self._tokens + new
            self.token_s = self._seconds / self._tokens
        if self.blocks is not None:
            hashes = request.prompt.blocks(report.block_size)
            self.blocks.guess(now, report.replica, hashes, report.total_blocks or None)
