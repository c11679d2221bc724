"""Guesses enter a step as further positions of their jobs, and leave it as tokens, as far as they were right."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.plans import Sampled, Work
from penstock.core.types import Phase
from penstock.engine.torch.drafts import Drafter
from penstock.engine.torch.jobs import JobState, JobTable
from penstock.engine.torch.sampler import Drawn


def with_guesses(
    drafter: Drafter | None, table: JobTable, work: Sequence[Work], jobs: Sequence[JobState]
) -> list[Work]:
    """The same work with as many positions as there are guesses, which stand behind their jobs' tokens now."""
    places = [at for at, chunk in enumerate(work) if chunk.phase == "verify"]
    asked, most = [jobs[at] for at in places], [work[at].tokens - 1 for at in places]
    told = [[] for _ in asked] if drafter is None else drafter.propose(table, asked, most)
    found = list(work)
    for at, job, guesses, count in zip(places, asked, told, most, strict=True):
        guesses = usable(job, table, guesses[:count])
        table.guess(job, guesses)
        phase: Phase = "verify" if guesses else "extend"
        found[at] = work[at]._replace(tokens=1 + len(guesses), phase=phase)
    return found


def usable(job: JobState, table: JobTable, guesses: list[int]) -> list[int]:
    """Up to the first that ends the answer, which the row before it says as well, or that the grammar forbids."""
    for place, guess in enumerate(guesses):
        if guess in job.stops:
            guesses = guesses[:place]
            break
    if job.matcher is not None and guesses:
        guesses = guesses[: job.matcher.num_valid(table.outputs(job).tolist(), guesses)]
    return guesses


def sampling_rows(
    work: Sequence[Work], jobs: Sequence[JobState], is_guessed: bool = True
) -> tuple[list[JobState], Sequence[int]]:
    """The job of each row that samples, and how many guesses stand before it (nothing where there are none)."""
    if not is_guessed:
        return [job for chunk, job in zip(work, jobs, strict=True) if chunk.samples], ()
    owners: list[JobState] = []
    ahead: list[int] = []
    for chunk, job in zip(work, jobs, strict=True):
        for place in range(chunk.num_rows):
            owners.append(job)
            ahead.append(place)
    return owners, ahead


def verified(table: JobTable, chunk: Work, job: JobState, drawn: Drawn, at: int) -> Sampled:
    """What the rows from `at` on gave, of which the first has a token.

    A row counts as long as the guesses before it are what was drawn there.
    """
    guesses: list[int] = table.guesses(job, chunk.tokens - 1)
    ids: list[int] = []
    for place, guess in enumerate([*guesses, None]):
        if drawn.is_broken[at + place]:
            break
        ids.append(drawn.ids[at + place])
        if ids[-1] != guess:
            break
    for token in ids:
        table.append(job, token)
    if job.matcher is not None:
        job.matcher.forget(job.num_output - 1)
    logprobs = [entry for entry in drawn.logprobs[at : at + len(ids)] if entry is not None]
    return Sampled(
        job.seq,
        len(ids),
        tuple(ids),
        ids[-1] in job.stops,
        table.fill(job, chunk.start + len(ids)),
        tuple(logprobs),
        drafted=len(guesses),
    )
