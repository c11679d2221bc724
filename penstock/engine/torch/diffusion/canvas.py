"""The tokens of one answer on its canvas, and which of them are still masked.

A prompt may hold the mask token itself, so masks are flags and not token ids. A block that was told to its caller never
changes; the active one is wiped when its job lost its memory, and filled again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.core.types import CanvasRule
from penstock.engine.torch.diffusion.attention import num_kept
from penstock.engine.torch.diffusion.unmask import Noise, revealed


@dataclass(slots=True)
class Canvas:
    """`num_done`: positions of the answer in blocks that are resolved. `slots`: of the arena, all it may use."""

    ids: Tensor  # int64 [prompt + masks]
    num_prompt: int
    rule: CanvasRule
    mask_id: int
    noise: Noise | None = None
    slots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    num_done: int = 0
    step: int = 0
    is_masked: Tensor = field(init=False)  # bool, like ids

    def __post_init__(self) -> None:
        self.is_masked = torch.zeros(len(self.ids), dtype=torch.bool)
        self.is_masked[self.num_prompt :] = True

    @classmethod
    def begun(
        cls, prompt: list[int], num_masks: int, rule: CanvasRule, mask_id: int, noise: Noise | None
    ) -> Canvas:
        ids = torch.tensor([*prompt, *[mask_id] * num_masks], dtype=torch.int64)
        return cls(ids, len(prompt), rule, mask_id, noise)

    @property
    def block(self) -> tuple[int, int]:
        start = self.num_prompt + self.num_done
        return start, min(start + self.rule.block_tokens, len(self.ids))

    @property
    def is_over(self) -> bool:
        return self.num_prompt + self.num_done == len(self.ids)

    def kept(self) -> Tensor:
        """Slots of the positions kept while this block is active."""
        start, end = self.block
        count = num_kept(len(self.ids) - (end - start), self.rule.retention)
        assert count <= len(self.slots), "the canvas was given too little memory"
        return self.slots[:count]

    def masked(self) -> Tensor:
        """Masked positions of the active block, ascending."""
        start, end = self.block
        return self.is_masked[start:end].nonzero()[:, 0] + start

    def reveal(self, positions: Tensor, tokens: Tensor, confidence: Tensor, is_first: bool) -> bool:
        """Fill in what this step reveals of `positions`; whether the block is resolved.

        `is_first`: the block's first position is among them whatever its confidence.
        """
        places = revealed(confidence, max(1, self.rule.steps - self.step), self.rule.threshold)
        if is_first and places and 0 not in places:
            worst = min(places, key=lambda place: (float(confidence[place]), -place))
            places = [0, *[place for place in places if place != worst]]
        chosen = positions[places]
        self.ids[chosen] = tokens[places].cpu()
        self.is_masked[chosen] = False
        self.step += 1
        return len(self.masked()) == 0

    def resolve(self) -> list[int]:
        """Close the active block: its tokens. The next one begins."""
        start, end = self.block
        self.num_done, self.step = end - self.num_prompt, 0
        told: list[int] = self.ids[start:end].tolist()
        return told

    def wipe(self) -> None:
        """Begin the active block anew."""
        start, end = self.block
        self.ids[start:end] = self.mask_id
        self.is_masked[start:end] = True
        self.step = 0
