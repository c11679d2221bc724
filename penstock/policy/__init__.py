"""Every decision, pure: one folder per question, one file per answer.

Refuses: clocks, sockets, threads, tensors, global randomness, logging, configuration, and other kinds.

A policy is a dataclass whose fields are its parameters (so the configuration table is its constructor); private
state is `field(init=False)`. It has `decide(view) -> Decision` and, if it learns, `observe(event)`. Same seed, same
events, same views: same decisions; `penstock replay` checks exactly that. Adding a policy is one file and one line
in TABLE, and the line alone makes the law tests run on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

KINDS = (
    "order", "admit", "batch", "evict", "route", "choose",
    "move", "scale", "place", "limit", "fetch", "merge", "guard",
)  # fmt: skip

TABLE: dict[str, dict[str, str]] = {
    "order": {
        "fcfs": "penstock.policy.order.fcfs:Fcfs",
        "priority": "penstock.policy.order.priority:Priority",
        "drawn-priority": "penstock.policy.order.drawn_priority:DrawnPriority",
        "edf": "penstock.policy.order.edf:Edf",
        "slack-edf": "penstock.policy.order.slack_edf:SlackEdf",
        "requeue": "penstock.policy.order.requeue:Requeue",
        "sjf": "penstock.policy.order.sjf:Sjf",
        "lpm": "penstock.policy.order.lpm:Lpm",
        "dfs-weight": "penstock.policy.order.dfs_weight:DfsWeight",
        "vtc": "penstock.policy.order.vtc:Vtc",
        "drr": "penstock.policy.order.drr:Drr",
        "jit-density": "penstock.policy.order.jit_density:JitDensity",
    },
    "admit": {
        "full-fit": "penstock.policy.admit.full_fit:FullFit",
        "watermark": "penstock.policy.admit.watermark:Watermark",
        "conservative": "penstock.policy.admit.conservative:Conservative",
        "past-future": "penstock.policy.admit.past_future:PastFuture",
        "jit-bandwidth": "penstock.policy.admit.jit_bandwidth:JitBandwidth",
        "in-time": "penstock.policy.admit.in_time:InTime",
    },
    "batch": {
        "vllm-v1": "penstock.policy.batch.vllm_v1:VllmV1",
        "sglang": "penstock.policy.batch.sglang:Sglang",
        "constant-dense": "penstock.policy.batch.constant_dense:ConstantDense",
        "split-fuse": "penstock.policy.batch.split_fuse:SplitFuse",
        "prefill-first": "penstock.policy.batch.prefill_first:PrefillFirst",
        "resident": "penstock.policy.batch.resident:Resident",
        "layered": "penstock.policy.batch.layered:Layered",
        "flow-prefill": "penstock.policy.batch.flow_prefill:FlowPrefill",
        "jit": "penstock.policy.batch.jit:Jit",
        "semi-pd": "penstock.policy.batch.semi_pd:SemiPd",
        "diffusion": "penstock.policy.batch.diffusion:Diffusion",
        "speculative": "penstock.policy.batch.speculative:Speculative",
        "leftover": "penstock.policy.batch.leftover:Leftover",
        "epd": "penstock.policy.batch.epd:Epd",
    },
    "evict": {
        "recompute-last": "penstock.policy.evict.recompute_last:RecomputeLast",
        "recompute-priority": "penstock.policy.evict.recompute_priority:RecomputePriority",
        "retract": "penstock.policy.evict.retract:Retract",
        "least-computed": "penstock.policy.evict.least_computed:LeastComputed",
        "cheapest-per-block": "penstock.policy.evict.cheapest_per_block:CheapestPerBlock",
        "fastswitch": "penstock.policy.evict.fastswitch:FastSwitch",
        "cache-aware": "penstock.policy.evict.cache_aware:CacheAware",
        "lru": "penstock.policy.evict.lru:Lru",
        "leaves": "penstock.policy.evict.leaves:Leaves",
    },
    "route": {
        "round-robin": "penstock.policy.route.round_robin:RoundRobin",
        "least": "penstock.policy.route.least:Least",
        "p2c": "penstock.policy.route.p2c:PowerOfTwo",
        "prefix": "penstock.policy.route.prefix:Prefix",
        "on-demand": "penstock.policy.route.on_demand:OnDemand",
        "prefix-hash": "penstock.policy.route.prefix_hash:PrefixHash",
        "session": "penstock.policy.route.session:Session",
        "deepest-prefix": "penstock.policy.route.deepest_prefix:DeepestPrefix",
        "kv-aware": "penstock.policy.route.kv_aware:KvAware",
        "llm-d": "penstock.policy.route.llm_d:LlmD",
        "dynamo": "penstock.policy.route.dynamo:Dynamo",
        "mooncake": "penstock.policy.route.mooncake:Mooncake",
        "ray-prefix": "penstock.policy.route.ray_prefix:RayPrefix",
        "preble": "penstock.policy.route.preble:Preble",
        "affinity": "penstock.policy.route.affinity:Affinity",
        "least-tokens": "penstock.policy.route.least_tokens:LeastTokens",
        "dualmap": "penstock.policy.route.dualmap:DualMap",
        "llumnix": "penstock.policy.route.llumnix:Llumnix",
        "xllm": "penstock.policy.route.xllm:Xllm",
        "xllm-cache": "penstock.policy.route.xllm_cache:XllmCache",
    },
    "move": {
        "llumnix": "penstock.policy.move.llumnix:Llumnix",
        "infinite-llm": "penstock.policy.move.infinite_llm:InfiniteLlm",
        "eplb": "penstock.policy.move.eplb:Eplb",
        "elastic-moe": "penstock.policy.move.elastic_moe:ElasticMoe",
        "offline": "penstock.policy.move.offline:Offline",
    },
    "scale": {
        "elastic": "penstock.policy.scale.elastic:Elastic",
        "llumnix": "penstock.policy.scale.llumnix:Llumnix",
        "per-replica": "penstock.policy.scale.per_replica:PerReplica",
        "pd-ratio": "penstock.policy.scale.pd_ratio:PdRatio",
        "xllm": "penstock.policy.scale.xllm:Xllm",
    },
    "place": {
        "distserve": "penstock.policy.place.distserve:DistServe",
        "colocated": "penstock.policy.place.colocated:Colocated",
    },
    "fetch": {
        "cheaper": "penstock.policy.fetch.cheaper:Cheaper",
        "always": "penstock.policy.fetch.always:Always",
        "never": "penstock.policy.fetch.never:Never",
    },
    "limit": {
        "fixed": "penstock.policy.limit.fixed:Fixed",
        "semi-pd": "penstock.policy.limit.semi_pd:SemiPd",
    },
}


def kind_module(kind: str) -> ModuleType:
    """The module of a kind: its View, Decision, law and Policy."""
    return importlib.import_module(f"penstock.policy.{kind}")


def find(kind: str, name: str) -> type:
    """The class of a policy. Raises KeyError with the known names."""
    known: Mapping[str, str] = TABLE.get(kind, {})
    if name not in known:
        raise KeyError(f"no {kind} policy is named {name!r}; known: {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, type)
    return found
