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


def kept_in_order(row: torch.Tensor, limits: draw.Limits) -> tuple[np.ndarray, np.ndarray]:
    """(entries that the limits leave, their shares), the likeliest first: by sorting everything, in float64."""
    values = row.double().numpy() / HEAT
    order = np.argsort(-values, kind="stable")
    weights = np.exp(values[order] - values.max())
    keep = (np.arange(len(values)) < limits.top_k) & (weights >= limits.min_p) & (weights > 0)
    shares = np.where(keep, weights, 0.0)
    shares /= shares.sum()
    shares[shares.cumsum() - shares >= limits.top_p] = 0.0
    return order, shares / shares.sum()


CUTS = [
    draw.Limits(10**6, 0.303, 0.0), draw.Limits(10**6, 0.903, 0.0), draw.Limits(10**6, 0.9999, 0.0),
    draw.Limits(1, 1.0, 0.0), draw.Limits(50, 1.0, 0.0), draw.Limits(700, 1.0, 0.0), draw.Limits(40, 0.803, 0.05),
    draw.Limits(10**6, 1.0, 0.2), draw.Limits(10**6, 0.703, 1e-4), draw.Limits(10**6, 1.0, 1e-30),
]  # fmt: skip


@pytest.mark.parametrize("limits", CUTS)
@pytest.mark.parametrize("isa", kernels.isas())
def test_limits(isa: str, limits: draw.Limits) -> None:
    """Peaked, flat and tied rows of odd widths; chances in the middle of shares, and just inside the last one kept."""
    generator = torch.Generator().manual_seed(0)
    for width, spread in ((1, 1.0), (17, 1.0), (130, 0.0), (1029, 8.0), (1029, 0.3), (5003, 3.0)):
        if limits.top_k >= width and limits.top_p >= 1 and not limits.min_p:
            continue  # nothing is limited: drawn in id order
        rows = torch.randn(4, width, generator=generator) * spread
        rows[1] = rows[1].round()  # many are equal
        rows[2, width // 3 : width // 2] = -torch.inf
        for row in rows:
            order, shares = kept_in_order(row, limits)
            edges = shares.cumsum()
            last = int(np.flatnonzero(shares)[-1])
            places = sorted({0, last // 3, last // 2, last})
            places = [at for at in places if shares[at] > 1e-6] or [0]
            chances = [float(edges[at] - shares[at] / 2) for at in places]
            many = row.expand(len(places), -1).contiguous()
            ids, _ = draw.pick_tokens(
                many, [HEAT] * len(places), chances, limits=[limits] * len(places), isa=isa
            )
            assert ids == [int(order[at]) for at in places]


@pytest.mark.parametrize("isa", [*kernels.isas(), None])
def test_bans(isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mixture of words, up to an odd end; None: by torch."""
    chance = np.random.default_rng(0)
    if isa is None:
        monkeypatch.setattr(draw.native, "available", lambda: False)
    for width in (1, 31, 32, 100, 5001):
        words = chance.integers(-(2**31), 2**31, -(-width // 32)).astype(np.int32)
        words[chance.random(len(words)) < 0.3] = 0
        words[chance.random(len(words)) < 0.3] = -1
        row = torch.randn(width + 7)
        want = row.clone()
        bits = [(int(words[i // 32]) >> (i % 32)) & 1 for i in range(width)]
        want[:width][torch.tensor(bits) == 0] = -torch.inf
        draw.ban_(row[:width], words, isa=isa)
        assert row.equal(want)
