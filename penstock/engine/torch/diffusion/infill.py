"""How many tokens a model guesses right in the middle of a text that is known: what lab.agreement counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.core.types import CanvasRule
from penstock.engine.torch.diffusion.canvas import Canvas
from penstock.engine.torch.diffusion.model import DiffusionModel


def infilled(
    model: DiffusionModel, rule: CanvasRule, prompt: Sequence[int], truth: Sequence[int]
) -> tuple[int, int]:
    """Of every second token of the first block behind the prompt: those guessed right, and how many there were."""
    canvas = Canvas.begun(list(prompt), len(truth), rule, model.mask_id, None)
    known = torch.tensor(truth, dtype=torch.int64)
    start, end = canvas.block
    canvas.is_masked[:] = False
    canvas.is_masked[start:end:2] = True
    canvas.ids[start:] = known
    canvas.ids[canvas.is_masked] = model.mask_id
    canvas.slots = torch.arange(rule.num_kept(len(canvas.ids)))
    wanted = canvas.is_masked.nonzero()[:, 0]
    with torch.inference_mode():
        while canvas.num_done == 0:
            for _ in model.step([(canvas, rule.phase(canvas.step))]):
                pass
    return int((canvas.ids[wanted] == known[wanted - start]).sum()), len(wanted)
