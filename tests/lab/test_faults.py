"""The fleet under faults: 200 seeds in every run of the tests, 10,000 at night; and that a seed is one run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from penstock.lab.faults import Ran, run_seed, table_of
from penstock.sim.faults import KINDS

NUM_SEEDS, NUM_PARTS = 200, 8


def check(seeds: range, kinds: Sequence[str] = KINDS) -> list[Ran]:
    found = [run_seed(seed, kinds) for seed in seeds]
    broken = [
        f"penstock bench faults --first {ran.seed} --seeds 1\n    {ran.broken}: {ran.told}"
        for ran in found
        if ran.broken
    ]
    assert not broken, "replay with:\n" + "\n".join(broken)
    return found


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_nothing_is_lost_doubled_or_leaked_whatever_goes_wrong(part: int) -> None:
    size = NUM_SEEDS // NUM_PARTS
    found = check(range(part * size, (part + 1) * size))
    assert sum(row.answered for row in table_of(found)) > 5 * size, "most requests are answered"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(98))
def test_ten_thousand_seeds(part: int) -> None:
    check(range(NUM_SEEDS + part * 100, NUM_SEEDS + (part + 1) * 100))


def test_a_seed_is_one_run_and_every_kind_of_fault_has_its_turn() -> None:
    found = [run_seed(seed) for seed in range(len(KINDS))]
    assert [ran.about for ran in found] == list(KINDS)
    assert found == [run_seed(seed) for seed in range(len(KINDS))]


@pytest.mark.parametrize(
    ("seed", "num_kinds"),  # that there were then
    [
        (1229, 16),  # a stage of a movement offered blocks that the same step was still computing
        (10515, 16),  # a copy that had waited read the memory of its source's successor
        (11904, 16),  # the same, of memory that nobody had written yet
        (11182, 16),  # one replica that drained was told as the reason, where all others were full
        (24969, 17),  # a request that was moved by its words alone went on when that was called off
        (21775, 17),  # a drain that was called off went on waiting for its replica
    ],
)
def test_seeds_that_broke(seed: int, num_kinds: int) -> None:
    ran = run_seed(seed, KINDS[:num_kinds])
    assert ran.broken is None, ran.told
