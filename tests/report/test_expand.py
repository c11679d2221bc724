"""A log with repeated launches, expanded, is the log of a run that launched every step alone."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec import structs

from penstock.core.events import Completed, Event, Stepped
from penstock.report.expand import expand
from penstock.report.metrics import Metrics
from tests.lab.test_replay import CAPS, made, virtual_log

ALONE = dataclasses.replace(CAPS, max_repeat=1)


def told(events: list[Event]) -> list[Event]:
    """The events with the launch's own facts evened out: its number, and what it says of free blocks."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Stepped):
            found.append(structs.replace(event, plan=0, free_blocks=0, why=""))
        elif isinstance(event, Completed):
            found.append(structs.replace(event, plan=0))
        elif event.kind != "opened":
            found.append(event)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_blocks", [40, 400])
def test_expanded_is_single_steps(seed: int, num_blocks: int) -> None:
    repeated = virtual_log(seed, made(num_blocks))
    single = virtual_log(seed, made(num_blocks, ALONE))
    expanded = told(list(expand(repeated)))
    assert len(repeated) < len(single)
    assert expanded == told(single)


def test_expanding_single_steps_changes_nothing() -> None:
    single = virtual_log(0, made(40, ALONE))
    assert list(expand(single)) == single


def test_figures_do_not_depend_on_launches() -> None:
    repeated = virtual_log(1, made(400))
    one, other = (Metrics().read(log).figures() for log in (repeated, expand(repeated)))
    assert one.num_steps == other.num_steps
    for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s"):
        assert getattr(one.all, name) == getattr(other.all, name)
    assert one.all.itl_s.num == other.all.itl_s.num
    assert one.all.itl_s.mean == pytest.approx(other.all.itl_s.mean)


def test_a_launch_that_never_ended_is_left_as_it_is() -> None:
    log = virtual_log(1, made(400))
    place = next(
        i for i, event in enumerate(log) if isinstance(event, Stepped) and event.repeat > 1
    )
    cut = log[: place + 1]
    assert list(expand(cut))[-1] == log[place]
