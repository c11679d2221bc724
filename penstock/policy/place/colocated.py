"""One plan for both phases, the way engines are deployed by default: the baseline of disaggregation.

Source: the baseline of DistServe (OSDI 2024): every tensor and pipeline parallel degree of vLLM's, the best one kept.

Idea: ask the judge for the highest rate a device of every valid instance, and take the best; of equals, that with the
fewest devices. With `chunk` the instance cuts prompts into steps of that many tokens and decodes beside them, which is
how engines have kept the phases apart since; without, prompts come first and whole.

Parameters
    chunk        tokens of a step, default none: whole prompts first
    tolerance    requests a second and device at which halving the rates ends, default 0.05

Where we differ: nothing that matters; an instance stays on one node where links are slow.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.place import Decision, Unit, View, Way, best_of, replicas, try_out


@dataclass(slots=True)
class Colocated:
    chunk: int | None = None
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")

    def decide(self, view: View) -> Decision:
        site = view.site
        tried = []
        for instance in view.model.instances(
            site.devices if site.has_fast_links else site.devices_per_node
        ):
            way: Way = "colocated" if self.chunk is None else "chunked"
            unit = Unit(way=way, parallel=instance, chunk=self.chunk)
            tried.append(try_out(view, unit, self.tolerance))
        best = best_of(tried)
        if best is None:
            return Decision(None, tuple(tried), "no instance keeps the promises")
        why = f"{best.per_device:.2f}/s a device, the best instance"
        return Decision(replicas(view, best), tuple(tried), why)
