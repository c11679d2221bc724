"""Images of one replica's prompts: which are to be encoded, and in which steps.

A batch policy that says nothing of images has them encoded all at once, in the step that computes the first tokens of
their prompt. One that does (`Decision.encodes`) says which in each step, and starts a prompt when its images are ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.core.images import ImageJob, images_of
from penstock.core.plans import Encoding
from penstock.core.types import Job, Request
from penstock.core.views import Lane, Singles
from penstock.policy.batch import Decision


class Encodings:
    """`jobs`: with images that are not encoded, by seq; empty as long as nobody shows any."""

    def __init__(self) -> None:
        self.jobs: dict[int, ImageJob] = {}

    def make(self, request: Request, facts: dict[str, Any]) -> ImageJob:
        job = ImageJob(images=images_of(request), **facts)
        self.jobs[job.seq] = job
        return job

    def bring(self, job: Job, encoded: int, *, has_blocks: bool) -> None:
        """A job came with so many embeddings, or with what was made of them all."""
        if isinstance(job, ImageJob):
            job.encoded = len(job.images) if has_blocks else encoded
            self._look(job)

    def lose(self, job: Job) -> None:
        """It lost its blocks, and its embeddings are gone."""
        if isinstance(job, ImageJob):
            job.encoded = 0
            self.jobs[job.seq] = job

    def forget(self, seq: int) -> None:
        self.jobs.pop(seq, None)

    def begin(self, decision: Decision, lanes: Sequence[Lane]) -> tuple[Encoding, ...]:
        """What the step of this decision encodes, which is under way from now on."""
        numbers = {job.seq: number for job, number in decision.encodes}
        for lane in lanes:
            chunks = lane.chunks.others if isinstance(lane.chunks, Singles) else lane.chunks
            for chunk in chunks:
                job = self.jobs.get(chunk.job.seq)
                if job is not None and job.images_left:
                    numbers[job.seq] = len(job.images_left)
        found = []
        for seq, number in numbers.items():
            job = self.jobs[seq]
            found.append(Encoding(seq, job.images_left[:number]))
            job.encoding += number
        return tuple(found)

    def end(self, images: Sequence[Encoding], *, is_done: bool) -> None:
        """Their step has ended, or will not."""
        for seq, tokens in images:
            job = self.jobs.get(seq)
            if job is not None:
                job.encoding -= len(tokens)
                job.encoded += len(tokens) if is_done else 0
                self._look(job)

    @property
    def num_tokens(self) -> int:
        """Of images that are not encoded."""
        return sum([sum(job.images[job.encoded :]) for job in self.jobs.values()])

    def _look(self, job: ImageJob) -> None:
        if job.is_encoded:
            self.jobs.pop(job.seq, None)
        else:
            self.jobs[job.seq] = job
