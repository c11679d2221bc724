"""The same requests in the simulator: one colocated replica or a pair, with blocks, admission, batches and a router.

What the queues of lab.phases leave out is in here, so the two differ by exactly that: of a pair also the hand-over of
each request behind its first token, for which the decode replica pulls blocks over a link when it has room, as many
wires at once as the end with fewer devices has. Pipelines are not simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from penstock.assemble import load_config
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.highest_rate import Kept
from penstock.lab.placement import Asked, drawn, tail_of
from penstock.lab.simulate import simulate
from penstock.traffic import TraceMeta

PROMPTS_FIRST: dict[str, object] = {
    "preset": "vllm-v1",
    "batch": {"name": "prefill-first", "max_tokens": 1 << 20, "max_jobs": 4096},
}
LINK_BYTES_S = 300e9  # NVLink, one way


@dataclass
class Drawn:
    """Requests as the judge draws them."""

    asked: Asked
    rate_per_s: float
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta("drawn lengths", "drawn", self.asked.num, self.asked.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for place, (at, (prompt, output)) in enumerate(zip(*drawn(self.asked), strict=True)):
            yield (
                at / self.rate_per_s,
                Request(
                    id=RequestId(str(place)),
                    model="default",
                    prompt=TracedPrompt(prompt),
                    sampling=Sampling(max_tokens=output),
                    true_output=output,
                ),
            )


def simulated_tails(
    asked: Asked,
    rate_per_s: float,
    *,
    tables: str,
    tp: int,
    model: str = "opt-13b",
    decode_tp: int | None = None,
    pull_share: float | None = None,
) -> tuple[float, float]:
    """The P90 of TTFT and of TPOT of whole prompts first, which is what the judge's instances do. With a `decode_tp`
    of a pair, whose other half has degree `tp`.
    """
    fleet: dict[str, object] = {
        "name": "default",
        "executor": {
            "kind": "modelled", "gpu": "a100-80g", "tables": tables, "tensor_parallel": tp,
        },
        "cache": {"prefix": False},
        "policy": PROMPTS_FIRST,
    }  # fmt: skip
    if decode_tp is not None:
        fleet |= {"replicas": 2, "roles": {"prefill": 1, "decode": 1}}
        degrees = {"prefill": tp, "decode": decode_tp}
        fleet["hand_off"] = {"degrees": degrees, "pull_share": pull_share}
        fleet["policy"] = {**PROMPTS_FIRST, "route": "least", "route_decode": "least"}
    flags: dict[str, object] = {f"fleet.0.{name}": told for name, told in fleet.items()}
    config = load_config(
        model=model, flags={**flags, "net.latency_s": 1e-4, "net.kv_bytes_per_s": LINK_BYTES_S}
    )
    kept = Kept()
    simulate(config, Drawn(asked, rate_per_s), has_gaps=False, listeners=(kept,))
    return tail_of([first for first, _ in kept.times]), tail_of([gap for _, gap in kept.times])
