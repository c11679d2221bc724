"""Offline prompts without end beside online conversations, on replicas that compute prompts and others that write.

Online requests are handed on behind their first token. Of offline ones

    pulled       stay where their prompt was computed until a writer has time and memory for one (move "offline")
    stays        stay there to their end
    handed on    go to a writer like online ones, as ever

All three make their steps with batch "leftover", which leaves offline work out of steps that it would make too long.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from penstock.assemble import Config
from penstock.lab.beside import PROMISE, RANKED, Mixed, Tally
from penstock.lab.rate_search import fleet_of
from penstock.lab.role_flips import EXECUTOR, MODEL
from penstock.lab.simulate import simulate

ROLES = {"prefill": 2, "decode": 2}
RATE_PER_S = 2.0  # of online requests: what four replicas keep their promises at
OFFLINE_PER_S = 10.0
MOVES: dict[str, dict[str, object]] = {
    "pulled": {"name": "offline", "tpot_s": PROMISE.tpot_s},
    "stays": {"name": "offline", "tpot_s": PROMISE.tpot_s, "full": 1e-9},
    "handed on": {},
}


def config_of(variant: str) -> Config:
    move = {"move": MOVES[variant]} if MOVES[variant] else {}
    batch = {"name": "leftover", "tpot_s": PROMISE.tpot_s}
    routes = {"route": "least", "route_decode": "least"}
    policy = {**RANKED, "batch": batch, **routes, **move}
    replicas = sum(ROLES.values())
    return fleet_of(policy, model=MODEL, executor=EXECUTOR, replicas=replicas, roles=ROLES)


def offline_pulls(variant: str, *, conv: Path, num: int, seed: int) -> Mapping[str, object]:
    """Figures of one variant."""
    offline = int(OFFLINE_PER_S * num / RATE_PER_S)
    mixed = Mixed(conv=conv, num=num, seed=seed, num_offline=offline, rate_per_s=RATE_PER_S)
    tally = Tally(mixed.offline_sizes(), num)
    simulated = simulate(config_of(variant), mixed, has_gaps=False, listeners=(tally,))
    return {
        "attainment": tally.kept / num,
        "offline_tokens_per_s": tally.offline_tokens / tally.ended_at,
        "cost_model": simulated.sources[0].cost_model,
    }
