"""What is always true of runs of blocks, recomputed: for replicas that check themselves, and for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain

from penstock.core.types import BlockHash
from penstock.engine.run import IdleRuns, Run


def check_tables(
    tables: dict[int, list[int]], registered: dict[int, int], free: list[int], total: int
) -> None:
    """Every block is held or free; only blocks that have a name are held by several jobs."""
    held: set[int] = set()
    own: list[int] = []
    for seq, table in tables.items():
        assert len(set(table)) == len(table), "a job holds a block twice"
        held.update(table)
        own += table[registered.get(seq, 0) :]
    assert len(set(own)) == len(own), "two jobs hold a block that has no name"
    assert len(set(free)) == len(free), "a block is free twice"
    assert held.isdisjoint(free), "a held block is free"
    assert len(held) + len(free) == total, "a block is lost"


def holders_of(
    tables: dict[int, list[int]],
    registered: dict[int, int],
    last: dict[int, Run],
    runs_of: Callable[[int], list[Run]],
) -> Counter[Run]:
    """How many jobs hold each run. The named blocks of a job are those of its runs, one behind the other."""
    refs: Counter[Run] = Counter()
    for seq, table in tables.items():
        runs, named = runs_of(seq), registered.get(seq, 0)
        assert table[:named] == list(chain.from_iterable(run.blocks for run in runs))
        assert last.get(seq) is (runs[-1] if runs else None), "a job's last run"
        refs.update(runs)
    return refs


def check_runs(refs: Counter[Run], idle: IdleRuns, starts: dict[int, Run]) -> None:
    """Each run is found by its first block and has as many holders as it says; `refs`: those that jobs hold."""
    runs = {*refs, *idle}
    assert starts == {run.blocks[0]: run for run in runs}, "a run is lost"
    blocks = list(chain.from_iterable(run.blocks for run in runs))
    assert len(set(blocks)) == len(blocks), "two runs share a block"
    for run in runs:
        assert run.refs == refs[run], "reference counts differ from the block tables"
        assert len(run.hashes()) in (0, len(run.blocks)), "a run is named in part"
    for run in idle:
        assert run.names, "an idle block has no name"


def check_names(
    runs: set[Run], index: dict[BlockHash, Run], twins: dict[BlockHash, list[Run]]
) -> None:
    """What is found by its first name is there under that name, and its copies are as long."""
    for first, run in index.items():
        assert run in runs and run.first == first, "the index names a stranger"
    for first, copies in twins.items():
        assert copies, "an empty list of copies"
        for copy in copies:
            assert copy in runs and copy.hashes() == index[first].hashes(), "copies differ"
