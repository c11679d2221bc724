"""Vision towers against what their makers publish, and their cost against closed forms."""

from __future__ import annotations

import pytest

from penstock.core.errors import BadConfig
from penstock.cost.hardware import card_of
from penstock.cost.vision import TOWERS, VisionCost, tower_of

A100 = card_of("a100-80g")


def test_towers_have_the_weights_that_are_published() -> None:
    """Qwen2-VL: 675M. CLIP ViT-L/14: 304M with embeddings, and LLaVA-1.5's projector of 21M. InternViT: 304M."""
    assert TOWERS["qwen2-vl"].params == pytest.approx(675e6, rel=0.005)
    assert TOWERS["clip-l-336"].params == pytest.approx(304e6 + 21e6, rel=0.02)
    assert TOWERS["internvit-300m"].params - TOWERS["internvit-300m"].merger == pytest.approx(
        304e6, rel=0.02
    )
    with pytest.raises(BadConfig, match="no vision tower is named 'x'; known: clip-l-336"):
        tower_of("x")


def test_flops_are_two_a_weight_and_patch_and_four_a_pair_of_patches() -> None:
    cost = VisionCost(TOWERS["clip-l-336"], A100)
    patches = 576
    products = 2 * patches * 24 * 12 * 1024**2
    pairs = 4 * patches**2 * 1024 * 24
    merging = 2 * patches * (1024 * 4096 + 4096 * 4096)
    assert cost.flops([patches]) == products + pairs + merging
    assert cost.flops([patches, patches]) == 2 * cost.flops([patches])


def test_time_is_above_the_roof_and_nearly_in_proportion() -> None:
    cost = VisionCost(TOWERS["qwen2-vl"], A100)
    one, eight = cost.seconds([999]), cost.seconds([999] * 8)
    assert one > cost.flops([999]) / A100.flops
    assert 7 * one < eight < 8 * one  # nothing is gained by batches but constants
    assert cost.seconds([]) == 0.0
    assert cost.seconds([999, 256]) == cost.seconds([256, 999])
    two = VisionCost(TOWERS["qwen2-vl"], A100, tp=2)
    assert one / 2 < two.seconds([999]) < one


def test_small_images_cost_what_reading_the_weights_takes() -> None:
    cost = VisionCost(TOWERS["qwen2-vl"], A100)
    assert cost.seconds([1]) > TOWERS["qwen2-vl"].weight_bytes / A100.bandwidth
