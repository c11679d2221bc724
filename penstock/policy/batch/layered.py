"""Prompts pass the model one group of layers a step, decodes pass all of it: layered prefill.

Source: "From Tokens to Layers" (scale-snu/layered-prefill, commit 427f441, a scheduler on nano-vllm).

Idea: a mixture of experts loads nearly all experts of a layer for every chunk of a prompt, so cutting a prompt into k
chunks loads the weights k times. Cut by layers instead: a step runs all decodes through all layers and whole prompts
through one group of layers, so each layer's experts are loaded once for a prompt and no decode waits longer than for
one group.

    1  decodes first, one token each; who does not fit makes room
    2  when no round is open, one begins: unfinished prompts, then waiting ones, up to `round_tokens` tokens in all
    3  the round of L tokens has N = min(max_groups, layers, ceil(L / group_tokens)) groups of near equal size, and each
       step takes the next; after the last the prompts yield their first tokens and the round is over
    4  no other prompt starts before that; one that begins like a prompt of the round waits for what that one computes

Parameters
    round_tokens   tokens of one round, default 8192; a longer prompt takes several rounds
    group_tokens   prompt tokens for which one group more is made, default 512
    max_groups     groups of one round at most, default 16
    max_jobs       jobs running at once, default 256

Where we differ: the published code has a table of sizes (512, 1024, 2048, 4096 tokens: 1, 2, 4, 8 groups, else 16),
which this rule gives at its borders. An executor without layer ranges gets whole prompts. Victims and admission are
answers of other policies. For dense models it loses: there nothing is saved, and attention comes in longer bursts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.types import Caps
from penstock.core.views import Batch, Chunk, JobView, Lane
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes
from penstock.policy.batch.vllm_v1 import Draft, decided, make_room


@dataclass(slots=True)
class Layered:
    round_tokens: int = 8192
    group_tokens: int = 512
    max_groups: int = 16
    max_jobs: int = 256
    _borders: tuple[int, ...] = field(init=False, default=(), repr=False)  # ends of the groups

    def __post_init__(self) -> None:
        for name in ("round_tokens", "group_tokens", "max_groups", "max_jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        running, fork = view.running, view.ledger.fork()
        is_closed = not view.waiting or len(running) >= self._most(view)
        decodes = all_decodes(running, fork) if is_closed else None
        if decodes and len(decodes) <= view.caps.max_batch_tokens:
            return Decision(Batch((Lane(decodes),)), stable_for=STABLE, outlasts=not view.waiting)
        draft = Draft(view.ledger.fork(), view.caps.max_batch_tokens)
        self._decode(view, draft)
        passing = [job for job in running if job.carried is not None and job.seq not in draft.gone]
        if passing:
            self._go_on(draft, passing)
        elif not draft.gone:
            self._begin(view, draft)
        return decided(draft, tuple(draft.planned.values()))

    def _most(self, view: View) -> int:
        return min(self.max_jobs, view.caps.max_jobs)

    def _decode(self, view: View, draft: Draft) -> None:
        for job in view.running:
            if is_decode(job) and job.seq not in draft.gone and draft.budget > 0:
                if draft.fork.reserve(job, job.known) or make_room(view, draft, job, job.known):
                    draft.planned[job.seq] = Chunk(job, 1)
                    draft.budget -= 1

    def _go_on(self, draft: Draft, passing: list[JobView]) -> None:
        """The next group of the round that is open."""
        for job in passing:
            assert job.carried is not None
            tokens, first = job.carried
            end = next(border for border in self._borders if border > first)
            draft.planned[job.seq] = Chunk(job, tokens, (first, end))

    def _begin(self, view: View, draft: Draft) -> None:
        left = min(self.round_tokens, draft.budget)
        started: list[tuple[JobView, int]] = []
        for job in view.running:
            tokens = min(job.todo, left)
            if tokens < 1 or is_decode(job):
                continue
            upto = job.computed + job.in_flight + tokens
            if draft.fork.reserve(job, upto) or make_room(view, draft, job, upto):
                started.append((job, tokens))
                left -= tokens
        if not draft.gone:
            started += self._admit(view, draft, left)
        started = [(job, tokens) for job, tokens in started if job.seq not in draft.gone]
        self._borders = self._groups(view.caps, sum(tokens for _, tokens in started))
        layers = None if len(self._borders) == 1 else (0, self._borders[0])
        for job, tokens in started:
            draft.planned[job.seq] = Chunk(job, tokens, layers)

    def _admit(self, view: View, draft: Draft, left: int) -> list[tuple[JobView, int]]:
        fork, found, is_refused = draft.fork, [], False
        here = view.ledger.fork()  # without what this round will only have when it is over
        for job in view.waiting:
            if left < 1 or len(view.running) + len(draft.admitted) >= self._most(view):
                break
            cached = fork.cached(job)
            if cached > here.cached(job):
                break
            tokens = min(job.known - cached, left)
            answer = view.admit(job, tokens, fork)
            if answer == "no":
                is_refused = True
                continue
            if answer == "later":
                draft.is_blocked = not is_refused
                break
            if not fork.reserve(job, cached + tokens):
                break
            draft.admitted.append(job)
            found.append((job, tokens))
            left -= tokens
        return found

    def _groups(self, caps: Caps, tokens: int) -> tuple[int, ...]:
        """The layers at which the groups of a round end: near equal sizes, the larger ones first."""
        num = min(self.max_groups, caps.num_layers, max(1, -(-tokens // self.group_tokens)))
        if not caps.has_layer_ranges:
            num = 1
        size, more = divmod(caps.num_layers, num)
        return tuple((group + 1) * size + min(group + 1, more) for group in range(num))


def is_decode(job: JobView) -> bool:
    return job.todo == 1 and job.carried is None and job.num_output > 0
