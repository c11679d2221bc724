"""Repeated steps in one lane while another lane plans: the blocks of steps that have passed are taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from penstock.assemble import load_config
from penstock.core.events import Event, Finished, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.replay import replay
from penstock.lab.simulate import simulate
from penstock.traffic import TraceMeta


@dataclass
class LongAndLate:
    """An answer of 300 tokens; while it is written a prompt of 330 comes, and another of 200."""

    late_s: float
    meta: TraceMeta = field(default_factory=lambda: TraceMeta("made", "made"))

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for name, at, prompt, output in (
            ("long", 0.0, 16, 300),
            ("late", self.late_s, 330, 20),
            ("later", self.late_s + 0.4, 200, 30),
        ):
            self.meta.last_at_s = at
            yield (
                at,
                Request(
                    id=RequestId(name),
                    model="llama-3.1-8b",
                    prompt=TracedPrompt(prompt),
                    sampling=Sampling(max_tokens=output),
                    true_output=output,
                ),
            )


@dataclass
class Heard:
    events: list[Event] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        self.events.append(event)


@pytest.mark.parametrize("late_s", [0.3, 2.0])
def test_another_lane_does_not_take_what_passed_steps_have_taken(
    late_s: float, tmp_path: Path
) -> None:
    sets = [
        "fleet.0.model=llama-3.1-8b",
        "fleet.0.executor.gpu=a100-80g",
        "fleet.0.policy.preset=semi-pd",
        "fleet.0.cache.num_blocks=30",
        'fleet.0.policy.batch={name="semi-pd", init_ratio=0.05}',  # admits what running ones will want
    ]
    heard, log = Heard(), tmp_path / "log.jsonl"
    found = simulate(load_config(sets=sets), LongAndLate(late_s), listeners=(heard,), log_path=log)
    ended = [event for event in heard.events if isinstance(event, Finished)]
    assert found.figures.all.num_finished == 3
    assert [event.num_output for event in sorted(ended, key=lambda e: e.request)] == [20, 30, 300]
    steps = [event for event in heard.events if isinstance(event, Stepped)]
    assert any(step.repeat > 1 for step in steps)
    assert {step.lane for step in steps} == ({0, 1} if late_s < 1 else {0})
    assert all(outcome.difference is None for outcome in replay(log))
