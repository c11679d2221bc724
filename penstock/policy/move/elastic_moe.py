"""When a replica gets more or fewer devices, as few experts as possible change place.

Source: ElasticMoE (arXiv:2510.02613), section on scaling plans. There is no code; the quota rule is a reconstruction
that keeps to its aim, zero copies for what a device has and the fewest from peers.

Idea: E experts on D' devices give each floor(E / D') of them and one more to E mod D'. A device that stays keeps what
it holds up to its quota; those that hold most get the larger quotas, since they have most to keep. What is above the
quotas, and what leaving devices hold, fills the places that are free. Devices that leave are the last ones.

The number of experts that move is then the least possible for a placement without copies: of any such placement a
device keeps at most its quota, and the larger quotas are where they keep most (held to a solver in the tests).

Parameters: none.

Where we differ: the paper grows by two devices at a time, with tensor parallelism fixed; here any number may come or
go.

Does not: look at loads (move "eplb" does, and nothing is published by it while devices change), or choose the time: see
scale policies.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.move import Decision, Experts, Slots, View


@dataclass(slots=True)
class ElasticMoe:
    def decide(self, view: View) -> Decision:
        asked = view.experts
        if asked is None or len(asked.now) == asked.devices:
            return Decision()
        if asked.devices * asked.room < len(asked.loads):
            return Decision()
        placed = reshape(asked)
        return Decision(
            why=f"{moved(asked.now, placed)} of {len(asked.loads)} experts move from {len(asked.now)} to "
            f"{asked.devices} devices",
            experts=placed,
        )


def reshape(asked: Experts) -> Slots:
    """The experts of each device, each expert once."""
    seen: set[int] = set()
    held: list[list[int]] = []
    for device in asked.now:  # of copies the first counts
        held.append([expert for expert in device if expert not in seen])
        seen.update(device)
    held += [[] for _ in range(asked.devices - len(held))]
    staying, leaving = held[: asked.devices], held[asked.devices :]
    least, more = divmod(len(asked.loads), asked.devices)
    larger = set(sorted(range(asked.devices), key=lambda d: (-len(staying[d]), d))[:more])
    quota = [least + (device in larger) for device in range(asked.devices)]
    homeless = [expert for gone in leaving for expert in gone]
    for kept, size in zip(staying, quota, strict=True):
        homeless += kept[size:]
        del kept[size:]
    homeless += [expert for expert in range(len(asked.loads)) if expert not in seen]
    for kept, size in zip(staying, quota, strict=True):
        count = size - len(kept)
        kept += homeless[:count]
        del homeless[:count]
    return tuple(tuple(kept) for kept in staying)


def moved(before: Slots, after: Slots) -> int:
    """Experts that a device gets and did not hold."""
    return sum(
        expert not in (before[device] if device < len(before) else ())
        for device, experts in enumerate(after)
        for expert in experts
    )
