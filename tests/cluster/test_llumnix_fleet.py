"""A fleet whose running requests move when memory ends, in virtual time: nothing is lost, and it is replayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.assemble import load_config
from penstock.core.events import Steered
from penstock.core.moving import Migrated
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.replay import replay_log
from penstock.lab.simulate import simulate
from penstock.report.log import LogReader
from penstock.traffic import TraceMeta

FLEET = """
is_checked = true
seed = {seed}
[net]
latency_s = 1e-4
kv_bytes_per_s = 1e9
[[fleet]]
model = "llama-3.1-8b"
name = "default"
replicas = 3
executor = {{kind = "modelled", gpu = "l4"}}
cache = {{num_blocks = 60, prefix = false}}
policy = {{route = "round-robin", move = {{name = "llumnix", urgent_blocks = 52}}}}
moves = {{slots = 2, cooldown_s = 0.2}}
"""


class Crowd:
    """Answers of very different lengths, so that memory ends in one place and not in another."""

    meta = TraceMeta("crowd", "made here")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __iter__(self):  # type: ignore[no-untyped-def]
        chance = stream(self._seed, "crowd")
        for number in range(40):
            output = chance.choice((5, 40, 300, 500))
            yield (
                number * 0.02,
                Request(
                    id=RequestId(f"r{number}"),
                    model="default",
                    prompt=TracedPrompt(chance.randrange(20, 120)),
                    sampling=Sampling(max_tokens=output, ignore_eos=True),
                    priority=chance.choice((-1, 0, 0, 0)),
                    true_output=output,
                ),
            )


@pytest.mark.parametrize(
    "seed", (6, 10, 12, 20, 23)
)  # some in which a job came while another one's steps were repeated
def test_requests_move_when_memory_ends_and_all_are_answered(tmp_path: Path, seed: int) -> None:
    path, log = tmp_path / "fleet.toml", tmp_path / "log.jsonl"
    path.write_text(FLEET.format(seed=seed))
    outcome = simulate(load_config(path), Crowd(seed), log_path=log)
    assert outcome.played.num_served == 40 and not outcome.played.errors
    events = list(LogReader(log))
    moved = [event for event in events if isinstance(event, Migrated)]
    assert sum(event.outcome == "committed" for event in moved) >= 2
    asked = [row for event in events if isinstance(event, Steered) for row in event.moves]
    assert len(asked) == len(moved)
    for each in replay_log(log):
        assert each.difference is None
