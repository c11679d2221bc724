"""The tree of prefixes takes the walks that SGLang's took, and holds the same after each of them.

Recorded from SGLang itself (tests/engine/sglang_walks.py): the same prefixes are found and kept, cut into as many
nodes, and as many pages stay free, under every order of eviction, with pages of one position and of four.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.prompt import TokenPrompt
from penstock.core.types import Job, Request, RequestId
from penstock.engine.radix import RadixLedger
from penstock.policy.evict.leaves import Leaves
from tests.engine.sglang_walks import STRATEGIES, digest

WALKS = json.loads((Path(__file__).parents[2] / "data/sglang_radix_walks.json").read_text())
KEY = b"key"


class Ours:
    def __init__(self, num_blocks: int, size: int, by: Any) -> None:
        self.ledger, self.size = RadixLedger(num_blocks, size), size
        if by != "lru":  # which is what the ledger does by itself
            assert self.ledger.keeps_order(Leaves(by).rank)
        self.jobs: dict[int, Job] = {}
        self.ids: dict[int, list[int]] = {}
        self.names: dict[bytes, tuple[str, tuple[int, ...]]] = {}

    def start(self, seq: int, ids: list[int], salt: str, priority: int) -> int:
        prompt = TokenPrompt(ids, key=KEY, salt=salt)
        job = Job(
            seq=seq,
            request=Request(id=RequestId(str(seq)), model="m", prompt=prompt),
            answer=0,
            arrived_at=0.0,
            hashes=[],
            num_prompt=len(ids),
            max_tokens=100,
            priority=-priority,
        )
        self.jobs[seq], self.ids[seq] = job, list(ids)
        self._name(job)
        job.computed = self.ledger.adopt(job)
        return job.computed

    def _name(self, job: Job) -> None:
        ids, prompt = self.ids[job.seq], job.request.prompt
        assert isinstance(prompt, TokenPrompt)
        job.hashes += prompt.extend(job.hashes, ids, self.size)
        for place, name in enumerate(job.hashes):
            self.names[name] = (prompt.salt, tuple(ids[: (place + 1) * self.size]))

    def chunk(self, seq: int, upto: int) -> None:
        job = self.jobs[seq]
        self.ledger.extend(job, upto)
        job.computed = upto
        self.ledger.register(job, upto)
        if upto == job.known:
            self._append(job, 0)

    def write(self, seq: int, token: int) -> None:
        job = self.jobs[seq]
        self.ledger.extend(job, job.computed + 1)
        job.computed += 1
        self.ledger.register(job, job.computed)
        self._append(job, token)

    def _append(self, job: Job, token: int) -> None:
        self.ids[job.seq].append(token)
        job.num_output += 1
        self._name(job)

    def finish(self, seq: int) -> None:
        job = self.jobs.pop(seq)
        self.ledger.release(job, job.computed)

    def state(self) -> list[Any]:
        self.ledger.check()
        nodes = list(self.ledger.root.down())[:-1]
        names = [name for node in nodes for name in node.hashes()]
        return [self.ledger.free, len(nodes), digest(self.names[name] for name in names)]


@pytest.mark.parametrize("by", STRATEGIES)
def test_the_tree_is_sglangs(by: str) -> None:
    walks = [walk for walk in WALKS if walk["by"] == by]
    assert len(walks) >= 4
    for walk in walks:
        ours = Ours(walk["num_blocks"], walk["size"], by)
        for place, ((deed, *told), state) in enumerate(walk["deeds"]):
            if deed == "start":
                *told, matched = told
                assert ours.start(*told) == matched, f"deed {place}"
            else:
                getattr(ours, deed)(*told)
            assert ours.state() == state, f"deed {place}: {deed} {told}"
