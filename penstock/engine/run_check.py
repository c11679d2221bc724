"""What is always true of runs of blocks, recomputed: for replicas that check themselves, and for tests."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from penstock.core.types import BlockHash
from penstock.engine.run import IdleRuns, Run


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
