"""Questions about documents that many ask about, on replicas with little memory: what the device alone, host memory and
disk behind it, and peers beside it spare of prompts.

    documents    DOCUMENTS of them, some thousand tokens each, asked about as by Zipf's law at Poisson instants: a drawn
                 trace. A question and its answer have the lengths of one of Azure's conversations, cut
    mooncake     requests of the Mooncake conversation trace: hardly a fifth of its prompts was ever there before

Requests go where the fewest prompt tokens wait; a prefix comes from elsewhere where that is quicker than computing it.
"cache-aware" sends them by route "xllm-cache" instead, on devices alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from penstock.assemble import Config, load_config
from penstock.core.events import Event, Finished
from penstock.core.fetching import BlocksBrought
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.simulate import Traffic, simulate
from penstock.lab.trial import Offered
from penstock.traffic import TraceMeta
from penstock.traffic.lengths import Empirical

MODEL, CARD, REPLICAS = "llama-3.1-8b", "a100-80g", 4
BLOCK_SIZE, NUM_BLOCKS = 128, 1000  # of the device: 128,000 positions
RATES = {"documents": 5.0, "mooncake": 0.8}  # a second, in the mean
DOCUMENTS, ZIPF = 150, 0.9
SIZES = (2048, 12_288)  # tokens of a document, each as likely
QUESTION, ANSWER = 400, 200  # at most
MAX_TOKENS = 512
TRACED = 512  # tokens of a run that the prompts of a trace share
GB = 1 << 30
HOST_GB, DISK_GB = 16, 128  # of each replica
KV_BYTES_S, LATENCY_S = 10e9, 2e-4
TIERS: dict[str, object] = {"host_bytes": HOST_GB * GB, "disk_bytes": DISK_GB * GB}
PLACES: dict[str, dict[str, object]] = {
    "device": {},
    "tiers": {"tiers": TIERS},
    "peers": {"peers": {}},
    "tiers and peers": {"tiers": TIERS, "peers": {}},
    "cache-aware": {},
}


def config_of(variant: str) -> Config:
    fleet: dict[str, object] = {
        "name": "default",
        "replicas": REPLICAS,
        "executor": {"kind": "modelled", "gpu": CARD},
        "cache": {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, **PLACES[variant]},
        "policy": {
            "preset": "vllm-v1",
            "batch": {"max_tokens": 2048},
            "route": "xllm-cache" if variant == "cache-aware" else "least-tokens",
            "fetch": "cheaper",
        },
    }
    flags: dict[str, object] = {f"fleet.0.{name}": told for name, told in fleet.items()}
    flags |= {"net.kv_bytes_per_s": KV_BYTES_S, "net.latency_s": LATENCY_S}
    return load_config(model=MODEL, flags=flags)


@dataclass
class Spared:
    """Tokens of prompts that were asked for, and computed; first tokens; what peers brought."""

    asked: int = 0
    computed: int = 0
    ttft_s: list[float] = field(default_factory=list)
    fetches: int = 0
    peer_bytes: int = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, BlocksBrought):
            self.fetches += event.error is None
            self.peer_bytes += event.num_bytes
        elif isinstance(event, Finished) and event.first_token_at is not None:
            self.asked += event.num_prompt
            self.computed += event.num_prompt - event.num_cached
            self.ttft_s.append(event.first_token_at - event.arrived_at)


@dataclass(kw_only=True)
class Documents:
    """`num` questions."""

    conv: Path
    num: int
    seed: int
    rate_per_s: float
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta("questions about documents", "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        rng = stream(self.seed, "documents")
        sizes = [rng.randrange(*SIZES) // TRACED * TRACED for _ in range(DOCUMENTS)]
        weights = [1 / (place + 1) ** ZIPF for place in range(DOCUMENTS)]
        lengths = Empirical(path=self.conv).first(self.num, self.seed).tolist()
        at = 0.0
        for place, (question, answer) in enumerate(lengths):
            at += rng.expovariate(self.rate_per_s)
            (document,) = rng.choices(range(DOCUMENTS), weights)
            runs = sizes[document] // TRACED
            ids = [document * 1000 + run for run in range(runs)] + [10**6 + place]
            output = min(answer, ANSWER)
            yield (
                at,
                Request(
                    id=RequestId(str(place)),
                    model="default",
                    prompt=TracedPrompt(
                        sizes[document] + min(question, QUESTION), tuple(ids), TRACED
                    ),
                    sampling=Sampling(max_tokens=output),
                    true_output=output,
                ),
            )


def tier_play(
    variant: str, traffic: str, *, trace: Path, conv: Path, num: int, seed: int
) -> Mapping[str, object]:
    """Figures of one variant."""
    rate = RATES[traffic]
    offered: Traffic = Documents(conv=conv, num=num, seed=seed, rate_per_s=rate)
    if traffic == "mooncake":
        offered = Offered(trace=trace, num=num, seed=seed, rate_per_s=rate, max_tokens=MAX_TOKENS)
    spared = Spared()
    simulated = simulate(config_of(variant), offered, has_gaps=False, listeners=(spared,))
    times = sorted(spared.ttft_s)
    return {
        "ttft_s": sum(times) / len(times),
        "ttft_p90_s": times[int(0.9 * (len(times) - 1))],
        "computed_tokens": spared.computed,
        "found_share": 1 - spared.computed / spared.asked,
        "fetches": spared.fetches,
        "peer_gb": spared.peer_bytes / 1e9,
        "cost_model": simulated.sources[0].cost_model,
    }
