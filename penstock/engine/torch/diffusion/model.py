"""One forward over canvases in different phases, as one ragged batch, and what it reveals.

    rows      all positions of a canvas in full and refresh, its active block in reuse; side by side
    logits    of masked positions of active blocks only, `row_cap` rows at a time
    order     of the answers in a step: none. Each attends to itself only, so an answer is the same alone or beside
              others, but for the rounding of matrix products of other sizes

Of a shifted model (Dream) output i tells position i + 1, so a block's first position is told by the one before it. A
reuse step does not compute that one, so the first position is always revealed in the block's first step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.core.types import Phase
from penstock.engine.torch.decoder import Decoder, StepInput
from penstock.engine.torch.decoder import Piece as Passed
from penstock.engine.torch.diffusion.attention import PackedAttention, Piece
from penstock.engine.torch.diffusion.canvas import Canvas
from penstock.engine.torch.diffusion.unmask import Noise, guess
from penstock.engine.torch.ports import StepMeta

ROW_CAP = 1024


class Told(NamedTuple):
    """`tokens` of a block that this step resolved, else empty; `is_broken`: the model gave no finite numbers."""

    tokens: tuple[int, ...] = ()
    is_broken: bool = False


@dataclass(slots=True)
class Counts:
    """Of one step."""

    query_tokens: int = 0
    logit_rows: int = 0
    most_rows: int = 0  # of one slice


class _Asked(NamedTuple):
    """Rows of the step whose outputs are wanted, of one canvas, and the positions they tell."""

    canvas: Canvas
    rows: Tensor
    positions: Tensor


@dataclass(slots=True)
class DiffusionModel:
    """A loaded model. `decoder.attention` is the PackedAttention."""

    decoder: Decoder
    mask_id: int
    is_shifted: bool
    device: torch.device
    row_cap: int = ROW_CAP

    @property
    def attention(self) -> PackedAttention:
        assert isinstance(self.decoder.attention, PackedAttention)
        return self.decoder.attention

    def step(
        self, work: Sequence[tuple[Canvas, Phase]], counts: Counts | None = None
    ) -> Generator[Passed, None, list[Told]]:
        """Advance each canvas by one step. Yields between the parts of the forward."""
        pieces, ids, positions, asked = self._lay_out(work)
        self.attention.pieces = pieces
        rows = torch.cat([one.rows for one in asked])
        longest = max([len(canvas.ids) for canvas, _ in work])
        step = StepInput(
            ids.to(self.device),
            positions.to(self.device),
            rows.to(self.device),
            _meta(len(ids), longest, self.device),
        )
        hidden = yield from self.decoder.forward(step)
        noise: list[Noise | None] = []
        for one in asked:
            noise += [one.canvas.noise] * len(one.rows)
        guesses = guess(
            hidden,
            self.decoder.logits,
            mask_id=self.mask_id,
            row_cap=self.row_cap,
            noise=noise if any(each is not None for each in noise) else (),
        )
        if counts is not None:
            counts.query_tokens, counts.logit_rows = len(ids), len(rows)
            counts.most_rows = min(len(rows), self.row_cap)
        return self._reveal(work, asked, guesses.tokens.cpu(), guesses.confidence.cpu())

    def _lay_out(
        self, work: Sequence[tuple[Canvas, Phase]]
    ) -> tuple[tuple[Piece, ...], Tensor, Tensor, list[_Asked]]:
        pieces, ids, positions, asked, first = [], [], [], [], 0
        for canvas, phase in work:
            assert not canvas.is_over, "a canvas without masks was planned"
            begin, end = canvas.block if phase == "reuse" else (0, len(canvas.ids))
            count = end - begin
            kept = canvas.kept() if phase != "full" else canvas.slots[:0]
            pieces.append(Piece(phase, first, count, canvas.block, kept.to(self.device)))
            ids.append(canvas.ids[begin:end])
            positions.append(torch.arange(begin, end))
            asked.append(self._asked(canvas, phase, begin, first))
            first += count
        return tuple(pieces), torch.cat(ids), torch.cat(positions), asked

    def _asked(self, canvas: Canvas, phase: Phase, begin: int, first: int) -> _Asked:
        masked = canvas.masked()
        rows = masked - begin + first
        if self.is_shifted:
            rows = rows - 1
            assert phase != "reuse" or masked[0] > begin, "reuse does not know a block's first"
        return _Asked(canvas, rows, masked)

    def _reveal(
        self,
        work: Sequence[tuple[Canvas, Phase]],
        asked: Sequence[_Asked],
        tokens: Tensor,
        confidence: Tensor,
    ) -> list[Told]:
        told, at = [], 0
        for (canvas, _), one in zip(work, asked, strict=True):
            part = slice(at, at + len(one.rows))
            at = part.stop
            if not bool(confidence[part].isfinite().all()):
                told.append(Told(is_broken=True))
                continue
            is_first = self.is_shifted and canvas.step == 0
            is_done = canvas.reveal(one.positions, tokens[part], confidence[part], is_first)
            told.append(Told(tuple(canvas.resolve())) if is_done else Told())
        return told


def _meta(num_tokens: int, longest: int, device: torch.device) -> StepMeta:
    """Pieces say where things are; the decoder itself asks for the longest context only."""
    none = torch.zeros(0, dtype=torch.int32, device=device)
    return StepMeta(none, none, none, none.long(), num_tokens, longest)
