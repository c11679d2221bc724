"""The part of the configuration about replicas that compute prompts for others that write the answers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class HandOffConfig:
    """`pull_share`: a replica pulls no more while that share of its blocks is held by what it pulled and what has no
    token there yet (engine.joinings; DistServe's is 0.05). None: while it has room.

    `degrees`: devices of one replica by role, say {prefill = 4, decode = 2}, in place of executor.tensor_parallel; of
    modelled replicas only.
    """

    pull_share: float | None = None
    degrees: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pull_share is not None and not 0 < self.pull_share <= 1:
            raise ValueError(f"pull_share must be above 0 and at most 1, got {self.pull_share}")
        for role, degree in self.degrees.items():
            if degree < 1:
                raise ValueError(f"degrees.{role} must be at least 1, got {degree}")
