"""What the executor remembers of jobs, as arrays that are kept across steps: a job is a row.

Token ids (prompt, then outputs) and block ids lie in two growing matrices. What a step of single tokens asks of each
job (its last token, its last block) is kept with the job as well: a forward leaves nothing but weights in the caches,
and then a plain number at hand costs far less than another array operation.

The table belongs to the lane's thread; where there are two lanes, to whoever holds the executor's lock. A plan may be
aborted after its tokens were drawn but before anybody heard of it; the next plan's positions tell, and what nobody
heard of is forgotten (`place`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from penstock.core.moving import JobState as MovedState
from penstock.core.plans import Opening, Work
from penstock.core.prompt import TokenPrompt
from penstock.core.types import BlockHash, Request, Sampling, TokenLogprob
from penstock.engine.adapter_folder import name_of
from penstock.engine.grammar import Grammars, Matcher
from penstock.engine.torch.encoders.pooling import Gathered, Pooler
from penstock.engine.torch.wishes import Wishes, wishes_of


@dataclass(slots=True)
class Carried:
    """Hidden states [tokens, hidden] of a chunk, about to enter the layers named in `at`; see layered.py."""

    start: int
    tokens: int
    at: dict[int, Tensor]

    def is_of(self, work: Work) -> bool:
        return work.layers is not None and (self.start, self.tokens) == (work.start, work.tokens)

    @property
    def num_bytes(self) -> int:
        return sum([states.nbytes for states in self.at.values()])


@dataclass(slots=True)
class JobState:
    """One job. `hashes` are of full computed blocks, the prompt's included."""

    seq: int
    row: int
    request: Request
    prompt: TokenPrompt
    num_prompt: int
    stops: frozenset[int]
    wishes: Wishes
    known: int  # tokens in the table: the prompt, then what was drawn
    last: int  # the last of them
    num_blocks: int = 0
    last_block: int = 0
    hashes: list[BlockHash] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    num_prompt_logprobs: int | None = None  # alternatives a prompt token; None = not wanted
    is_scored: bool = False  # the prompt's log-probabilities were told
    carried: Carried | None = None  # of a chunk that has not passed all layers yet
    matcher: Matcher | None = None  # of the grammar that the answer must follow
    gathered: Gathered | None = None  # of a prompt that is embedded
    slot: int | None = None  # of its adapter

    @property
    def num_output(self) -> int:
        return self.known - self.num_prompt

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling


class JobTable:
    """See the module's text."""

    def __init__(
        self,
        *,
        vocab_size: int,
        block_size: int,
        num_layers: int,
        eos_ids: tuple[int, ...],
        grammars: Callable[[], Grammars] | None = None,
        pooler: Pooler | None = None,
        has_head: bool = True,
    ) -> None:
        """`grammars` None: answers that must follow a grammar are refused; `pooler` None: so is embedding."""
        self.vocab_size, self.block_size, self.num_layers = vocab_size, block_size, num_layers
        self.eos_ids = frozenset(eos_ids)
        self._grammars, self.pooler, self._has_head = grammars, pooler, has_head
        self.slot_of: Callable[[str], int | None] = lambda adapter: None  # of a resident adapter
        self._num_adapted = 0
        self.jobs: dict[int, JobState] = {}
        self.tokens: NDArray[np.int32] = np.zeros((8, 256), np.int32)
        self.blocks: NDArray[np.int32] = np.zeros((8, 16), np.int32)
        self._free = list(range(8))

    def open(self, opening: Opening, seed: int) -> str | None:
        """Take a job in; the reason when it cannot be served."""
        request = opening.request
        reason = self._refusal(request)
        if reason is not None or opening.seq in self.jobs:
            return reason
        prompt, slot = request.prompt, None
        assert isinstance(prompt, TokenPrompt)
        if request.adapter is not None:
            slot = self.slot_of(request.adapter)
            self._num_adapted += 1
        if not self._free:
            self._grow_rows()
        row = self._free.pop()
        count = len(prompt.ids)
        self._fit_tokens(count + 1)
        self.tokens[row, :count] = prompt.ids
        self.blocks[row] = 0
        chosen = request.sampling
        stops = self.eos_ids | frozenset(chosen.stop_ids)
        self.jobs[opening.seq] = JobState(
            seq=opening.seq,
            row=row,
            request=request,
            prompt=prompt,
            num_prompt=count,
            wishes=wishes_of(chosen, vocab_size=self.vocab_size, seed=seed, answer=opening.answer),
            known=count,
            last=prompt.ids[-1] if count else 0,
            stops=frozenset(chosen.stop_ids) - self.eos_ids if chosen.ignore_eos else stops,
            hashes=list(prompt.blocks(self.block_size)),
            matcher=self._matcher(chosen),
            gathered=self._gathered(request),
            num_prompt_logprobs=0
            if request.kind == "score" and chosen.prompt_logprobs is None
            else chosen.prompt_logprobs,
            slot=slot,
        )
        if opening.state is not None:
            self._go_on(self.jobs[opening.seq], opening.state)
        return None

    def _go_on(self, job: JobState, state: MovedState) -> None:
        """A job that began elsewhere: its tokens, and what the next ones are drawn from."""
        ids = state.output_ids
        self._fit_tokens(job.known + len(ids) + 1)
        self.tokens[job.row, job.known : job.known + len(ids)] = ids
        job.known += len(ids)
        job.last = ids[-1] if ids else job.last
        job.hashes += state.filled
        if state.chance is not None:
            job.wishes = replace(job.wishes, chance=state.chance)

    def take_out(self, seq: int, num_output: int) -> tuple[tuple[int, ...], int | None]:
        """See core.ports.PortableExecutor. Of a job that was never planned there is nothing."""
        job = self.jobs.get(seq)
        if job is None:
            return (), None
        ids = self.tokens[job.row, job.num_prompt : job.num_prompt + num_output].tolist()
        return tuple(ids), job.wishes.chance

    def _matcher(self, chosen: Sampling) -> Matcher | None:
        if chosen.grammar is None:
            return None
        assert self._grammars is not None  # else it was refused
        return self._grammars().matcher(chosen.grammar)

    def _gathered(self, request: Request) -> Gathered | None:
        if request.kind != "embed":
            return None
        assert self.pooler is not None  # else it was refused
        return self.pooler.gathered(request.prompt.num_tokens)

    def close(self, seq: int) -> None:
        job = self.jobs.pop(seq, None)
        if job is not None:
            self._free.append(job.row)
            self._num_adapted -= job.slot is not None

    def slots_of(self, jobs: Sequence[JobState]) -> tuple[int | None, ...] | None:
        """Slots of their adapters; None where none has one."""
        if not self._num_adapted:
            return None
        slots = tuple([job.slot for job in jobs])
        return slots if any([slot is not None for slot in slots]) else None

    def place(self, work: Work) -> JobState:
        """Note the blocks a planned job got, and forget what an aborted plan drew or another chunk carried."""
        job = self.jobs[work.seq]
        if job.carried is not None and (work.is_fresh or not job.carried.is_of(work)):
            job.carried = None
        if work.is_fresh:
            job.num_blocks = 0
            self.blocks[job.row] = 0
        if work.blocks:
            count = job.num_blocks + len(work.blocks)
            self._fit_blocks(count)
            self.blocks[job.row, job.num_blocks : count] = work.blocks
            job.last_block = work.blocks[-1]
            job.num_blocks = count
        end = work.start + (1 if work.phase == "verify" else work.tokens)
        if work.samples and job.known > end:
            job.known, job.last = end, int(self.tokens[job.row, end - 1])
            del job.hashes[max(job.num_prompt, work.start) // self.block_size :]
        assert end <= job.known, f"job {work.seq} has no token at position {end - 1}"
        room = job.num_blocks * self.block_size
        assert work.start + work.tokens <= room, f"job {work.seq} lacks blocks"
        return job

    def is_inner(self, work: Work) -> bool:
        """Whether this chunk stops before the last layer."""
        return work.layers is not None and work.layers[1] < self.num_layers

    def guess(self, job: JobState, guesses: list[int]) -> None:
        """Write guesses behind what the job knows, where its next tokens will stand."""
        self._fit_tokens(job.known + len(guesses) + 1)
        self.tokens[job.row, job.known : job.known + len(guesses)] = guesses

    def guesses(self, job: JobState, count: int) -> list[int]:
        found: list[int] = self.tokens[job.row, job.known : job.known + count].tolist()
        return found

    def append(self, job: JobState, token: int) -> None:
        self._fit_tokens(job.known + 1)
        self.tokens[job.row, job.known] = token
        job.known += 1
        job.last = token

    def fill(self, job: JobState, computed: int) -> tuple[BlockHash, ...]:
        """Hashes of blocks that became full with `computed` positions and were not told before."""
        if computed // self.block_size <= len(job.hashes) or job.num_prompt_logprobs is not None:
            return ()
        ids = self.tokens[job.row, :computed].tolist()
        fresh = job.prompt.extend(job.hashes, ids, self.block_size)
        job.hashes += fresh
        return tuple(fresh)

    def outputs(self, job: JobState, ahead: int = 0) -> NDArray[np.int32]:
        """With the first `ahead` guesses behind it."""
        return self.tokens[job.row, job.num_prompt : job.known + ahead]

    def _refusal(self, request: Request) -> str | None:
        prompt, chosen = request.prompt, request.sampling
        if request.kind == "embed" and self.pooler is None:
            return "this engine does not compute embeddings"
        if request.kind != "embed" and not self._has_head:
            return "this model makes embeddings and writes no text"
        if not isinstance(prompt, TokenPrompt):
            return "the prompt has no token ids, which a real model needs"
        if request.parts:
            return "this model takes text only"
        if request.adapter is not None and self.slot_of(request.adapter) is None:
            return f"this engine has no adapter {name_of(request.adapter)!r}"
        if chosen.grammar is not None and request.kind == "generate":
            if self._grammars is None:
                return "this engine has no tokenizer, so answers cannot be made to follow a grammar"
            fault = self._grammars().fault(chosen.grammar)
            if fault is not None:
                return f"the grammar cannot be followed: {fault}"
        named = [*chosen.stop_ids, *(token for token, _ in chosen.logit_bias)]
        for what, ids in (("prompt", prompt.ids), ("sampling parameters", named)):
            if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
                return f"the {what} name a token outside the vocabulary of {self.vocab_size}"
        return None

    def _grow_rows(self) -> None:
        old = len(self.tokens)
        self._free += range(2 * old - 1, old - 1, -1)
        for name in ("tokens", "blocks"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate((array, np.zeros_like(array))))

    def _fit_tokens(self, count: int) -> None:
        if count > self.tokens.shape[1]:
            self.tokens = _widened(self.tokens, count)

    def _fit_blocks(self, count: int) -> None:
        if count > self.blocks.shape[1]:
            self.blocks = _widened(self.blocks, count)


def _widened(array: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    width = max(count, 2 * array.shape[1])
    wider = np.zeros((array.shape[0], width), np.int32)
    wider[:, : array.shape[1]] = array
    return wider
