"""Images in a prompt, and how far they are encoded: of modelled replicas, as real ones take text alone.

An image stands for some of the prompt's tokens. Before these can be computed its pixels pass a vision tower, which
makes an embedding of each token; nothing of that depends on the text, so it can happen at another replica, whose
embeddings then travel. A request is encoded image by image, in order.

Embeddings last until the first token of the answer: whoever loses its blocks afterwards has its images encoded again,
as its prompt is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.core.types import Job, Part, Request


class ImageJob(Job):
    """A job with images. The first `encoded` are ready, and so many more are in the step that runs (`encoding`)."""

    __slots__ = ("images", "encoded", "encoding")

    def __init__(self, *, images: tuple[int, ...], encoded: int = 0, **facts: Any) -> None:
        super().__init__(**facts)
        self.images = images  # tokens that each stands for
        self.encoded, self.encoding = encoded, 0

    @property
    def is_encoded(self) -> bool:
        return self.encoded == len(self.images)

    @property
    def images_left(self) -> tuple[int, ...]:
        """Those that no step has begun with."""
        return self.images[self.encoded + self.encoding :]


def images_left(job: object) -> Sequence[int]:
    """Images of a job that no step has begun with; of a job without any, none."""
    left: Sequence[int] = getattr(job, "images_left", ())
    return left


def is_encoded(job: object) -> bool:
    """Whether nothing has to be encoded before its prompt is computed."""
    is_ready: bool = getattr(job, "is_encoded", True)
    return is_ready


def parts_of(images: Sequence[int], num_prompt: int) -> tuple[Part, ...]:
    """Parts for images of so many tokens each, which end a prompt."""
    start, found = num_prompt - sum(images), []
    for tokens in images:
        found.append(Part(kind="image", digest=b"", start=start, num_tokens=tokens))
        start += tokens
    return tuple(found)


def images_of(request: Request) -> tuple[int, ...]:
    return tuple([part.num_tokens for part in request.parts])
