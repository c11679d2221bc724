"""Answers first, then prompts, and images in what they leave of a step.

Source: xLLM (JD, 2025; report arXiv:2510.14686), scheduling of multimodal requests by stages.

Idea: what holds up answers is the longest step. While some are written, images and prompts are given bounds that a
profile finds (lab.encode_budgets: the largest chunk, and the most images, with which a step keeps the promised pace),
and a step has the one or the other, or a part of each:

    answers   all running ones, as in vllm-v1
    prompts   chunks of up to max_tokens with the answers, of those whose images are encoded; as in vllm-v1
    images    of those who wait, in their order: floor(max_images * (1 - prompt tokens / max_tokens)) of them,
              and at least one in a step without prompts
    nobody answers: alone_tokens and alone_images in their place

A prompt that is ready goes before images, so that what was begun is brought to its end: embeddings are kept for few.

Parameters: `max_tokens` (2048), `max_images` (8), `alone_tokens` and `alone_images` (None: the same), `max_jobs` (256).

Where we differ: the order of stages, and that batch and chunk are searched for, is the report's; how a step is divided
between the two, and bounds of their own for steps without answers, are ours. The source runs the tower beside the
language model, here one comes after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from penstock.core.images import images_left, is_encoded
from penstock.core.views import JobView, Singles
from penstock.policy.batch import Decision, View
from penstock.policy.batch.vllm_v1 import VllmV1


@dataclass(slots=True)
class Epd:
    encodes: ClassVar[bool] = True
    max_tokens: int = 2048
    max_images: int = 8
    alone_tokens: int | None = None
    alone_images: int | None = None
    max_jobs: int = 256
    _beside: VllmV1 = field(init=False, repr=False)
    _alone: VllmV1 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_images", "alone_tokens", "alone_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._beside = VllmV1(max_tokens=self.max_tokens, max_jobs=self.max_jobs)
        alone = self.alone_tokens or self.max_tokens
        self._alone = VllmV1(max_tokens=alone, max_jobs=self.max_jobs)

    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        is_alone = not any([job.num_output for job in view.running])
        text = self._alone if is_alone else self._beside
        if view.busy_lanes or all(map(is_encoded, waiting)):
            return text.decide(view)
        view.waiting = [job for job in waiting if is_encoded(job)]
        decision = text.decide(view)
        view.waiting = waiting
        most = (self.alone_images if is_alone else None) or self.max_images
        prompt_tokens = _prompt_tokens(decision)
        left = int(most * max(0.0, 1 - prompt_tokens / text.max_tokens))
        decision.encodes = _first(waiting, left if prompt_tokens else max(left, 1))
        if decision.encodes:
            decision.stable_for = 1
        return decision


def _first(waiting: Sequence[JobView], most: int) -> tuple[tuple[JobView, int], ...]:
    """The first `most` images."""
    found: list[tuple[JobView, int]] = []
    for job in waiting:
        if most < 1:
            break
        number = min(most, len(images_left(job)))
        if number:
            found.append((job, number))
            most -= number
    return tuple(found)


def _prompt_tokens(decision: Decision) -> int:
    """Of the chunks that are no answers."""
    tokens = 0
    for lane in decision.batch.lanes:
        chunks = lane.chunks.others if isinstance(lane.chunks, Singles) else lane.chunks
        tokens += sum([chunk.tokens for chunk in chunks if chunk.job.num_output == 0])
    return tokens
