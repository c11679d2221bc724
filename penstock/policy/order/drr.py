"""Fair among tenants in rounds: deficit round robin, in tokens.

Source: M. Shreedhar and G. Varghese, "Efficient Fair Queueing using Deficit Round Robin", SIGCOMM 1995; with debts for
what is known only afterwards, as VTC's authors adapt it (Y. Sheng et al., OSDI 2024).

Idea: backlogged tenants take turns in the order in which they became so. Each turn is worth a quantum of weighted
tokens, what it does not use is kept for the next one, and a job is served when its tenant's turns cover its prompt.
Tokens of answers are charged as they come, so a tenant may owe turns.

    used(t)         weighted tokens charged to t
    round of a job  the first r with  r * quantum * share(t) >= used(t) + prompts of t's jobs up to this one
    rank by         (round, place of t in the turn, place of the job)
    t returns       used(t) := max(used(t), (round - 1) * quantum * share(t)), and t goes to the end of the turn:
                    unused turns are lost, debts are kept

Two tenants that stay backlogged are served alike up to 2 * (quantum + prompt_weight * longest prompt + output_weight *
M) weighted tokens, M being what the running jobs can hold. With a small quantum this is close to vtc, with a large one
a tenant gets longer runs, and so more of its own prefixes in a row.

Parameters
    quantum         weighted tokens a turn, default 512
    prompt_weight   of a prompt token, default 1
    output_weight   of an answer's token, default 2
    shares          a tenant's part relative to others', by name, default 1 each

Where we differ: the first paper's packets tell their length; of ours only the prompt is known, and the rest becomes
debt. VTC's authors serve while the deficit is positive and not when it covers the prompt. A job's prompt is charged
once, though a preempted one computes it again. Batch policies that pass over the head of the line may take others."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

import numpy as np

from penstock.core.events import Event, Finished
from penstock.core.moving import Departed
from penstock.policy.order import STABLE, Decision, View, in_order
from penstock.policy.order.tenants import Books, check_weights

FORGOTTEN_AT = 256


@dataclass(slots=True)
class Turn:
    """Of one tenant. `place`: in the turn, by when it last became backlogged."""

    used: float = 0.0
    place: int = 0


@dataclass(slots=True)
class Drr:
    quantum: float = 512.0
    prompt_weight: float = 1.0
    output_weight: float = 2.0
    shares: dict[str, float] = field(default_factory=dict)
    _turns: dict[str, Turn] = field(init=False, default_factory=dict, repr=False)
    _books: Books = field(init=False, repr=False, compare=False)
    _round: int = field(init=False, default=0, repr=False)
    _num_returned: int = field(init=False, default=0, repr=False)
    _most: int = field(init=False, default=FORGOTTEN_AT, repr=False)

    def __post_init__(self) -> None:
        check_weights(self.prompt_weight, self.output_weight, self.shares)
        if not self.quantum > 0:
            raise ValueError(f"quantum must be positive, got {self.quantum}")
        weights = self.prompt_weight, self.output_weight
        self._books = Books(self._return, self._admit, self._charge, *weights)

    def observe(self, event: Event) -> None:
        self._books.hear(event)
        if len(self._turns) > self._most and isinstance(event, Finished | Departed):
            self._forget()

    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        lines = self._books.lines(view)
        if len(lines.tenants) < 2:
            return Decision(waiting, stable_for=STABLE)
        turns = [self._turns.get(tenant, Turn()) for tenant in lines.tenants]
        quanta = np.array([self._quantum(tenant) for tenant in lines.tenants])
        used = np.array([turn.used for turn in turns])
        places = np.array([turn.place for turn in turns])
        owner = lines.owner
        rounds = np.ceil((used[owner] + lines.ahead + lines.charge) / quanta[owner])
        ranks = np.lexsort((places[owner], rounds))
        why = f"the turn of {lines.tenants[owner[ranks[0]]]}"
        return Decision(in_order(waiting, ranks), why)

    def _quantum(self, tenant: str) -> float:
        return self.quantum * self.shares.get(tenant, 1.0)

    def _charge(self, tenant: str, tokens: float) -> None:
        self._turns.setdefault(tenant, Turn()).used += tokens

    def _admit(self, tenant: str, tokens: float) -> None:
        """Turns go round as jobs are admitted, and not as answers run up debts."""
        self._charge(tenant, tokens)
        reached = ceil(self._turns[tenant].used / self._quantum(tenant))
        self._round = max(self._round, reached)

    def _return(self, tenant: str) -> None:
        turn = self._turns.setdefault(tenant, Turn())
        turn.used = max(turn.used, (self._round - 1) * self._quantum(tenant))
        self._num_returned += 1
        turn.place = self._num_returned

    def _forget(self) -> None:
        """Turns that `_return` would make again are let go."""
        kept = self._books.tenants()
        self._turns = {
            tenant: turn
            for tenant, turn in self._turns.items()
            if tenant in kept or turn.used > (self._round - 1) * self._quantum(tenant)
        }
        self._most = max(FORGOTTEN_AT, 2 * len(self._turns))
