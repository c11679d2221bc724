"""Answers that are written on a canvas: a diffusion language model fills masks, block by block, in any order.

The canvas is the prompt followed by `max_tokens` masks, cut into blocks that are resolved from left to right. Within a
block the program is

    full      the first `delay` steps: all positions, nothing kept
    refresh   the next step, and every `refresh_every` steps from there on: all positions, keys and values outside the
              block are computed anew and `retention` of them kept
    reuse     all other steps: the positions of the block alone

and each step reveals some of the block's masks (engine.torch.diffusion.unmask). A block is resolved when none is left:
its tokens are told all at once and the next begins. How soon that is only the executor knows, so the frontier is known
one step ahead: the program goes on when it hears how the step ended.

A job's memory is what it keeps, all of it from the first step on: `ceil(retention * (prompt + max_tokens))` positions.
None of it is ever shared: a position's keys change with whatever is written behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.core.types import Job, Phase, WorkOption


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasRule:
    """How canvases are filled. `steps`: of a block, at most. `threshold` None: a step reveals its share of the masks.

    `delay` 0 keeps from the first step on. `refresh_every` None: once a block; 1: never reuses.
    """

    block_tokens: int = 32
    steps: int = 32
    delay: int = 1
    refresh_every: int | None = None
    retention: float = 0.5
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("block_tokens", "steps", "refresh_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.delay < 0:
            raise ValueError(f"delay counts steps, got {self.delay}")
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention must lie in (0, 1], got {self.retention}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {self.threshold}")

    def phase(self, step: int) -> Phase:
        """Of the block's step number `step`."""
        since = step - self.delay
        if since < 0:
            return "full"
        every = self.refresh_every
        is_refresh = since == 0 or (every is not None and since % every == 0)
        return "refresh" if is_refresh else "reuse"

    def num_kept(self, positions: int) -> int:
        return math.ceil(self.retention * positions - 1e-9)


@dataclass(slots=True, eq=False, kw_only=True)
class CanvasJob(Job):
    """A job on a canvas. `computed` stays 0: no position is final before the answer ends."""

    rule: CanvasRule
    step: int = 0  # of the active block

    @property
    def canvas(self) -> int:
        """Positions in all."""
        return self.num_prompt + self.max_tokens

    @property
    def block(self) -> tuple[int, int]:
        """The active block's positions; its first is the first that was not told yet."""
        start = self.num_prompt + self.num_output
        size = self.rule.block_tokens
        return start, min(start + size - self.num_output % size, self.canvas)

    @property
    def room(self) -> int:
        """Positions that its memory holds."""
        return self.rule.num_kept(self.canvas)

    @property
    def todo(self) -> int:
        return 0 if self.in_flight else self._option().tokens_max

    def frontier(self) -> list[WorkOption]:
        return [] if self.in_flight else [self._option()]

    def _option(self) -> WorkOption:
        start, end = self.block
        phase, size = self.rule.phase(self.step), end - start
        tokens = size if phase == "reuse" else self.canvas
        # What is revealed when is not known here: at most one row a position of the block.
        return WorkOption(phase, tokens, tokens, True, size, self.room)

    def go_on(self, tokens: int) -> None:
        """A step has ended, with the block resolved if it told any tokens."""
        self.step = 0 if tokens else self.step + 1
