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

from typing import Any

from penstock.core.types import CanvasRule, Job, Sampling, WorkOption

PLAIN = Sampling()
MEANINGLESS = (
    "min_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "logprobs", "prompt_logprobs", "grammar",
)  # fmt: skip


def meaningless(chosen: Sampling) -> str | None:
    """The first thing asked for that makes no sense where masks are filled in any order; None = all does."""
    for name in MEANINGLESS:
        if getattr(chosen, name) != getattr(PLAIN, name):
            return name
    return None


class CanvasJob(Job):
    """A job on a canvas. `computed` stays 0: no position is final before the answer ends."""

    __slots__ = ("rule", "step")

    def __init__(self, *, rule: CanvasRule, **facts: Any) -> None:
        super().__init__(**facts)
        self.rule = rule
        self.step = 0  # of the active block

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
