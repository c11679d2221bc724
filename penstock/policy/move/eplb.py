"""Experts that much is asked of get copies, and all are dealt out so that every device has as much to do.

Source: xLLM (jd-opensource/xllm, EPLB of the engine; report arXiv:2510.14686): greedy replicas, greedy placement, slots
that need not change keep their place, and a new placement only where it pays.

Idea: of E experts on D devices with room for E / D + R each, D * R copies are given one by one to the expert whose
load a copy relieves most, load / (copies * (copies + 1)); then all copies go, the heaviest first, to the device with
the least load that has room and not this expert yet. A copy that was on a device stays there if the device gets that
expert anyway. The new placement is taken when the fullest device has at least `gain` less to do than now.

Parameters: `gain` (share of the peak load), `every_s` between two looks (xLLM's flag: 1,000 s).

Where we differ: where the last copy finds no device that has room and not the expert yet, one that lies elsewhere
changes with it (the released code takes any slot in turn, which may put two copies of one expert on a device and lose
the use of a slot).

Does not: know when an expert was read together with another, or move anything: whoever holds the weights loads copies
beside those in use and changes over when all devices have theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.policy.move import Decision, Experts, Slots, View


@dataclass(slots=True)
class Eplb:
    gain: float = 0.05
    every_s: float = 1000.0

    def __post_init__(self) -> None:
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain must be a share from 0 up and below 1, got {self.gain}")
        if not self.every_s > 0:
            raise ValueError(f"every_s must be a positive number of seconds, got {self.every_s}")

    def decide(self, view: View) -> Decision:
        asked = view.experts
        if asked is None or asked.devices * asked.room < len(asked.loads):
            return Decision()
        placed = deal(asked)
        new, old = peak(asked.loads, placed), peak(asked.loads, asked.now)
        is_whole = len(asked.now) == asked.devices  # otherwise it must change anyway
        if is_whole and not new < old * (1 - self.gain):
            return Decision()
        return Decision(why=f"peak load {new:.0f} for {old:.0f}", experts=placed)


def copies(loads: Sequence[float], devices: int, room: int) -> list[int]:
    """How many of each expert there are to be, at most one on a device."""
    found = [1] * len(loads)
    for _ in range(devices * room - len(loads)):
        able = [expert for expert, count in enumerate(found) if count < devices]
        if not able:
            break
        best = max(able, key=lambda e: (loads[e] / (found[e] * (found[e] + 1)), -e))
        found[best] += 1
    return found


def deal(asked: Experts) -> Slots:
    """The experts of each device, those that stay in their slots."""
    counts = copies(asked.loads, asked.devices, asked.room)
    share = [load / count for load, count in zip(asked.loads, counts, strict=True)]
    order = sorted(range(len(counts)), key=lambda expert: (-share[expert], expert))
    held: list[list[int]] = [[] for _ in range(asked.devices)]
    weight = [0.0] * asked.devices
    for expert in [each for each in order for _ in range(counts[each])]:
        able = [
            d for d in range(asked.devices) if len(held[d]) < asked.room and expert not in held[d]
        ]
        if able:
            device = min(able, key=lambda d: (weight[d], d))
        else:
            device = _make_room(held, weight, share, expert, asked.room)
        held[device].append(expert)
        weight[device] += share[expert]
    return tuple(
        keep(asked.now[device] if device < len(asked.now) else (), experts)
        for device, experts in enumerate(held)
    )


def _make_room(
    held: list[list[int]], weight: list[float], share: list[float], expert: int, room: int
) -> int:
    """A device without the expert gives one of its own to the device that has room; its number."""
    (open_one, *_) = (d for d in range(len(held)) if len(held[d]) < room)
    for device in sorted(range(len(held)), key=lambda d: weight[d]):
        movable = [e for e in held[device] if e not in held[open_one]]
        if expert not in held[device] and movable:
            given = min(movable, key=lambda e: share[e])
            held[device].remove(given)
            held[open_one].append(given)
            weight[device] -= share[given]
            weight[open_one] += share[given]
            return device
    raise AssertionError("no device can take the expert")


def keep(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """`after` in an order that leaves those of `before` in their slots."""
    left = [expert for expert in after if expert not in before]
    kept: list[int | None] = [expert if expert in after else None for expert in before]
    kept += [None] * (len(after) - len(kept))
    filled = [left.pop(0) if expert is None and left else expert for expert in kept]
    return tuple(expert for expert in filled if expert is not None)


def peak(loads: Sequence[float], slots: Slots) -> float:
    """What the fullest device has to do, the rows of an expert split evenly among its copies."""
    counts = [0] * len(loads)
    for device in slots:
        for expert in device:
            counts[expert] += 1
    return max(
        (sum(loads[expert] / counts[expert] for expert in device) for device in slots), default=0.0
    )
