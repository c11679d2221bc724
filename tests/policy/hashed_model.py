"""A language model of hashes on paged memory: every token is a function of all that its attention reads from blocks.

Per layer l and position p, with 64-bit words instead of vectors:

    kept(l, p)  = a hash of what enters the layer there, and of l and p: written to the job's block
    seen(l, p)  = sum over q <= p of kept(l, q) * (2 q + 1), read through the block table
    onward      = a hash of what entered and of what was seen
    token       = the hash that leaves the last layer, modulo the vocabulary; with a temperature its answer counts too

So a block that is shared wrongly, given away too early, named before it was written or lost on its way to host memory
changes every token behind it. `Reference` writes the same text without blocks, one position at a time.

`Hashed` adds this memory to a modelled executor: times are its own. It uses all freedom that the port leaves: some
layers of a plan are passed when it is launched, some when it yields, the rest when it ends; copies are made when they
end. Blocks hold garbage until they are written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.core.plans import Counted, Done, Moved, Plan, Sampled, Transfer, Work, Yielded
from penstock.core.ports import Completion
from penstock.core.prompt import TokenPrompt
from penstock.core.types import BlockHash, PlanId, Request
from penstock.sim.executor import ModelledExecutor
from penstock.sim.lanes import LanedExecutor

LAYERS, VOCAB = 3, 50
Words = NDArray[np.uint64]
MASK = (1 << 64) - 1
A, B, C = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
A64, B64, C64 = np.uint64(A), np.uint64(B), np.uint64(C)
S31, S29, S32 = np.uint64(31), np.uint64(29), np.uint64(32)


def token_of(word: int, request: Request, answer: int) -> int:
    salt = answer + 1 if request.sampling.temperature > 0 else 0
    word = (word ^ (salt * B)) * A & MASK
    return (word ^ word >> 32) % VOCAB


class Reference:
    """The text of one answer, on no memory."""

    def __init__(self, request: Request, answer: int) -> None:
        assert isinstance(request.prompt, TokenPrompt)
        self._seen, self._at = [0] * LAYERS, 0
        self.ids: list[int] = []
        most = request.sampling.max_tokens
        for token in request.prompt.ids:
            word = self._advance(token)
        while not self.is_stop(request) and len(self.ids) < most:
            self.ids.append(token_of(word, request, answer))
            word = self._advance(self.ids[-1])

    def is_stop(self, request: Request) -> bool:
        return bool(self.ids) and self.ids[-1] in request.sampling.stop_ids

    def _advance(self, token: int) -> int:
        word, at = token * A & MASK, self._at
        for layer in range(LAYERS):
            kept = word * A + at * B + layer * C & MASK
            kept ^= kept >> 31
            self._seen[layer] = self._seen[layer] + kept * (2 * at + 1) & MASK
            word = (word ^ self._seen[layer]) * C & MASK
            word = (word ^ word >> 29) * A & MASK
            word ^= word >> 32
        self._at += 1
        return word


@dataclass
class Answer:
    """What the executor knows of a job. `unplaced`: kept words of positions whose block it was not told yet."""

    request: Request
    answer: int
    tokens: list[int]
    hashes: list[BlockHash]
    blocks: list[int] = field(default_factory=list)
    unplaced: dict[int, list[int]] = field(default_factory=dict)
    carried: tuple[int, int, int, Words] | None = None  # start, tokens, layer, words
    guesses: list[int] = field(default_factory=list)  # behind its last token, in the plan that runs

    @property
    def prompt(self) -> TokenPrompt:
        assert isinstance(self.request.prompt, TokenPrompt)
        return self.request.prompt


@dataclass
class Passing:
    """A plan on its way through the layers; `words` enter `layer` next."""

    plan: Plan
    work: tuple[Work, ...]
    words: list[Words] = field(default_factory=list)
    layer: int = 0


class Memory:
    """The arena, the host's, and the jobs. `texts`: tokens drawn, by request and answer."""

    def __init__(self, num_blocks: int, size: int, host_blocks: int, seed: int) -> None:
        garbage = np.random.default_rng(seed)
        shape = (LAYERS, num_blocks, size)
        self.arena: Words = garbage.integers(0, MASK, shape, np.uint64, endpoint=True)
        self.host: Words = np.zeros((LAYERS, host_blocks, size), np.uint64)
        self.size = size
        self.answers: dict[int, Answer] = {}
        self.texts: dict[tuple[str, int], list[int]] = {}

    def open(self, plan: Plan) -> None:
        for seq in plan.closed:
            del self.answers[seq]
        for seq, request, answer, _ in plan.opened:
            prompt = request.prompt
            assert isinstance(prompt, TokenPrompt) and seq not in self.answers
            hashes = list(prompt.blocks(self.size))
            self.answers[seq] = Answer(request, answer, list(prompt.ids), hashes)
            self.texts[request.id, answer] = []

    def place(self, work: Work) -> None:
        """Note the blocks a planned job got, and write what waited for them."""
        job = self.answers[work.seq]
        if work.is_fresh:
            # After a preemption, or because a store has changed the job's blocks: what it computed stays.
            job.unplaced = {at: kept for at, kept in job.unplaced.items() if at < work.start}
            job.blocks, job.carried = [], None
        job.blocks += work.blocks
        room = len(job.blocks) * self.size
        for at in [at for at in job.unplaced if at < room]:
            self.arena[:, job.blocks[at // self.size], at % self.size] = job.unplaced.pop(at)
        known = len(job.tokens) + (work.tokens - 1 if work.phase == "verify" else 0)
        assert work.start + work.tokens <= min(known, room), "no token, or no block"

    def begin(self, work: Work) -> Words:
        job, first = self.answers[work.seq], (work.layers or (0, 0))[0]
        if first == 0:
            ids = job.tokens[work.start : work.start + work.tokens]
            if work.phase == "verify":
                ids = [job.tokens[work.start], *job.guesses]
            return np.array(ids, np.uint64) * A64
        assert job.carried is not None and job.carried[:3] == (work.start, work.tokens, first)
        return job.carried[3]

    def write(self, work: Work, words: Words, layer: int) -> None:
        at = np.arange(work.start, work.start + work.tokens)
        kept = words * A64 + at.astype(np.uint64) * B64 + np.uint64(layer * C & MASK)
        blocks = np.array(self.answers[work.seq].blocks)[at // self.size]
        self.arena[layer, blocks, at % self.size] = kept ^ kept >> S31

    def read(self, work: Work, words: Words, layer: int) -> Words:
        """What goes on from the layer."""
        end = work.start + work.tokens
        blocks = self.answers[work.seq].blocks[: -(-end // self.size)]
        kept = self.arena[layer, blocks].ravel()[:end]
        seen = np.cumsum(kept * np.arange(1, 2 * end, 2, dtype=np.uint64))[work.start :]
        words = (words ^ seen) * C64
        words = (words ^ words >> S29) * A64
        return words ^ words >> S32

    def guess(self, work: Work, chance: random.Random) -> Work:
        """Guesses for a chunk that has room for them, most of them right; the chunk with as many positions."""
        job = self.answers[work.seq]
        text, done = Reference(job.request, job.answer).ids, len(job.tokens) - job.prompt.num_tokens
        right = text[done : done + chance.randint(0, work.tokens - 1)]
        job.guesses = [one if chance.random() < 0.7 else chance.randrange(VOCAB) for one in right]
        return work._replace(tokens=1 + len(job.guesses))

    def draw_verified(self, work: Work, words: Words, stop_at: int) -> list[int]:
        """A token, and one more for each guess that was right, up to where the answer ends."""
        ids: list[int] = []
        for word, guess in zip(words, [*self.answers[work.seq].guesses, None], strict=True):
            ids.append(self.draw(work.seq, int(word)))
            if ids[-1] != guess or work.start + len(ids) >= stop_at:
                break
        return ids

    def draw(self, seq: int, word: int) -> int:
        job = self.answers[seq]
        token = token_of(word, job.request, job.answer)
        job.tokens.append(token)
        self.texts[job.request.id, job.answer].append(token)
        return token

    def go_on(self, seq: int) -> int:
        """One more decode of a repeated plan: its block may be one that nobody has told yet."""
        job = self.answers[seq]
        at = len(job.tokens) - 1
        word, told = job.tokens[at] * A & MASK, len(job.blocks) * self.size
        job.unplaced[at] = []
        weights = np.arange(1, 2 * at + 2, 2, dtype=np.uint64)
        for layer in range(LAYERS):
            kept = word * A + at * B + layer * C & MASK
            job.unplaced[at].append(kept ^ kept >> 31)
            placed = self.arena[layer, job.blocks].ravel()[:at]
            later = [job.unplaced[place][layer] for place in range(min(at, told), at + 1)]
            both = np.concatenate((placed[:told], np.array(later, np.uint64)))
            word = (word ^ int(np.sum(both * weights))) * C & MASK
            word = (word ^ word >> 29) * A & MASK
            word ^= word >> 32
        if at < told:
            self.arena[:, job.blocks[at // self.size], at % self.size] = job.unplaced.pop(at)
        return self.draw(seq, word)

    def fill(self, seq: int, computed: int) -> tuple[BlockHash, ...]:
        """Names of blocks that became full and were not told before."""
        job = self.answers[seq]
        fresh = job.prompt.extend(job.hashes, job.tokens[:computed], self.size)
        job.hashes += fresh
        return tuple(fresh)

    def copy(self, transfer: Transfer) -> None:
        for device, host, count in transfer.runs:
            here, there = self.arena[:, device : device + count], self.host[:, host : host + count]
            if transfer.is_out:
                there[:] = here
            else:
                here[:] = there


class Remembering(ModelledExecutor):
    """See the module's text. With `is_counted` it tells counts, as modelled executors do; else ids and names."""

    memory: Memory
    is_counted: bool
    chance: random.Random

    def remember(self, memory: Memory, *, is_counted: bool, seed: int) -> None:
        self.memory, self.is_counted, self.chance = memory, is_counted, random.Random(seed)
        self.passing: dict[PlanId, Passing] = {}
        self.transfers: dict[int, Transfer] = {}
        self.yielded: set[PlanId] = set()
        self.num_yields = 0

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        def told(completion: Completion) -> None:
            if isinstance(completion, Moved):
                self.memory.copy(self.transfers.pop(completion.transfer))
            elif isinstance(completion, Yielded):
                passing = self.passing[completion.plan]
                self.yielded.add(completion.plan)
                self.num_yields += 1
                self._pass(passing, self.chance.randint(passing.layer, LAYERS))
            else:
                completion = self._end(completion)
            on_completion(completion)

        super().listen(told)

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        self.memory.open(plan)
        guess, chance = self.memory.guess, self.chance
        work = [guess(one, chance) if one.phase == "verify" else one for one in plan.work]
        passing = self.passing[plan.id] = Passing(plan, tuple(work))
        if not self.transfers:
            self._pass(passing, self.chance.randint(0, LAYERS))
        return super().launch(plan, repeat)

    def resume(self, plan: PlanId) -> None:
        self.yielded.remove(plan)
        super().resume(plan)

    def abort(self, plan: PlanId) -> None:
        self.passing.pop(plan, None)
        self.yielded.discard(plan)
        super().abort(plan)

    def close_jobs(self, seqs: Any) -> None:
        for seq in seqs:
            self.memory.answers.pop(seq, None)
        super().close_jobs(seqs)

    def transfer(self, transfer: Transfer) -> None:
        self.transfers[transfer.id] = transfer
        super().transfer(transfer)

    def _pass(self, passing: Passing, upto: int) -> None:
        memory, work = self.memory, passing.work
        if upto and not passing.words:
            for one in work:
                memory.place(one)
            passing.words = [memory.begin(one) for one in work]
        for layer in range(passing.layer, upto):
            here = [
                at
                for at, one in enumerate(work)
                if one.layers is None or one.layers[0] <= layer < one.layers[1]
            ]
            for at in here:
                memory.write(work[at], passing.words[at], layer)
            for at in here:
                passing.words[at] = memory.read(work[at], passing.words[at], layer)
        passing.layer = upto

    def _end(self, done: Done) -> Done:
        assert isinstance(done, Counted)
        passing = self.passing.pop(done.plan)
        self._pass(passing, LAYERS)
        drawn: dict[int, list[int]] = {}
        for work, words in zip(passing.work, passing.words, strict=True):
            if work.layers is not None and work.layers[1] < LAYERS:
                job = self.memory.answers[work.seq]
                job.carried = (work.start, work.tokens, work.layers[1], words)
            elif work.phase == "verify":
                stop_at = self._stops[work.seq]
                drawn[work.seq] = self.memory.draw_verified(work, words, stop_at)
            elif work.samples:
                drawn[work.seq] = [self.memory.draw(work.seq, int(words[-1]))]
        for _ in range(done.steps_run - 1):
            for seq, ids in drawn.items():
                ids.append(self.memory.go_on(seq))
        if self.is_counted and all([work.phase != "verify" for work in passing.work]):
            return done
        stops = {seq: is_stop for seq, _, is_stop, _ in done.counts}
        return self._told(done, passing, drawn, stops)

    def _told(
        self,
        done: Done,
        passing: Passing,
        drawn: Mapping[int, list[int]],
        stops: Mapping[int, bool],
    ) -> Done:
        outputs = []
        for work in passing.work:
            if work.seq in drawn:
                ids = tuple(drawn[work.seq])
                verifies = work.phase == "verify"
                end = work.start + (len(ids) if verifies else work.tokens)
                filled = () if self.is_counted else self.memory.fill(work.seq, end)
                is_stop = end >= self._stops[work.seq] if verifies else stops[work.seq]
                guesses = work.tokens - 1 if verifies else 0
                told = () if self.is_counted else ids
                outputs.append(Sampled(work.seq, len(ids), told, is_stop, filled, drafted=guesses))
        return Done(done.plan, done.steps_run, tuple(outputs), done.ends)


class Hashed(Remembering):
    """One lane."""


class LanedHashed(Remembering, LanedExecutor):
    """Several."""
