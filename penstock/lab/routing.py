"""A fleet that computes prompts, under traffic whose prompts begin alike: what routers are compared on.

    figures = routed(Setting(route={"name": "dualmap"}, traffic="conversation", regime="1 s"), rate_per_s=4.5, ...)

Every replica computes one prompt at a time in the order of arrival and answers with one token, by the step times that
DistServe published for OPT-13B on one A100 (cost.linear_five); decodes are left out, so the first token is all there
is. The context of the shape is longer than OPT's, since the prompts are.

    regime      reports at most every    loads also count what was sent since
    fresh       0.01 s                   yes, and what was done since
    1 s, 5 s    1 s, 5 s                 no
    1 s+, 5 s+  1 s, 5 s                 yes, and what was done since

What replicas hold is told with their reports; what was sent is taken to be there at once, in all regimes. A policy that
goes by its router's own count of requests (prefix, ray-prefix, p2c in part) sees the same in all of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from penstock.assemble import Config
from penstock.core.events import Arrived, Event, Finished, Routed
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Prompt, Request, RequestId, Sampling, Slo
from penstock.lab.simulate import simulate
from penstock.lab.trial import STRETCHES, deployment, read_requests
from penstock.net.config import NetConfig
from penstock.traffic import TraceMeta

UNIT = 512  # tokens of a block, here and in Mooncake's traces
REPLICAS = 8
REGIMES: dict[str, tuple[float, bool]] = {  # seconds between reports, whether the fleet counts
    "fresh": (0.01, True),
    "1 s": (1.0, False),
    "5 s": (5.0, False),
    "1 s+": (1.0, True),
    "5 s+": (5.0, True),
}
OPT_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "intermediate_size": 20480,
    "vocab_size": 50272,
    "max_position_embeddings": 32768,
    "torch_dtype": "float16",
}
TOOLS = {
    "hot": 0.378,
    "warm": 0.149,
    "again": 0.25,
}  # shares of calls; the last of those that are neither
HOT_UNITS, WARM_UNITS, LEAST_UNITS, MORE_UNITS = 13, 6, 4, 16


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """`cut`: longest prompt. `blocks`: of one replica's cache. `slo_s`: the promise that is counted."""

    cut: int
    blocks: int
    slo_s: float


TRAFFICS = {
    "conversation": Traffic(cut=20_480, blocks=1953, slo_s=5.0),
    "tools": Traffic(cut=10_240, blocks=977, slo_s=5.0),
    "unshared": Traffic(cut=20_480, blocks=1953, slo_s=1.0),
}


@dataclass(kw_only=True)
class Arrivals:
    """Prompts at a mean rate. `rows`: (instant in any unit, prompt)."""

    rows: Sequence[tuple[float, Prompt]]
    rate_per_s: float
    slo_s: float
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta("prompts", "made", len(self.rows), len(self.rows))

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        first, last = self.rows[0][0], self.rows[-1][0]
        factor = len(self.rows) / self.rate_per_s / (last - first) if last > first else 0.0
        for place, (at, prompt) in enumerate(self.rows):
            yield (
                (at - first) * factor,
                Request(
                    id=RequestId(f"r{place}"),
                    model="default",
                    prompt=prompt,
                    sampling=Sampling(max_tokens=1),
                    slo=Slo(ttft_s=self.slo_s),
                    true_output=1,
                ),
            )


def from_trace(path: Path, num: int, seed: int, cut: int) -> list[tuple[float, Prompt]]:
    """The seed's stretch of a trace, prompts cut to `cut` tokens."""
    known = read_requests(path, 1)
    num = min(num, len(known))
    start = seed % STRETCHES * (len(known) - num) // (STRETCHES - 1)
    rows: list[tuple[float, Prompt]] = []
    for at, request in known[start : start + num]:
        ids = getattr(request.prompt, "hash_ids", ())
        tokens = min(request.prompt.num_tokens, cut)
        rows.append((at, TracedPrompt(tokens, ids[: -(-tokens // UNIT)], UNIT)))
    return rows


def tool_calls(num: int, seed: int, cut: int) -> list[tuple[float, Prompt]]:
    """Agents that call tools: two prompts that very many begin with, and a first block that all share.

    Stands in for Mooncake's tool and agent trace, which is not here, in the shares of its beginnings.
    """
    chance = stream(seed, "lab", "tools")
    fresh, at, earlier = 1000, 0.0, list[tuple[int, ...]]()
    rows: list[tuple[float, Prompt]] = []
    for _ in range(num):
        at += chance.expovariate(1.0)
        point = chance.random()
        begins: tuple[int, ...] = (0,)
        if point < TOOLS["hot"]:
            begins = tuple(range(HOT_UNITS))
        elif point < TOOLS["hot"] + TOOLS["warm"]:
            begins = (0, *range(100, 100 + WARM_UNITS - 1))
        elif earlier and chance.random() < TOOLS["again"]:
            begins = chance.choice(earlier)
        units = LEAST_UNITS + int(chance.expovariate(1 / MORE_UNITS))
        units = max(len(begins) + 1, min(units, cut // UNIT))
        ids = (*begins, *range(fresh, fresh + units - len(begins)))[: cut // UNIT]
        fresh += units
        if len(begins) == 1 or begins in earlier:  # neither hot nor warm
            earlier = [*earlier[-200:], ids]
        rows.append((at, TracedPrompt(len(ids) * UNIT - chance.randrange(UNIT), ids, UNIT)))
    return rows


class FirstTokens:
    """Hears when requests came, where they went and when their first tokens did."""

    def __init__(self) -> None:
        self.came: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.cached = self.asked = self.moved = 0
        self.sent: dict[str, int] = {}

    def emit(self, event: Event) -> None:
        if isinstance(event, Arrived):
            self.came.setdefault(event.request, event.at)
        elif isinstance(event, Routed):
            if event.replica is not None:
                self.sent[event.replica] = self.sent.get(event.replica, 0) + 1
        elif isinstance(event, Finished) and event.first_token_at is not None:
            self.took[event.request] = event.first_token_at - self.came[event.request]
            self.cached += event.num_cached
            self.asked += event.num_prompt
        elif event.kind == "migrated" and event.outcome == "committed":
            self.moved += 1


def deployment_of(
    route: Mapping[str, object], traffic: Traffic, regime: str, folder: Path
) -> Config:
    """Eight replicas that take one prompt after the other. `folder`: where the model's shape is written."""
    model = folder / "opt-13b"  # the name that its step times are published under
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(OPT_13B), encoding="utf-8")
    report_s, counts = REGIMES[regime]
    config = deployment(
        {
            "preset": "vllm-v1",
            "batch": {"name": "prefill-first", "max_jobs": 1},
            "route": dict(route),
        },
        model=str(model),
        replicas=REPLICAS,
        executor={"kind": "modelled", "gpu": "a100-80g", "tables": "distserve"},
        cache__block_size=UNIT,
        cache__num_blocks=traffic.blocks,
        dispatch={"counts": counts, "foresees": counts},
    )
    return dataclasses.replace(config, net=NetConfig(report_s=report_s))


def routed(
    route: Mapping[str, object],
    rows: Sequence[tuple[float, Prompt]],
    *,
    traffic: Traffic,
    regime: str,
    rate_per_s: float,
    warm_up: int,
) -> dict[str, object]:
    """Run it; shares and seconds of the requests behind the first `warm_up`.

    None: so many had no first token that there is no such figure, or nobody was sent anywhere.
    """
    heard = FirstTokens()
    arrivals = Arrivals(rows=rows, rate_per_s=rate_per_s, slo_s=traffic.slo_s)
    with tempfile.TemporaryDirectory() as root:
        config = deployment_of(route, traffic, regime, Path(root))
        simulate(config, arrivals, has_gaps=False, listeners=(heard,))
    names = [f"r{place}" for place in range(warm_up, len(rows))]
    times = sorted(heard.took.get(name, float("inf")) for name in names)
    kept = sum(one <= traffic.slo_s for one in times)
    sent = heard.sent.values()
    return {
        "kept": 100 * kept / len(times),
        "ttft_p50_s": _known(times[len(times) // 2]),
        "ttft_p90_s": _known(times[len(times) * 9 // 10]),
        "hit": 100 * heard.cached / max(1, heard.asked),
        "uneven": max(sent) * REPLICAS / sum(sent) if sent else None,
        "moved": heard.moved,
    }


def _known(seconds: float) -> float | None:
    return None if math.isinf(seconds) else seconds
