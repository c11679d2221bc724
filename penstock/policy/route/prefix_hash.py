"""Prompts that begin with the same tokens go to the same replica, as long as it is not far above the mean.

Source: `prefix_hash` of the SGLang router (sglang-router 0.3.2); the bound is that of consistent hashing with bounded
loads (Mirrokni, Thorup and Zadimoghaddam, 2018).

Idea: no memory of prompts at all. The first `prefix_tokens` tokens stand on a ring of replicas (route.ring), and
whoever comes next on it takes the request, unless it has more than its share.

    may take    outstanding <= load_factor * (all outstanding + 1) / replicas
    chosen      the owner of the prefix if it may; else the least loaded that may; else the owner

Parameters
    prefix_tokens   default 256        load_factor   default 1.25

Where we differ: the hash of the block that ends the prefix stands for its tokens, so prefixes end at a block's border;
one that is shorter than a block, or has no hashes, stands by its request's id.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns
from penstock.policy.route.ring import Ring, place_of


@dataclass(slots=True)
class PrefixHash:
    prefix_tokens: int = 256
    load_factor: float = 1.25
    _ring: Ring = field(init=False, compare=False, repr=False)
    _turns: Turns = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.prefix_tokens < 1:
            raise ValueError(f"prefix_tokens must be at least 1, got {self.prefix_tokens}")
        if self.load_factor < 1:
            raise ValueError(f"load_factor must be at least 1, got {self.load_factor}")
        self._ring, self._turns = Ring(), Turns()

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        names = view.columns().names
        self._ring.keep(names)
        size = able[0].block_size
        hashes = view.request.prompt.blocks(size)
        key = view.request.id.encode()
        if hashes:
            key = hashes[min(len(hashes), max(1, self.prefix_tokens // size)) - 1]
        owner = self._ring.owner(place_of(key))
        loads = {name: view.outstanding.get(name, 0) for name in names}
        bound = self.load_factor * (sum(loads.values()) + 1) / len(names)
        if loads[owner] <= bound:
            return Decision(owner, f"owns the prefix; {loads[owner]} outstanding")
        may = [name for name in names if loads[name] <= bound]
        if not may:
            return Decision(owner, "owns the prefix; nobody is below the bound")
        chosen = self._turns.least(may, [loads[name] for name in may])
        return Decision(chosen, f"{owner} is above {bound:.1f} outstanding")
