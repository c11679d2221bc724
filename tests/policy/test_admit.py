"""Admission: the whole known sequence must fit now, and one that may outgrow the memory is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.core.types import Job
from penstock.policy import admit, find
from tests.laws.model_ledger import ModelLedger
from tests.laws.views import HalfLengths
from tests.policy.world import make_job


def answer(
    name: str, job: Job, ledger: ModelLedger, *, runs: bool = True, **parameters: Any
) -> str:
    fork = ledger.fork()
    running = (make_job(99, 3, computed=2),) if runs else ()
    view = admit.View(0.0, random.Random(0), job, 1, fork, running, HalfLengths())
    decision = find("admit", name)(**parameters).decide(view)
    admit.law(view, decision)
    return str(decision.answer)


def filled(total: int, held: int) -> ModelLedger:
    ledger = ModelLedger(total, 4)
    assert ledger.reserve(make_job(98, 4 * held), 4 * held)
    return ledger


@pytest.mark.parametrize("name", ["full-fit", "watermark"])
def test_all_known_positions_must_fit_although_one_would_run(name: str) -> None:
    assert answer(name, make_job(0, 16, max_tokens=5), filled(10, 6), runs=False) == "yes"
    assert answer(name, make_job(0, 17, max_tokens=5), filled(10, 6), runs=False) == "later"


@pytest.mark.parametrize("name", ["full-fit", "watermark"])
@pytest.mark.parametrize(("prompt", "output"), [(20, 0), (20, 15)])
def test_refusal_depends_on_what_never_changes(name: str, prompt: int, output: int) -> None:
    """40 positions. The last token's KV is never written, so 20 + 21 tokens fit and 20 + 22 do not."""
    fits, exceeds = (make_job(0, prompt, output=output, max_tokens=most) for most in (21, 22))
    assert answer(name, fits, ModelLedger(10, 4), runs=False) == "yes"
    assert answer(name, exceeds, ModelLedger(10, 4), runs=False) == "no"


def test_adopted_prefix_counts_only_where_it_leaves_free_memory() -> None:
    """9 positions with two blocks cached: all 3 blocks while nobody holds the prefix, 1 when somebody does."""
    blocks = [b"one", b"two"]
    ledger = ModelLedger(6, 4)
    holder = make_job(1, 9, hashes=blocks)
    assert ledger.reserve(holder, 8)
    holder.computed = 8
    assert ledger.reserve(make_job(2, 12), 12) and ledger.free == 1
    job = make_job(0, 9, max_tokens=2, hashes=blocks)
    assert answer("full-fit", job, ledger) == "yes"
    ledger.release(holder)
    assert ledger.free == 3 and answer("full-fit", job, ledger) == "yes"
    assert ledger.reserve(make_job(3, 1), 1) and answer("full-fit", job, ledger) == "later"


def test_watermark_keeps_a_share_free_unless_nothing_runs() -> None:
    ledger, job = filled(100, 90), make_job(0, 36, max_tokens=5)  # needs 9 of 10
    assert answer("full-fit", job, ledger) == "yes"
    assert answer("watermark", job, ledger) == "yes"  # 1 % is one block
    assert answer("watermark", job, ledger, fraction=0.02) == "later"
    assert answer("watermark", job, ledger, fraction=0.02, runs=False) == "yes"
    with pytest.raises(ValueError, match="fraction"):
        find("admit", "watermark")(fraction=1.0)


@pytest.mark.parametrize(("ahead", "expected"), [(None, "later"), (8, "yes"), (20, "later")])
def test_looking_ahead_counts_only_so_many_tokens_of_each(ahead: int | None, expected: str) -> None:
    """40 positions; two prompts of 8 with answers of up to 20: 56 in the end, and 32 when both have written 8."""
    ledger = ModelLedger(10, 4)
    first, second = (make_job(seq, 8, max_tokens=20) for seq in (1, 2))
    assert ledger.reserve(first, 8)
    first.computed = 7
    view = admit.View(0.0, random.Random(0), second, 1, ledger.fork(), (first,), HalfLengths())
    decision = find("admit", "conservative")(ahead_tokens=ahead).decide(view)
    admit.law(view, decision)
    assert decision.answer == expected
