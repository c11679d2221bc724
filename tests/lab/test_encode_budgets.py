"""The profiler's bounds: the largest that keep the pace, and no larger ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.cost.step import features_of
from penstock.cost.vision import TOWERS, VisionCost
from penstock.lab.encode_budgets import LEAST, Usual, budgets, largest

CARD = card_of("h100")
MODEL, VISION = Roofline(shape_of("qwen2-7b"), CARD), VisionCost(TOWERS["qwen2-vl"], CARD)


@given(st.integers(0, 300), st.integers(0, 300))
def test_bisection_finds_the_border(least: int, border: int) -> None:
    assert largest(lambda number: number <= border, least, 300) == max(least, border)


@pytest.mark.parametrize("tpot_s", [0.02, 0.05, 0.1])
def test_one_more_would_break_the_pace(tpot_s: float) -> None:
    usual = Usual(answers=24, context=1200, image_tokens=800)
    found = budgets(MODEL, VISION, usual, tpot_s)
    decodes = [(usual.context - 1, 1, 1)] * usual.answers

    def with_chunk(tokens: int) -> float:
        return MODEL.seconds(features_of([*decodes, (0, tokens, 1)]))

    chunk = found.max_tokens - usual.answers
    assert with_chunk(chunk + 1) > tpot_s
    assert with_chunk(chunk) <= tpot_s
    alone_s = MODEL.seconds(features_of(decodes))
    assert alone_s + VISION.seconds([800] * (found.max_images + 1)) > tpot_s
    if found.max_images > 1:
        assert alone_s + VISION.seconds([800] * found.max_images) <= tpot_s


def test_what_cannot_keep_the_pace_is_done_all_the_same() -> None:
    found = budgets(MODEL, VISION, Usual(answers=4), 0.001)
    assert found.max_images == 1 and found.max_tokens == 4 + LEAST
