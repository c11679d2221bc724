"""One run of the fault injector as drawn from its seed: the fleet, its traffic, and what goes wrong when.

Seeds take turns with the kinds of faults (`seed mod number of kinds` is the one that a run is about), and every other
run has one or two more. Fleets are tiny, with memory for a few answers, so that queues, preemptions and shared prefixes
happen all the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from penstock import policy
from penstock.assemble.cache_config import CacheConfig
from penstock.assemble.config import Config, FleetConfig
from penstock.cluster.movement import MoveBounds
from penstock.cluster.spec import ExecutorSpec
from penstock.core.config import Table
from penstock.core.prompt import TokenPrompt
from penstock.core.rng import Stream, stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.engine.peers import PeersConfig
from penstock.engine.swap import Store, SwapConfig
from penstock.engine.tier_config import TiersConfig
from penstock.net.config import NetConfig
from penstock.sim.channel import Link
from penstock.sim.faults import KINDS, Fault, draw_faults
from penstock.sim.speech import VOCABULARY

MODEL = "llama-2-7b"
CARD = "a100-80g"
BYTES_A_TOKEN = 1 << 19  # of its keys and values
ARRIVING_S = 1.0
FAULTY_S = 1.3
MOVING = frozenset({"move", "wire"})  # requests of one answer can
LONG = 200  # tokens of an answer for which nobody waits to the end
ROUTES = (
    "round-robin",
    "least",
    "p2c",
    "prefix",
    "on-demand",
    "prefix-hash",
    "session",
    "deepest-prefix",
    "kv-aware",
    "llm-d",
    "dynamo",
    "mooncake",
    "ray-prefix",
    "preble",
    "affinity",
    "least-tokens",
    "dualmap",
    "llumnix",
    "xllm",
)
LATER = tuple([name for name in policy.TABLE["route"] if name not in ROUTES])
BLOCK_SIZES = (4, 8, 16)
Mood = Literal["patient", "leaves", "raises", "leaves-inside", "asks-inside", "ends-others"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a caller. `every_token` False: only the end is told. `leaves_at`: when it is cancelled."""

    at: float
    request: Request
    every_token: bool
    mood: Mood
    is_task: bool  # waits in a task, else is called back
    leaves_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`outlives`: replicas go on when their connection is lost, and are adopted again; else they end with it."""

    seed: int
    about: str
    kinds: tuple[str, ...]
    config: Config
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    outlives: bool
    beats: bool  # replicas speak so often that silence means something
    moves: MoveBounds
    kv_link: Link
    queue_limit: int
    copies: bool  # messages go through the codec, as between processes


def draw_case(seed: int, kinds: Sequence[str] = KINDS) -> Case:
    """The run of a seed. `kinds`: those that may happen."""
    rng = stream(seed, "faults")
    about = kinds[seed % len(kinds)]
    more = rng.sample(kinds, min(len(kinds), rng.choice((0, 0, 1, 2))))
    chosen = tuple(dict.fromkeys((about, *more)))
    config = _config(rng, seed, chosen)
    if "fetch" in chosen:
        config = _fetching(config, stream(seed, "faults", "fetch"))
    fleet = config.fleet[0]
    return Case(
        seed=seed,
        about=about,
        kinds=chosen,
        config=config,
        asks=tuple(_asks(rng, chosen)),
        faults=draw_faults(rng, chosen, num_replicas=fleet.replicas, within_s=FAULTY_S),
        outlives="restart" in chosen or rng.random() < 0.3,
        beats=rng.random() < 0.5,
        moves=MoveBounds(
            last_blocks=rng.choice((1, 4)), timeout_s=0.4, pull_timeout_s=rng.choice((0.4, 0.8))
        ),
        kv_link=Link(
            latency_s=rng.choice((0.0, 0.001)), bytes_per_s=rng.choice((math.inf, 1e10, 1e9))
        ),
        queue_limit=rng.choice((1, 2, 4)) if "socket" in chosen else rng.choice((64, 4096)),
        copies=rng.random() < 0.5,
    )


def _config(rng: Stream, seed: int, kinds: Sequence[str]) -> Config:
    block_size = rng.choice(BLOCK_SIZES)
    swaps = "host-memory" in kinds or rng.random() < 0.2
    has_prefix = rng.random() < 0.8
    store: Store = "radix" if has_prefix and rng.random() < 0.3 else "hash"
    group = rng.choice((1, 4))
    host_blocks = rng.choice((2, 6)) if "host-memory" in kinds else 64
    replicas = rng.choice((1, 2, 2, 3, 4))
    prefill = rng.randint(1, replicas - 1) if replicas > 1 and rng.random() < 0.2 else 0
    fleet = FleetConfig(
        model=MODEL,
        name="m",
        replicas=replicas,
        roles={"prefill": prefill, "decode": replicas - prefill} if prefill else None,
        executor=ExecutorSpec(kind="modelled", gpu=CARD),
        cache=CacheConfig(
            block_size=block_size,
            num_blocks=rng.choice((96, 128, 320)) // block_size,
            prefix=has_prefix,
            store=store,
            swap=SwapConfig(host_blocks=host_blocks, group_blocks=group) if swaps else SwapConfig(),
        ),
        policy=Table(
            preset="fast-switch" if swaps else rng.choice(("vllm-v1", "sglang", "prefill-first")),
            route=_route(rng, seed),
        ),
        max_waiting=rng.choice((None, None, 4)),
        max_outstanding=rng.choice((None, None, 16)),
    )
    return Config(
        seed=seed,
        is_checked=True,
        net=NetConfig(report_s=rng.choice((0.02, 0.1)), latency_s=rng.choice((0.0, 0.0005, 0.01))),
        fleet=(fleet,),
    )


def _fetching(config: Config, rng: Stream) -> Config:
    """The same with replicas that fetch cached prefixes from each other, and perhaps with memory behind the device."""
    (fleet,) = config.fleet
    size = fleet.cache.block_size
    block_bytes = size * BYTES_A_TOKEN
    tiers = TiersConfig()
    if rng.random() < 0.6:
        disk_bytes = rng.choice((None, 24 * block_bytes))
        host_bytes = rng.choice((8, 40)) * block_bytes
        tiers = TiersConfig(host_bytes=host_bytes, disk_bytes=disk_bytes, disk_gb_s=50.0)
    cache = replace(
        fleet.cache,
        prefix=True,
        store="hash",
        tiers=tiers,
        peers=PeersConfig(timeout_s=rng.choice((0.02, 0.2, 0.5)), least_blocks=1),
    )
    policy = Table({**fleet.policy, "fetch": rng.choice(("always", "always", "cheaper"))})
    replicas = rng.choice((2, 3)) if fleet.replicas == 1 else fleet.replicas
    fleet = replace(fleet, cache=cache, policy=policy, replicas=replicas)
    return replace(config, fleet=(fleet,))


def _route(rng: Stream, seed: int) -> str:
    """Those that were added later are drawn apart, so that what else a seed decides stays what it was."""
    chosen, apart = rng.choice(ROUTES), stream(seed, "faults", "later routes")
    is_later = apart.randrange(len(ROUTES) + len(LATER)) >= len(ROUTES)
    return apart.choice(LATER) if is_later else chosen


def _asks(rng: Stream, kinds: Sequence[str]) -> list[Ask]:
    """Prompts in a few families that begin alike."""
    has_moods, moves = "client" in kinds, not MOVING.isdisjoint(kinds)
    families = [[rng.randrange(VOCABULARY) for _ in range(40)] for _ in range(3)]
    asks = []
    for number in range(rng.randint(8, 24)):
        ids = rng.choice(families)[: rng.choice((0, 9, 24, 40))]
        ids = [*ids, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20)))]
        at = rng.choice((0.0, rng.uniform(0.0, ARRIVING_S)))
        leaves_at = at + rng.uniform(0.0, 0.4) if rng.random() < 0.1 else None
        is_long = (
            leaves_at is not None and rng.random() < 0.5
        )  # it ends because it is left, or late
        request = Request(
            id=RequestId(f"q{number}"),
            model="m",
            prompt=TokenPrompt(ids),
            sampling=Sampling(max_tokens=LONG if is_long else rng.randint(1, 16), temperature=0.0),
            true_output=LONG if is_long else rng.randint(1, 16),
            n=1 if is_long or moves else rng.choice((1, 1, 1, 1, 2, 3)),
        )
        asks.append(
            Ask(
                at=at,
                request=request,
                every_token=rng.random() < 0.8,
                mood=_mood(rng) if has_moods else "patient",
                is_task=rng.random() < 0.3,
                leaves_at=leaves_at,
            )
        )
    return asks


def _mood(rng: Stream) -> Mood:
    return rng.choice(
        ("patient", "patient", "raises", "leaves-inside", "asks-inside", "ends-others")
    )
