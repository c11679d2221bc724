"""The replica that most likely still holds the prompt's prefix, unless it has too much to do.

Source: `cache_aware` of the SGLang router (sglang-router 0.3.2, Rust; the default policy there).

Idea: a replica that served a prompt with the same beginning has its KV in the prefix cache. The router does not ask,
it remembers: for each replica the blocks of the prompts it sent there. When queues get lopsided it forgets about
caches and balances.

    load(r) = outstanding(r)
    1. max load - min load > balance_abs and max load > balance_rel * min load    -> least load
    2. r with the longest known prefix; its tokens / prompt tokens > threshold     -> r
    3. otherwise                                                                  -> smallest memory
    and the prompt's blocks are remembered for whoever was chosen.

Parameters
    threshold    share of the prompt's tokens that must be known, default 0.5
    balance_abs  requests, default 32        balance_rel  ratio, default 1.1
    max_blocks   block hashes remembered for one replica, default 262,144; beyond it the longest unused leave,
                 leaves before the prefixes they continue

The defaults are the router library's; its command line uses 0.3, 64 and 1.5. With long prompts and few replicas 64
requests of imbalance are tens of seconds of queue; 4 and 1.2 are what such fleets want.

Where we differ: hashes of blocks, chained and so equal only for equal prefixes, stand for the text, and one index
(policy.block_index) for the trees. The bound holds at each insertion instead of every 30 s. Among equal replicas the
least loaded wins, then each in turn. A prompt without hashes shares nothing: it goes to the least loaded. What a dead
replica held is forgotten.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from penstock.core.types import BlockHash
from penstock.policy.block_index import BlockIndex
from penstock.policy.route import Decision, View, after


@dataclass(slots=True)
class Prefix:
    threshold: float = 0.5
    balance_abs: int = 32
    balance_rel: float = 1.1
    max_blocks: int = 1 << 18
    _known: BlockIndex = field(init=False, compare=False, repr=False)
    _last: str | None = field(init=False, compare=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        if self.balance_abs < 0 or self.balance_rel < 0:
            raise ValueError("balance_abs and balance_rel must not be negative")
        if self.max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, got {self.max_blocks}")
        self._known = BlockIndex(ttl_s=inf)

    def decide(self, view: View) -> Decision:
        self._known.keep_only({report.replica for report in view.reports if report.is_alive})
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        size = able[0].block_size
        hashes = view.request.prompt.blocks(size)
        outstanding = view.outstanding
        loads = {report.replica: outstanding.get(report.replica, 0) for report in able}
        chosen, why = self._choose(view.request.prompt.num_tokens, size, hashes, loads)
        self._known.guess(view.now, chosen, hashes, self.max_blocks)
        return Decision(chosen, why)

    def _choose(
        self, num_tokens: int, size: int, hashes: Sequence[BlockHash], loads: Mapping[str, int]
    ) -> tuple[str, str]:
        most, least = max(loads.values()), min(loads.values())
        if most - least > self.balance_abs and most > self.balance_rel * least:
            return self._smallest(loads, loads), f"loads {least} to {most}: balance"
        found = self._known.match(hashes)
        matched = {name: num * size for name, num in found.items() if name in loads}
        longest = max(matched.values(), default=0)
        if longest > self.threshold * num_tokens:
            best = [name for name, tokens in matched.items() if tokens == longest]
            return self._smallest(loads, best), f"{longest} of {num_tokens} tokens known"
        if not hashes:
            return self._smallest(loads, loads), "nothing to share"
        sizes = {name: self._known.size(name) for name in loads}
        least_known = min(sizes.values())
        smallest = [name for name, known in sizes.items() if known == least_known]
        return self._smallest(loads, smallest), "smallest memory"

    def _smallest(self, loads: Mapping[str, int], names: Collection[str]) -> str:
        """The least loaded of `names`, each in turn among equals."""
        least = min(loads[name] for name in names)
        self._last = after(self._last, sorted(name for name in names if loads[name] == least))
        return self._last
