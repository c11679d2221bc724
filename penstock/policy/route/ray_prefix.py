"""Two random choices among those that know the prompt's beginning.

Source: Ray Serve LLM, PrefixCacheAffinityRouter over its power-of-two router.

Idea: the prefix only narrows the choice, the shorter of two queues makes it.

    1. longest queue - shortest > imbalanced_threshold      -> p2c among all
    2. matched share of the prompt < match_rate              -> p2c among those that know least
    3. otherwise                                             -> p2c among those with the longest match
    the prompt is remembered for whoever was chosen; the rest are the alternates, those of the group first

Parameters
    imbalanced_threshold   requests, default None (infinite, as there)
    match_rate   default 0.1        max_blocks   remembered for one replica, default 2^18

Where we differ: queues are the fleet's own counts and not asked for; blocks stand for characters; memory is bounded
always, there only if asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import inf

from penstock.core.views import Rng
from penstock.policy.block_index import BlockIndex
from penstock.policy.route import Decision, View


@dataclass(slots=True)
class RayPrefix:
    imbalanced_threshold: int | None = None
    match_rate: float = 0.1
    max_blocks: int = 1 << 18
    _known: BlockIndex = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.match_rate <= 1 or self.max_blocks < 1:
            raise ValueError("match_rate must be in [0, 1] and max_blocks at least 1")
        self._known = BlockIndex(inf)

    def decide(self, view: View) -> Decision:
        self._known.keep_only({report.replica for report in view.reports if report.is_alive})
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        size = able[0].block_size
        hashes = view.request.prompt.blocks(size)
        loads = {report.replica: view.outstanding.get(report.replica, 0) for report in able}
        group, why = self._group(view, loads, len(hashes))
        chosen = better_of_two(group, loads, view.rng)
        self._known.guess(view.now, chosen, hashes, self.max_blocks)
        inside = set(group)
        others = [name for name in sorted(loads) if name not in inside]
        rest = [*sorted(group, key=loads.__getitem__), *sorted(others, key=loads.__getitem__)]
        rest.remove(chosen)
        return Decision(chosen, why, alternates=tuple(rest))

    def _group(
        self, view: View, loads: Mapping[str, int], num_blocks: int
    ) -> tuple[list[str], str]:
        """Those among whom two are drawn, by name."""
        names = sorted(loads)
        bound = self.imbalanced_threshold
        if bound is not None and max(loads.values()) - min(loads.values()) > bound:
            return names, "the queues differ: two of all"
        found = self._known.match(view.request.prompt.blocks(view.reports[0].block_size))
        depths = list(map(found.get, names, repeat(0)))
        longest = max(depths)
        if not longest or longest < self.match_rate * num_blocks:
            sizes = {name: self._known.size(name) for name in names}
            least = min(sizes.values())
            return [name for name in names if sizes[name] == least], "two of those that know least"
        group = [name for name, depth in zip(names, depths, strict=True) if depth == longest]
        return group, f"two of those that know {longest} blocks"


def better_of_two(names: Sequence[str], loads: Mapping[str, int], rng: Rng) -> str:
    """The less loaded of two drawn at random, the first wins a tie."""
    if len(names) == 1:
        return names[0]
    first = rng.randrange(len(names))
    second = rng.randrange(len(names) - 1)
    second += second >= first
    one, other = names[first], names[second]
    return one if loads[one] <= loads[other] else other
