"""Agent programs: chains and graphs of calls with tools at work between them.

    [programs]                       shape = "chain": each call after the one before, as in a tool loop
    shape = "fan_out"                a planner, `width` workers that read its answer, one call that reads theirs
    shape = "dag"                    as listed:
    [[programs.call]]
    name = "plan"
    [[programs.call]]
    name = "search"
    after = ["plan"]
    wait_s = {kind = "exponential", mean = 2.0}

A call begins when all calls that it comes `after` have ended, and `wait_s` (a tool at work) later. Its prompt is the
content of the call it is `on` (its prompt and answer; the first of `after` unless told), the answers of the others it
comes after, and new tokens. With `context = "fresh"` every call has a prompt of its own that shares the program's
opening only. Lengths that a call does not state are drawn from `[lengths]`: what is new in the prompt, and the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.traffic.draws import Draw, Drawn, draw_of, whole
from penstock.traffic.prefix import Chain
from penstock.traffic.rows import Row, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramCall:
    """One call of a graph. `prompt`: its new tokens."""

    name: str
    after: tuple[str, ...] = ()
    on: str | None = None
    prompt: Drawn | None = None
    output: Drawn | None = None
    wait_s: Drawn = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """`calls`: of a chain. `width`: of a fan-out. `wait_s`: before every call of these two but the first."""

    shape: Literal["chain", "fan_out", "dag"] = "chain"
    context: Literal["grows", "fresh"] = "grows"
    calls: Drawn = 4.0
    width: Drawn = 3.0
    wait_s: Drawn = 1.0
    call: tuple[ProgramCall, ...] = ()

    def __post_init__(self) -> None:
        if (self.shape == "dag") != bool(self.call):
            raise ValueError('shape = "dag" goes with [[programs.call]], and other shapes without')
        known: set[str] = set()
        for call in self.call:
            missing = [name for name in call.after if name not in known]
            if missing:
                raise ValueError(
                    f"call {call.name!r} waits for {missing[0]!r}, which is not listed before it"
                )
            if call.on is not None and call.on not in call.after:
                raise ValueError(
                    f"call {call.name!r} builds on {call.on!r} but does not wait for it"
                )
            if call.name in known:
                raise ValueError(f"two calls are named {call.name!r}")
            known.add(call.name)


@dataclass(frozen=True, slots=True)
class Node:
    """One call to be: the places of those it waits for, the first of which it builds on. None: from [lengths]."""

    after: tuple[int, ...] = ()
    wait_s: Draw | None = None
    prompt: Draw | None = None
    output: Draw | None = None


class Graphs:
    """Draws the calls of programs."""

    def __init__(self, programs: Programs, where: str) -> None:
        self._programs = programs
        self._count = draw_of(programs.calls, f"{where}.calls")
        self._width = draw_of(programs.width, f"{where}.width")
        self._wait_s = draw_of(programs.wait_s, f"{where}.wait_s")
        self._listed = _listed(programs.call, where)

    def steps(
        self, first: Row, opening: Chain, lengths: Iterator[tuple[int, int]], chance: random.Random
    ) -> tuple[Step, ...]:
        """The program whose first call has the lengths of `first`; all prompts begin with `opening`.

        `first.session` names the program.
        """
        steps: list[Step] = []
        contents: list[Chain] = []  # prompt and answer of each call
        own = first.num_prompt - opening.num_tokens
        for place, node in enumerate(self._nodes(chance)):
            drawn = next(lengths) if place else (own, first.num_output)
            new, output = _lengths(node, drawn, chance)
            asked = self._context(node, opening, contents, steps, f"{first.session}/")
            asked = asked.extend(f"{first.session}/{place}", new)
            row = first._replace(num_prompt=asked.num_tokens, num_output=output, hash_ids=asked.ids)
            wait_s = 0.0 if node.wait_s is None else node.wait_s.draw(chance)
            steps.append(Step(row, node.after, wait_s))
            contents.append(asked.extend(f"{first.session}/{place}+", output))
        return tuple(steps)

    def _nodes(self, chance: random.Random) -> Sequence[Node]:
        if self._programs.shape == "dag":
            return self._listed
        if self._programs.shape == "chain":
            rest = range(whole(self._count, chance) - 1)
            return [Node(), *(Node((place,), self._wait_s) for place in rest)]
        width = whole(self._width, chance)
        workers = [Node((0,), self._wait_s) for _ in range(width)]
        return [Node(), *workers, Node(tuple(range(width + 1)), self._wait_s)]

    def _context(
        self,
        node: Node,
        opening: Chain,
        contents: Sequence[Chain],
        steps: Sequence[Step],
        stem: str,
    ) -> Chain:
        """What the prompt holds before its new tokens."""
        if not node.after or self._programs.context == "fresh":
            return opening
        chain = contents[node.after[0]]
        for place in node.after[1:]:
            chain = chain.extend(f"{stem}{place}+", steps[place].row.num_output)
        return chain


def _lengths(node: Node, drawn: tuple[int, int], chance: random.Random) -> tuple[int, int]:
    """(new tokens of the prompt, tokens of the answer): what the call states, else what was drawn for it."""
    new, output = drawn
    if node.prompt is not None:
        new = whole(node.prompt, chance)
    if node.output is not None:
        output = whole(node.output, chance)
    return new, output


def _listed(calls: Sequence[ProgramCall], where: str) -> list[Node]:
    places = {call.name: place for place, call in enumerate(calls)}
    nodes = []
    for call in calls:
        after = [places[name] for name in call.after]
        if call.on is not None:
            after.sort(key=lambda place: place != places[call.on or ""])
        at = f"{where}.call.{call.name}"
        nodes.append(
            Node(
                tuple(after),
                draw_of(call.wait_s, f"{at}.wait_s"),
                None if call.prompt is None else draw_of(call.prompt, f"{at}.prompt"),
                None if call.output is None else draw_of(call.output, f"{at}.output"),
            )
        )
    return nodes
