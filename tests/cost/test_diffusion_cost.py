"""Memory and time of diffusion language models: published sizes, sums by hand, and how parts of a step add up."""

from __future__ import annotations

import dataclasses

import pytest

from penstock.core.types import CanvasRule
from penstock.cost.diffusion import (
    LLADA_8B,
    LOGIT_BYTES,
    CanvasCost,
    CanvasMemory,
    CanvasPiece,
    Logits,
    sized_for,
)
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of_config
from penstock.cost.step import StepFeatures

CARD = card_of("rtx-4090")
LENGTH = 330 + 256


def memory(card: str = "rtx-4090", retention: float = 0.5, **logits: int | None) -> CanvasMemory:
    return CanvasMemory(
        shape=LLADA_8B,
        card=card_of(card),
        logits=Logits(**logits),  # type: ignore[arg-type]
        rule=CanvasRule(retention=retention),
    )


def test_the_shape_is_lladas() -> None:
    assert LLADA_8B.params == pytest.approx(8.02e9, rel=0.001)
    assert LLADA_8B.kv_bytes == 524_288


def test_shapes_are_read_from_their_own_spelling() -> None:
    llada = {
        "model_type": "llada",
        "d_model": 4096,
        "n_heads": 32,
        "n_kv_heads": 32,
        "n_layers": 32,
        "mlp_hidden_size": 12288,
        "embedding_size": 126464,
        "max_sequence_length": 4096,
        "weight_tying": False,
    }
    assert shape_of_config(llada, "llada-8b") == LLADA_8B
    dream = {
        "model_type": "Dream",
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    }
    assert shape_of_config(dream, "dream").params == pytest.approx(7.62e9, rel=0.001)


def test_logits_take_what_was_published() -> None:
    """16384 rows of bf16: 4.14 GB; 1024 rows: 0.26 GB."""
    whole = memory(bytes_each=2, row_cap=None)
    assert whole.logit_bytes(16, 1024) == pytest.approx(4.14e9, rel=0.002)
    assert memory(bytes_each=2).logit_bytes(512, 1024) == pytest.approx(0.26e9, rel=0.01)
    assert memory(bytes_each=2).logit_bytes(3, 1024) == 3 * 32 * 126_464 * 2


@pytest.mark.parametrize("retention", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("card", ["rtx-4090", "l40s"])
def test_a_batch_fits_and_one_more_does_not(card: str, retention: float) -> None:
    for row_cap in (1024, None):
        one = memory(card, retention, bytes_each=18, row_cap=row_cap)
        num = one.batch(LENGTH)

        def needs(jobs: int, one: CanvasMemory = one) -> float:
            kept = jobs * -(-LENGTH * retention // 1) * 524_288
            tokens = min(jobs * LENGTH, 16384)
            rows = jobs * LENGTH if one.logits.row_cap is None else min(jobs * 32, 1024)
            return kept + tokens * (3 * 12288 + 4 * 4096) * 2 + rows * 126_464 * 18

        assert needs(num) <= one.room < needs(num + 1)
    assert one.room == card_of(card).memory_bytes * 0.8 - LLADA_8B.params * 2 - 0.5e9


def test_wider_logits_of_whole_sequences_leave_room_for_fewer() -> None:
    found = [
        memory(retention=1.0, bytes_each=LOGIT_BYTES[kind], row_cap=None).batch(LENGTH)
        for kind in ("fp64", "fp32", "fp16")
    ]
    assert found == sorted(found) and found[0] < found[2] < memory().batch(LENGTH)
    tiny = dataclasses.replace(CARD, memory_mib=20_000)
    assert dataclasses.replace(memory(), card=tiny).batch(LENGTH) == 0


def test_blocks_are_what_a_batch_leaves() -> None:
    one = sized_for(memory(), LENGTH)
    num, first = one.batch(LENGTH), memory().batch(LENGTH)
    assert one.max_tokens == first * LENGTH and num >= first
    blocks = one.num_blocks(LENGTH, 16)
    assert blocks * 16 >= num * one.rule.num_kept(LENGTH)
    used = blocks * 16 * 524_288 + one.beside_kept(num, LENGTH)
    assert one.room - 16 * 524_288 < used <= one.room


def test_a_step_of_whole_sequences_is_the_rooflines() -> None:
    price, plain = CanvasCost(LLADA_8B, CARD), Roofline(LLADA_8B, CARD)
    pieces = [CanvasPiece("full", 600, 32, 284), CanvasPiece("refresh", 400, 32, 184)]
    want = StepFeatures(1000, 2, 64, 0, 0, 0, 2, 600**2 + 400**2, 1000)
    assert price.seconds(pieces) == plain.seconds(want)
    whole = CanvasCost(LLADA_8B, CARD, has_whole_logits=True)
    assert whole.seconds(pieces) == plain.seconds(want._replace(num_samples=1000))


def test_a_block_reads_what_is_kept_or_computes() -> None:
    """Long contexts are bound by reading, and twice as much kept takes twice as long."""
    price = CanvasCost(LLADA_8B, CARD)

    def seconds(kept: int) -> float:
        return price.seconds([CanvasPiece("reuse", 32, 32, kept)])

    bare = Roofline(LLADA_8B, CARD).seconds(StepFeatures(32, 1, 32))
    read = 524_288 / (CARD.bandwidth * CARD.decode_attention_mbu)
    assert seconds(4000) - bare == pytest.approx(4000 * read, rel=1e-6)
    assert seconds(4000) - seconds(2000) == pytest.approx(2000 * read, rel=1e-6)
    assert bare > LLADA_8B.weight_bytes * 0.9 / CARD.bandwidth
