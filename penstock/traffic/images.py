"""Images that prompts show: how many, and how many tokens of the prompt each becomes.

    [images]
    share = 0.8                                            # of the callers show any
    number = {kind = "geometric", mean = 1.5, most = 8}
    tokens = {kind = "choice", values = [999, 888, 729]}   # of each image; see traffic.draws

Lengths go on saying the text alone: the tokens of the images come on top, at the end of the prompt. Nobody shares an
image with anybody.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.rng import stream
from penstock.traffic.draws import Drawn, draw_of, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    tokens: Drawn
    number: Drawn = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {self.share}")


class Shown:
    """Draws the images of one caller after the other."""

    def __init__(self, images: Images, *, seed: int, owner: str, where: str) -> None:
        self._share = images.share
        self._number = draw_of(images.number, f"{where}.number")
        self._tokens = draw_of(images.tokens, f"{where}.tokens")
        self._chance = stream(seed, "traffic", "images", owner)

    def draw(self) -> tuple[int, ...]:
        """Tokens of each; () of a caller who shows none."""
        chance = self._chance
        if chance.random() >= self._share:
            return ()
        number = whole(self._number, chance)
        return tuple([whole(self._tokens, chance) for _ in range(number)])
