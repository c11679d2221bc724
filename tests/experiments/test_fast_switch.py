"""FastSwitch's experiment: what its listener counts, on events written by hand, and a small run of it."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.events import Completed, Finished, Transferred
from penstock.core.types import Slo
from penstock.experiments.fast_switch import BLOCK, EXPERIMENT, SWAPS, Books, work
from penstock.lab.experiment import Row, Scale, check_plan


def completed(ends: tuple[float, ...], *outputs: tuple[int, int]) -> Completed:
    told = tuple((seq, tokens, False, ()) for seq, tokens in outputs)
    return Completed(at=ends[-1], who="r", plan=0, steps_run=len(ends), ends=ends, outputs=told)


def test_gaps_run_from_token_to_token_of_one_job() -> None:
    books = Books()
    books.emit(completed((1.0,), (0, 1)))
    books.emit(completed((2.0, 2.5, 3.5), (0, 3), (1, 3)))
    books.emit(completed((9.0,), (1, 1)))
    assert sorted(books.gaps_s) == [0.5, 0.5, 1.0, 1.0, 1.0, 5.5]
    books.emit(
        Transferred(at=1.0, who="r", transfer=0, seq=0, is_out=True, num_blocks=7, num_runs=2)
    )
    assert (books.num_blocks, books.num_runs) == (7, 2)
    finished: dict[str, Any] = {
        "at": 5.0, "who": "r", "request": "a", "answer": 0, "reason": "stop", "arrived_at": 0.5,
        "admitted_at": 0.5, "first_token_at": 2.0, "last_token_at": 5.0, "num_prompt": 1,
        "num_cached": 0, "num_output": 3, "num_preemptions": 0, "tenant": "t", "priority": 0,
        "slo": Slo(),
    }  # fmt: skip
    books.emit(Finished(**finished))
    assert list(books.first_s) == [1.5]


def test_a_small_run_and_its_verdict() -> None:
    scale = Scale(num_seeds=1)
    settings = [
        {**one, "num": 100, "rate": 8.0}
        for one in EXPERIMENT.plan(scale, {})
        if one["variant"] in SWAPS
    ]
    check_plan(EXPERIMENT, settings, scale)
    rows = [Row(settings=one, figures=work(one, scale)) for one in settings]
    by_name = {str(row.get("variant")): row for row in rows}
    assert len({row.get("finished") for row in rows}) == 1
    assert by_name["recompute"].number("moved_gb") == 0.0
    moved = {name: by_name[name].number("moved_gb") for name in SWAPS}
    assert moved["per block"] > 0 and moved["reuse"] < 0.8 * moved["groups"]
    per_block = by_name["per block"]
    kv_bytes = 131072  # of a position of Llama 3.1 8B: 2 x 32 layers x 8 heads x 128 x 2 bytes
    assert per_block.number("num_runs") * BLOCK * kv_bytes == pytest.approx(
        1e9 * per_block.number("moved_gb")
    )
    assert EXPERIMENT.judge(rows).why
