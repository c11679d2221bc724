"""What the executor remembers of jobs, as arrays that are kept across steps: a job is a row.

Token ids (prompt, then outputs) and block ids lie in two growing matrices, sampling parameters in one structured
array, so that a step of single tokens is built by a handful of numpy gathers, whatever the number of jobs.

The table belongs to the lane's thread. A plan may be aborted after its tokens were drawn but before anybody heard of
it; the next plan's positions tell, and what nobody heard of is forgotten (`rewind`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.core.plans import Opening, Work
from penstock.core.prompt import TokenPrompt
from penstock.core.types import BlockHash, Request, Sampling, TokenLogprob

SAMPLING = np.dtype(
    [
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("top_k", "i8"),  # the vocabulary's size when all
        ("seed", "u8"),
        ("answer", "u8"),
        ("is_shaped", "?"),  # has penalties, biases or a minimum length
        ("is_limited", "?"),  # has top_p, top_k or min_p
        ("has_logprobs", "?"),
        ("is_plain", "?"),  # greedy, not shaped, no logprobs
    ],
    align=True,  # torch reads columns of it in place
)
COLDEST = 1e-5  # temperatures below this are greedy


@dataclass(slots=True)
class JobState:
    """One job. `hashes` are of full computed blocks, the prompt's included."""

    seq: int
    row: int
    request: Request
    prompt: TokenPrompt
    num_prompt: int
    stops: frozenset[int]
    hashes: list[BlockHash] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    num_prompt_logprobs: int | None = None  # alternatives a prompt token; None = not wanted
    is_scored: bool = False  # the prompt's log-probabilities were told

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling


class JobTable:
    """See the module's text."""

    def __init__(self, *, vocab_size: int, block_size: int, eos_ids: tuple[int, ...]) -> None:
        self.vocab_size, self.block_size = vocab_size, block_size
        self.eos_ids = frozenset(eos_ids)
        self.jobs: dict[int, JobState] = {}
        self.tokens: NDArray[np.int32] = np.zeros((8, 256), np.int32)
        self.blocks: NDArray[np.int32] = np.zeros((8, 16), np.int32)
        self.num_blocks: NDArray[np.int32] = np.zeros(8, np.int32)
        self.known: NDArray[np.int32] = np.zeros(8, np.int32)
        self.sampling = np.zeros(8, SAMPLING)
        self._free = list(range(8))

    def open(self, opening: Opening, seed: int) -> str | None:
        """Take a job in; the reason when it cannot be served."""
        request = opening.request
        reason = self._refusal(request)
        if reason is not None or opening.seq in self.jobs:
            return reason
        prompt = request.prompt
        assert isinstance(prompt, TokenPrompt)
        if not self._free:
            self._grow_rows()
        row = self._free.pop()
        count = len(prompt.ids)
        self._fit_tokens(count + 1)
        self.tokens[row, :count] = prompt.ids
        self.known[row] = count
        self.num_blocks[row] = 0
        self.blocks[row] = 0
        chosen = request.sampling
        self._note_sampling(row, chosen, opening.answer, seed)
        stops = self.eos_ids | frozenset(chosen.stop_ids)
        self.jobs[opening.seq] = JobState(
            seq=opening.seq,
            row=row,
            request=request,
            prompt=prompt,
            num_prompt=count,
            stops=frozenset(chosen.stop_ids) - self.eos_ids if chosen.ignore_eos else stops,
            hashes=list(prompt.blocks(self.block_size)),
            num_prompt_logprobs=0
            if request.kind == "score" and chosen.prompt_logprobs is None
            else chosen.prompt_logprobs,
        )
        return None

    def close(self, seq: int) -> None:
        job = self.jobs.pop(seq, None)
        if job is not None:
            self._free.append(job.row)

    def place(self, work: Work) -> JobState:
        """Note the blocks a planned job got, and forget what an aborted plan drew."""
        job = self.jobs[work.seq]
        row = job.row
        if work.is_fresh:
            self.num_blocks[row] = 0
            self.blocks[row] = 0
        if work.blocks:
            held = int(self.num_blocks[row])
            count = held + len(work.blocks)
            self._fit_blocks(count)
            self.blocks[row, held:count] = work.blocks
            self.num_blocks[row] = count
        end = work.start + work.tokens
        if work.samples and self.known[row] > end:
            self.known[row] = end
            del job.hashes[max(job.num_prompt, work.start) // self.block_size :]
        assert end <= self.known[row], f"job {work.seq} has no token at position {end - 1}"
        return job

    def append(self, job: JobState, token: int) -> None:
        at = int(self.known[job.row])
        self._fit_tokens(at + 1)
        self.tokens[job.row, at] = token
        self.known[job.row] = at + 1

    def fill(self, job: JobState, computed: int) -> tuple[BlockHash, ...]:
        """Hashes of blocks that became full with `computed` positions and were not told before."""
        if computed // self.block_size <= len(job.hashes):
            return ()
        ids = self.tokens[job.row, :computed].tolist()
        fresh = job.prompt.extend(job.hashes, ids, self.block_size)
        job.hashes += fresh
        return tuple(fresh)

    def outputs(self, job: JobState) -> NDArray[np.int32]:
        return self.tokens[job.row, job.num_prompt : self.known[job.row]]

    def _refusal(self, request: Request) -> str | None:
        prompt, chosen = request.prompt, request.sampling
        if request.kind == "embed":
            return "this engine does not compute embeddings"
        if not isinstance(prompt, TokenPrompt):
            return "the prompt has no token ids, which a real model needs"
        if request.parts:
            return "this model takes text only"
        if request.adapter is not None:
            return f"this engine has no adapter {request.adapter!r}"
        named = [*chosen.stop_ids, *(token for token, _ in chosen.logit_bias)]
        for what, ids in (("prompt", prompt.ids), ("sampling parameters", named)):
            if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
                return f"the {what} name a token outside the vocabulary of {self.vocab_size}"
        return None

    def _note_sampling(self, row: int, chosen: Sampling, answer: int, seed: int) -> None:
        top_k = min(chosen.top_k or self.vocab_size, self.vocab_size)
        is_shaped = (
            bool(chosen.logit_bias)
            or chosen.min_tokens > 0
            or chosen.repetition_penalty != 1.0
            or chosen.presence_penalty != 0.0
            or chosen.frequency_penalty != 0.0
        )
        heat = 0.0 if chosen.temperature < COLDEST else chosen.temperature
        is_limited = chosen.top_p < 1.0 or top_k < self.vocab_size or chosen.min_p > 0.0
        has_logprobs = chosen.logprobs is not None
        self.sampling[row] = (
            heat,
            chosen.top_p,
            chosen.min_p,
            top_k,
            (seed if chosen.seed is None else chosen.seed) & 0xFFFF_FFFF_FFFF_FFFF,
            answer,
            is_shaped,
            is_limited,
            has_logprobs,
            not (heat or is_shaped or has_logprobs),
        )

    def _grow_rows(self) -> None:
        old = len(self.known)
        self._free += range(2 * old - 1, old - 1, -1)
        for name in ("tokens", "blocks", "num_blocks", "known", "sampling"):
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
