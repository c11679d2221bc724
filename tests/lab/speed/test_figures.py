"""From samples to figures, ratios and pages, beside numpy and by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from penstock.cost.shapes import shape_of
from penstock.lab.speed.asks import Sample
from penstock.lab.speed.figures import (
    figure,
    percentile,
    ratio,
    roof_shares,
    time_of,
    token_bytes,
)
from penstock.lab.speed.text import BEGIN, END, placed


def sample(
    engine: str, repeat: int, *, cpu_s: float, wall_s: float = 9.0, **more: object
) -> Sample:
    told: dict[str, object] = {"weights": "bf16", "threads": 1, "measure": "decode", "work": 64.0}
    return Sample(engine=engine, repeat=repeat, cpu_s=cpu_s, wall_s=wall_s, **(told | more))  # type: ignore[arg-type]


def test_percentiles_are_numpys() -> None:
    random = np.random.default_rng(1)
    for count in (1, 2, 3, 20, 101):
        values = list(random.random(count))
        for share in (0.0, 0.05, 0.5, 1.0):
            assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_one_thread_counts_processor_seconds_and_takes_the_median() -> None:
    some = [sample("penstock", at, cpu_s=cpu) for at, cpu in enumerate((2.0, 4.0, 3.2))]
    found = figure(some)
    assert (found.value, found.low, found.high, found.unit) == (20.0, 16.0, 32.0, "tokens/s")


def test_two_threads_count_the_clock_at_the_fifth_percentile() -> None:
    gaps = tuple(np.linspace(0.1, 0.2, 21))
    found = figure([sample("penstock", 0, cpu_s=1.0, threads=2, units_s=gaps)])
    assert found.value == pytest.approx(1 / 0.105)
    waits = [
        sample("penstock", at, cpu_s=1.0, wall_s=wall, threads=2, measure="start", work=1.0)
        for at, wall in enumerate((3.0, 2.0, 4.0))
    ]
    told = figure(waits)
    assert (told.unit, told.value, told.low, told.high) == ("s", pytest.approx(2.1), 2.0, 4.0)
    assert time_of(sample("x", 0, cpu_s=1.0, wall_s=5.0, measure="prefix warm", work=1.0)) == 5.0


def test_a_ratio_above_one_is_better_for_us_whatever_is_measured() -> None:
    ours = [sample("penstock", at, cpu_s=cpu) for at, cpu in enumerate((2.0, 4.0, 3.0))]
    theirs = [sample("peer", at, cpu_s=cpu) for at, cpu in enumerate((4.0, 4.0, 4.5))]
    found = ratio(ours, theirs)
    assert found.value == pytest.approx(4.0 / 3.0)
    assert (found.low, found.high) == (1.0, 2.0)  # within repeats: 2, 1, 1.5
    starts = [dataclasses.replace(one, measure="start", work=1.0) for one in (*ours, *theirs)]
    assert ratio(starts[:3], starts[3:]).value == pytest.approx(4.0 / 3.0)


def test_the_roof_is_what_a_read_of_a_tokens_bytes_takes() -> None:
    # a tenth of a second a token, in one repeat a fifth; 2e10 bytes a second were read when nobody was in the way
    some = [sample("penstock", at, cpu_s=cpu) for at, cpu in enumerate((6.4, 12.8, 6.4))]
    key = (1, "bf16", "decode")
    found = roof_shares(some, {key: {0: 2e10, 1: 1e10, 2: 2e10}}, {"bf16": 1e9})
    assert found["penstock", 1, "bf16"] == pytest.approx((0.5, 0.25, 0.5))


def test_bytes_of_a_token_are_those_of_the_matrices_and_the_context() -> None:
    shape = shape_of("qwen3-0.6b")
    # 28 layers of 1024 x (2 x 16 + 2 x 8) x 128 + 3 x 1024 x 3072, and 151936 x 1024 of the head
    body, head = 28 * (1024 * 48 * 128 + 3 * 1024 * 3072), 151936 * 1024
    context = 2 * 28 * 8 * 128 * 2 * 544
    assert token_bytes(shape, "bf16", 544) == 2 * (body + head) + context
    assert token_bytes(shape, "int4", 544) == body / 2 + head + context


def test_a_section_replaces_what_is_between_its_marks() -> None:
    page = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert placed(page, "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    with pytest.raises(ValueError, match="no lines"):
        placed("a\n", "new")
