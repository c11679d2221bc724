"""Repeated launches, told step by step: a Stepped with repeat k and its Completed with steps_run j become j of each.

What a run with single launches would have logged, event for event: the same chunks, digest, outputs and instants. Three
things are the launch's and not the step's, since the log does not hold them for each: `plan`, the id all its steps
share, and `free_blocks` and `why`, as at the launch. Hashes of blocks filled on the way stand in the last step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from penstock.core.events import Completed, Event, Header, Stepped


def _steps(launch: Stepped, end: Completed) -> Iterator[Stepped | Completed]:
    """Stepped and Completed of each run, in time order."""
    num, at = end.steps_run, launch.at
    for i in range(num):
        is_last = i == num - 1
        first = {} if i == 0 else {"admitted": (), "evicted": ()}
        yield replace(launch, at=at, repeat=1, **first)
        at = end.ends[i]
        yield replace(
            end,
            at=end.at if is_last else at,
            steps_run=1,
            ends=(at,),
            outputs=tuple(
                (seq, tokens // num, is_stop and is_last, filled if is_last else ())
                for seq, tokens, is_stop, filled in end.outputs
            ),
            errors=end.errors if is_last else (),
            error=end.error if is_last else None,
        )


def _splice(held: list[Event], launch: Stepped, end: Completed) -> list[Event]:
    """`held` with the launch replaced by its steps, each at its place in time."""
    place = next(i for i, event in enumerate(held) if event is launch)
    after = held[place + 1 :]
    merged: list[Event] = held[:place]
    for step in _steps(launch, end):
        while after and _at(after[0]) < step.at:
            merged.append(after.pop(0))
        merged.append(step)
    return merged + after


def _at(event: Event) -> float:
    return event.loop_at if isinstance(event, Header) else event.at


def expand(events: Iterable[Event]) -> Iterator[Event]:
    """The same log with single steps. Holds back what follows a repeated launch until that launch has ended."""
    held: list[Event] = []
    launches: dict[tuple[str, int], Stepped] = {}
    for event in events:
        if isinstance(event, Completed) and (event.who, event.plan) in launches:
            held = _splice(held, launches.pop((event.who, event.plan)), event)
        else:
            held.append(event)
            if isinstance(event, Stepped) and event.repeat > 1 and event.plan is not None:
                launches[event.who, event.plan] = event
        if not launches:
            yield from held
            held = []
    yield from held
