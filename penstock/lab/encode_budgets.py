"""How much of prompts and images a step may have beside answers, so that these keep their pace: by bisection.

    chunk    the most prompt tokens c with  step(answers, c) <= pace
    images   the most images n with         step(answers) + tower(n) <= pace

`answers` are so many at once, of `context` positions each. Where not even one image keeps the pace it is one, as images
have to be encoded some time; a chunk is LEAST tokens at least.

Source: the profiler of xLLM's hybrid EPD disaggregation, which finds both by bisection on the machine; here it asks the
cost models that the simulated replicas run on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.cost.step import StepModel, features_of
from penstock.cost.vision import VisionCost

LEAST = 64  # tokens of a chunk
MOST_TOKENS, MOST_IMAGES = 8192, 64
ALONE_TOKENS, ALONE_IMAGES = 4096, 8  # of steps without answers, which hold up nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """What a step of a replica that does everything looks like. `image_tokens`: of an image."""

    answers: int = 16
    context: int = 1024
    image_tokens: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bounds of policy.batch.epd."""

    max_tokens: int
    max_images: int

    def batch(self) -> dict[str, object]:
        """The policy."""
        return {
            "name": "epd",
            "max_tokens": self.max_tokens,
            "max_images": self.max_images,
            "alone_tokens": ALONE_TOKENS,
            "alone_images": ALONE_IMAGES,
        }


def budgets(model: StepModel, vision: VisionCost, usual: Usual, tpot_s: float) -> Budgets:
    """Of steps that take at most `tpot_s`."""
    decodes = [(usual.context - 1, 1, 1)] * usual.answers

    def chunk_keeps(tokens: int) -> bool:
        return model.seconds(features_of([*decodes, (0, tokens, 1)])) <= tpot_s

    alone_s = model.seconds(features_of(decodes))

    def images_keep(number: int) -> bool:
        return alone_s + vision.seconds([usual.image_tokens] * number) <= tpot_s

    chunk = largest(chunk_keeps, LEAST, MOST_TOKENS)
    return Budgets(
        max_tokens=usual.answers + chunk,  # the bound of a step counts the answers too
        max_images=largest(images_keep, 1, MOST_IMAGES),
    )


def largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number from `least` up that fits, if what does not fit never does when there is more of it."""
    low, over = least, most + 1
    while over - low > 1:
        middle = (low + over) // 2
        low, over = (middle, over) if fits(middle) else (low, middle)
    return low
