"""Which policy fills each slot when nobody says so, and named sets of policies that belong together.

A preset is a reproduction of a published scheduler; single slots may be changed on top of it. What a scheduler needs
beside policies comes with its preset too: HOST_BLOCKS, unless the fleet's `cache.swap` says how many.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import cast

from penstock.cluster.spec import SLOTS
from penstock.core.config import Table
from penstock.core.drafts import Speculation
from penstock.core.errors import BadConfig

DEFAULTS: dict[str, str] = {
    "order": "fcfs",
    "admit": "full-fit",
    "batch": "vllm-v1",
    "evict": "recompute-last",
    "blocks": "lru",
}
PRESETS: dict[str, dict[str, str]] = {
    "vllm-v1": DEFAULTS,
    "sglang": {
        "order": "fcfs",
        "admit": "full-fit",
        "batch": "sglang",
        "evict": "retract",
        "blocks": "lru",
    },
    "split-fuse": {
        "order": "requeue",
        "admit": "full-fit",
        "batch": "split-fuse",
        "evict": "recompute-last",
        "blocks": "lru",
    },
    "layered": {
        "order": "fcfs",
        "admit": "full-fit",
        "batch": "layered",
        "evict": "recompute-last",
        "blocks": "lru",
    },
    "flow-prefill": {
        "order": "slack-edf",
        "admit": "full-fit",
        "batch": "flow-prefill",
        "evict": "recompute-last",
        "blocks": "lru",
    },
    "jitserve": {
        "order": "jit-density",
        "admit": "full-fit",
        "batch": "jit",
        "evict": "recompute-last",
        "blocks": "lru",
    },
    "prefill-first": {
        "order": "fcfs",
        "admit": "watermark",
        "batch": "prefill-first",
        "evict": "recompute-last",
        "blocks": "lru",
    },
    "semi-pd": {
        "order": "fcfs",
        "admit": "full-fit",
        "batch": "semi-pd",
        "evict": "retract",
        "blocks": "lru",
    },
    "past-future": {
        "order": "fcfs",
        "admit": "past-future",
        "batch": "prefill-first",
        "evict": "recompute-last",
        "blocks": "lru",
    },
    "fast-switch": {
        "order": "drawn-priority",
        "admit": "full-fit",
        "batch": "resident",
        "evict": "fastswitch",
        "blocks": "lru",
    },
    "nanoflow": {
        "order": "fcfs",
        "admit": "full-fit",
        "batch": "constant-dense",
        "evict": "recompute-last",
        "blocks": "lru",
    },
    "dllm-serve": {
        "order": "fcfs",
        "admit": "full-fit",
        "batch": "diffusion",
        "evict": "recompute-last",
        "blocks": "lru",
    },
}

GUESSING = "speculative"
HOST_BLOCKS = {"fast-switch": 1024}  # host memory that its jobs are evicted to; see engine.swap


def bring_host_memory(fleet: dict[str, object]) -> None:
    """Give the table of a fleet the host memory that its preset is made for: as much as KV memory where that is told.

    Engines of several processes have none, so there its victims are computed again.
    """
    tables = [fleet.get(name, {}) for name in ("policy", "cache", "executor")]
    if not all(isinstance(table, dict) for table in tables):
        return  # whoever builds the configuration says so
    policy, cache, executor = (cast(dict[str, object], table) for table in tables)
    default = HOST_BLOCKS.get(str(policy.get("preset")))
    is_split = executor.get("kind", "torch") == "torch" and executor.get("tensor_parallel", 1) != 1
    swap = cache.get("swap", {})
    if default is None or is_split or not isinstance(swap, dict):
        return
    num_blocks = cache.get("num_blocks", default)
    fleet["cache"] = {**cache, "swap": {"host_blocks": num_blocks, **swap}}


def policy_tables(
    given: Mapping[str, object], has_prefix_cache: bool, where: str = "policy"
) -> dict[str, Table]:
    """A table for every slot: the preset's, changed by what is given. Raises BadConfig that names `where`.

    What moves and how many replicas there are is decided only where a policy for it is given.
    """
    slots = dict(given)
    preset = slots.pop("preset", "vllm-v1")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise BadConfig(f"{where}.preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    for slot in slots:
        if slot not in SLOTS:
            near = difflib.get_close_matches(slot, SLOTS, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known: preset, {', '.join(SLOTS)}"
            raise BadConfig(f"unknown key '{where}.{slot}'; {known}")
    route = "prefix" if has_prefix_cache else "p2c"
    names = {"limit": "fixed", **PRESETS[preset], "route": route}
    return {
        slot: _table(slots.get(slot, names.get(slot)), names.get(slot), f"{where}.{slot}")
        for slot in SLOTS
        if slot in slots or slot in names
    }


def guessing(batch: Table, speculation: Speculation) -> Table:
    """The batch policy's table, around it the one that says how many guesses pay."""
    if batch["name"] == GUESSING:
        return Table({"max_drafts": speculation.max_drafts, **batch})
    return Table(name=GUESSING, max_drafts=speculation.max_drafts, inner=batch)


def _table(given: object, name: str | None, where: str) -> Table:
    if isinstance(given, str):
        return Table(name=given)
    if isinstance(given, Mapping):
        return Table(given) if name is None else Table({"name": name, **given})
    raise BadConfig(f"{where} must be the name of a policy or its table; got {given!r}")
