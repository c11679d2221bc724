"""What a step leaves behind: the drawn tokens in the table, and what each job is told.

`score` reads the prompt's log-probabilities off the hidden states; whatever the number of them, a slice of logits at a
time. `note` writes to the table, so it is called under the executor's lock.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.core.plans import Sampled, Work
from penstock.core.types import TokenLogprob
from penstock.engine.torch.decoder import Decoder
from penstock.engine.torch.drafts.verify import verified
from penstock.engine.torch.encoders.pooling import BROKEN as NO_VECTOR
from penstock.engine.torch.jobs import JobState, JobTable
from penstock.engine.torch.sampler import Drawn, token_logprobs
from penstock.engine.torch.step import StepArrays, gathered_span, prompt_span

BROKEN = "the model gave no finite numbers for the next token"


def score(
    decoder: Decoder,
    table: JobTable,
    arrays: StepArrays,
    hidden: Tensor,
    *,
    work: Sequence[Work],
    jobs: Sequence[JobState],
) -> None:
    """Log-probabilities of prompt tokens, for jobs that asked."""
    if len(arrays.rows) == arrays.num_sampling + arrays.num_gathered:
        return
    spans = [(job, prompt_span(table, chunk, job)) for chunk, job in zip(work, jobs, strict=True)]
    targets = [(job, at + 1) for job, span in spans for at in span]
    told: list[TokenLogprob] = []
    for part in arrays.logit_slices()[1 if arrays.num_sampling else 0 :]:
        some = targets[part.start - arrays.num_sampling : part.stop - arrays.num_sampling]
        ids = torch.tensor([job.prompt.ids[at] for job, at in some], device=hidden.device)
        tops = [job.num_prompt_logprobs or 0 for job, _ in some]
        told += token_logprobs(decoder.logits(hidden[part]), ids, tops)
    for (job, at), entry in zip(targets, told, strict=True):
        known = job.prompt_logprobs
        known += [None] * (at - len(known))  # the first token, and what a prefix cache skipped
        known.append(entry)


def gather(
    table: JobTable,
    arrays: StepArrays,
    hidden: Tensor,
    *,
    work: Sequence[Work],
    jobs: Sequence[JobState],
) -> dict[int, bytes | None]:
    """Take states into the vectors of jobs that embed; those that are whole now, by seq (None: not finite)."""
    at, whole = len(arrays.rows) - arrays.num_gathered, []
    for chunk, job in zip(work, jobs, strict=True):
        span = gathered_span(table, chunk, job)
        if span:
            assert job.gathered is not None
            job.gathered.add(hidden[at : at + len(span)], span.start)
            at += len(span)
            if span.stop == job.num_prompt:
                whole.append((job.seq, job.gathered))
    if not whole:
        return {}
    assert table.pooler is not None
    vectors = table.pooler.vectors([gathered for _, gathered in whole])
    return {seq: vector for (seq, _), vector in zip(whole, vectors, strict=True)}


def embedded(vectors: dict[int, bytes | None]) -> list[Sampled]:
    """What those jobs got."""
    return [
        Sampled(seq, 0, error=NO_VECTOR) if vector is None else Sampled(seq, 0, vector=vector)
        for seq, vector in vectors.items()
    ]


def note(
    table: JobTable, work: Sequence[Work], jobs: Sequence[JobState], drawn: Drawn
) -> list[Sampled]:
    """Write down the drawn tokens and say what each job got."""
    outputs, at = [], 0
    for chunk, job in zip(work, jobs, strict=True):
        if job.seq not in table.jobs:  # closed while this step was left in the middle
            at += chunk.num_rows
            continue
        scores_none = job.num_prompt_logprobs is None or table.is_inner(chunk)
        scored = () if scores_none else _finished_scores(chunk, job)
        if not chunk.samples:
            if scored or job.request.kind == "score":
                outputs.append(Sampled(job.seq, 0, prompt_logprobs=scored))
            continue
        if chunk.phase == "verify" and not drawn.is_broken[at]:
            outputs.append(verified(table, chunk, job, drawn, at))
            at += chunk.num_rows
            continue
        token, is_broken, logprob = drawn.ids[at], drawn.is_broken[at], drawn.logprobs[at]
        at += chunk.num_rows
        if is_broken:
            fault = None if job.matcher is None else job.matcher.fault
            reason = BROKEN if fault is None else f"the grammar cannot be followed: {fault}"
            outputs.append(Sampled(job.seq, 0, error=reason))
            continue
        table.append(job, token)
        outputs.append(
            Sampled(
                job.seq,
                1,
                (token,),
                token in job.stops,
                table.fill(job, chunk.start + chunk.tokens),
                () if logprob is None else (logprob,),
                scored,
            )
        )
    return outputs


def _finished_scores(chunk: Work, job: JobState) -> tuple[TokenLogprob | None, ...]:
    """All prompt log-probabilities, with the chunk that computes the prompt's last position for the first time."""
    if job.is_scored:
        return ()
    if chunk.start + chunk.tokens < job.num_prompt:
        return ()
    job.is_scored = True
    scores = job.prompt_logprobs
    return tuple(scores) + (None,) * (job.num_prompt - len(scores))
