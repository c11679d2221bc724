"""Tokens picked by the kernel and by torch, against running sums over the whole vocabulary in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from penstock.engine.torch import kernels
from penstock.engine.torch.kernels import draw

ROWS, HEAT = 40, 0.7


@pytest.fixture(params=[*kernels.isas(), "torch"])
def pick(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    if request.param == "torch":
        return draw._pick_in_torch
    return lambda logits, heat, chance: draw.pick_tokens(logits, heat, chance, isa=request.param)


@pytest.mark.parametrize("width", [1, 15, 128, 130, 1024, 5000])
def test_the_entry_that_chance_falls_on(pick, width: int) -> None:  # type: ignore[no-untyped-def]
    """Chances are put in the middle of an entry's share, where rounding does not matter."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(ROWS, width, generator=generator) * 3
    logits[:, 1 : width // 3] = -torch.inf
    shares = (logits.double() / HEAT).softmax(-1).numpy()
    middle = shares.cumsum(-1) - shares / 2
    wanted = [int(np.argsort(shares[row])[-1 - row % min(width, 20)]) for row in range(ROWS)]
    wanted = [
        at if shares[row, at] > 1e-5 else int(shares[row].argmax()) for row, at in enumerate(wanted)
    ]
    ids, best = pick(logits, [HEAT] * ROWS, [middle[row, at] for row, at in enumerate(wanted)])
    assert ids == wanted
    assert best == logits.amax(-1).tolist()


def test_the_ends_of_chance(pick) -> None:  # type: ignore[no-untyped-def]
    """Chance 0 and the greatest below 1 hit the first and the last entry that can be drawn at all."""
    logits = torch.full((2, 300), -torch.inf)
    logits[:, [40, 200]] = torch.tensor([1.0, 2.0])
    ids, _ = pick(logits, [1.0, 1.0], [0.0, math.nextafter(1.0, 0.0)])
    assert ids == [40, 200]


def test_the_likeliest_is_the_first_of_equals(pick) -> None:  # type: ignore[no-untyped-def]
    logits = torch.zeros(3, 3000)
    logits[0, [2999, 1500, 1501]] = 7.0
    logits[1, 2999] = 7.0
    wide = torch.zeros(3, 4000)
    wide[:, :3000] = logits
    assert pick(logits, None, None)[0] == [1500, 2999, 0]
    assert pick(wide[:, :3000], None, None)[0] == [1500, 2999, 0]


@pytest.mark.parametrize("place", [0, 77, 299])
def test_rows_without_finite_numbers_are_told(pick, place: int) -> None:  # type: ignore[no-untyped-def]
    logits = torch.zeros(4, 300)
    logits[0, place], logits[1, place], logits[2] = torch.nan, torch.inf, -torch.inf
    ids, best = pick(logits, [1.0] * 4, [0.5] * 4)
    assert [math.isfinite(value) for value in best] == [False, False, False, True]
    assert all(0 <= token < 300 for token in ids)
