"""Whoever was sent the longest beginning of this prompt, at random among them; memory without end.

Source: `prefixaware` of the vLLM production stack (Python router): a trie of prompts in pieces of 128 characters.

Idea: as SGLang's router (route.prefix), and simpler: no balance, no threshold, no eviction. A prompt goes to one of
those at the deepest match.

    match = 0 or below `min_tokens`   -> the lowest QPS (route.session)
    else                              -> at random among those with the longest match
    and the prompt is remembered for whoever was chosen

Parameters
    min_tokens   default 0        window_s   of the QPS, default 60
    max_blocks   remembered for one replica, default 2^22: the stack has no bound, a process must have one

Where we differ: hashes of blocks stand for pieces of text, and there is a bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from penstock.policy.block_index import BlockIndex
from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Rates, Turns


@dataclass(slots=True)
class DeepestPrefix:
    min_tokens: int = 0
    window_s: float = 60.0
    max_blocks: int = 1 << 22
    _known: BlockIndex = field(init=False, compare=False, repr=False)
    _rates: Rates = field(init=False, compare=False, repr=False)
    _turns: Turns = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.min_tokens < 0 or self.max_blocks < 1 or not self.window_s > 0:
            raise ValueError(
                "min_tokens must be at least 0, max_blocks at least 1, window_s positive"
            )
        self._known, self._rates, self._turns = BlockIndex(inf), Rates(self.window_s), Turns()

    def decide(self, view: View) -> Decision:
        self._known.keep_only({report.replica for report in view.reports if report.is_alive})
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        size = able[0].block_size
        hashes = view.request.prompt.blocks(size)
        names = sorted(report.replica for report in able)
        found = self._known.match(hashes)
        depths = [found.get(name, 0) for name in names]
        deepest = max(depths)
        if deepest and deepest * size >= self.min_tokens:
            best = [name for name, depth in zip(names, depths, strict=True) if depth == deepest]
            chosen, why = best[view.rng.randrange(len(best))], f"{deepest * size} tokens known"
        else:
            chosen = self._turns.least(names, self._rates.of(view.now, names))
            why = "nothing known: the fewest requests/s"
        self._rates.add(view.now, chosen)
        self._known.guess(view.now, chosen, hashes, self.max_blocks)
        return Decision(chosen, why)
