"""Walks of SGLang's own radix cache, recorded: jobs start, compute chunks, write and end on a small memory.

    python -m tests.engine.sglang_walks FOLDER > data/sglang_radix_walks.json

FOLDER holds an unpacked sglang 0.5.23 (its wheel; none of its dependencies but torch is needed). What runs is its
RadixCache with its checkpoints, locks and evictions; only the memory behind it is a list of pages.

After each deed is written what the tree matched, the pages that are free, the nodes and a digest of what is cached.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

STRATEGIES = ("lru", "lfu", "fifo", "mru", "filo", "priority", "slru")
WALKS = [
    (by, size, seed)
    for by in STRATEGIES
    for size in (1, 4)
    for seed in range(6 if by == "priority" else 2)
]
DEEDS = 100


def digest(prefixes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """Of all cached prefixes, page by page, with their namespaces."""
    told = repr(sorted(prefixes)).encode()
    return hashlib.blake2b(told, digest_size=6).hexdigest()


def import_sglang(folder: Path) -> tuple[Any, Any]:
    """SGLang's radix cache and its strategies, with its heavy neighbours left empty."""
    sys.path.insert(0, str(folder))
    empty = {
        "sglang.srt.mem_cache.allocator": {"BaseTokenToKVPoolAllocator": object},
        "sglang.srt.mem_cache.memory_pool": {"ReqToTokenPool": object},
        "sglang.srt.mem_cache.unified_cache.component_type": {"ComponentType": object},
        "sglang.srt.observability.metrics_collector": {
            "STAT_LOGGER_ROLE_RADIX_CACHE": "",
            "RadixCacheMetricsCollector": object,
            "radix_cache_metric_labels": None,
            "resolve_collector_class": None,
        },
        "sglang.srt.runtime_context": {"get_observability": None, "get_parallel": None},
        "sglang.srt.utils.common": {"ceil_align": None},
        "sglang.srt.mem_cache.utils": {
            "get_eviction_strategy": None,
            "split_node_hash_value": lambda value, *rest: (None, None),
        },
        "sglang.srt.mem_cache.events": {"KVCacheEventRecorder": Events, "LoRANameTable": object},
        "sglang.srt.mem_cache.cache_init_params": {"CacheInitParams": object},
    }
    for name, members in empty.items():
        module = ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
    for package in ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.observability"):
        module = ModuleType(package)
        module.__path__ = [str(folder.joinpath(*package.split(".")))]
        sys.modules[package] = module
    import sglang.srt.mem_cache.evict_policy as strategies  # type: ignore[import-not-found]
    import sglang.srt.mem_cache.radix_cache as radix  # type: ignore[import-not-found]

    radix.get_eviction_strategy = lambda by, config: getattr(
        strategies, f"{by.upper()}Strategy" if by != "priority" else "PriorityStrategy"
    )()
    return radix, strategies


class Events:
    """Nobody hears of them."""

    def __init__(self, **settings: Any) -> None: ...

    def record_store(self, node: Any) -> None: ...

    def record_remove(self, node: Any) -> None: ...

    def record_all_cleared(self) -> None: ...


class Pages:
    """The allocator and the rows of the jobs: token slots of pages."""

    device = "cpu"

    def __init__(self, torch: Any, num: int, size: int) -> None:
        self._torch, self.size = torch, size
        self.free = list(range(num))
        self.req_to_token = torch.zeros((128, 512), dtype=torch.int64)

    def alloc(self, num: int) -> Any:
        pages, self.free = self.free[:num], self.free[num:]
        slots = [page * self.size + slot for page in pages for slot in range(self.size)]
        return self._torch.tensor(slots, dtype=self._torch.int64)

    def free_segment(self, slots: Any, start_pos: int) -> None:
        pages = sorted({slot // self.size for slot in slots.tolist()})
        assert not set(pages) & set(self.free), "freed twice"
        self.free += pages

    def write(self, where: Any, slots: Any) -> None:
        self.req_to_token[where] = slots


class Theirs:
    """SGLang's cache as its scheduler drives it (srt/mem_cache/common.py)."""

    def __init__(self, radix: Any, num: int, size: int, by: str) -> None:
        import torch

        self.radix, self.size = radix, size
        self.pages = Pages(torch, num, size)
        settings = SimpleNamespace(
            disable=False,
            req_to_token_pool=self.pages,
            token_to_kv_pool_allocator=self.pages,
            page_size=size,
            is_eagle=False,
            eviction_policy=by,
            eviction_policy_config=None,
            enable_kv_cache_events=False,
            dynamo_kv_event_format=False,
            kv_event_lora_names=None,
            enable_metrics=False,
        )
        self.cache = radix.RadixCache(settings)
        self.reqs: dict[int, Any] = {}

    def start(self, job: int, ids: list[int], salt: str, priority: int) -> int:
        key = self.radix.RadixKey(array("q", ids[:-1]), None, cache_salt=salt)
        found = self.cache.match_prefix(self.radix.MatchPrefixParams(key=key))
        node, size = found.last_device_node, found.device_prefix_len
        req = SimpleNamespace(
            full_untruncated_fill_ids=array("q", ids),
            origin_input_ids=array("q", ids),
            extra_key=None,
            cache_salt=salt,
            priority=priority,
            lock=self.cache.lock(node),
            last_node=node,
            kv=SimpleNamespace(
                swa_evict_floor=0,
                req_pool_idx=job,
                cache_protected_len=size,
                cache_inserted_len=0,
            ),
            allocated=size,
            computed=size,
        )
        if size:
            self.pages.write((job, slice(0, size)), self.cache.path_device_indices(node))
        self.reqs[job] = req
        return int(size)

    def room(self) -> int:
        return len(self.pages.free) * self.size + int(self.cache.evictable_size())

    def allocate(self, job: int, upto: int) -> None:
        req = self.reqs[job]
        num = -(-upto // self.size) - req.allocated // self.size
        short = num * self.size - len(self.pages.free) * self.size
        if short > 0:
            self.cache.evict(SimpleNamespace(num_tokens=short))
        slots = self.pages.alloc(num)
        self.pages.write((job, slice(req.allocated, req.allocated + len(slots))), slots)
        req.allocated += len(slots)

    def chunk(self, job: int, upto: int) -> None:
        self.allocate(job, upto)
        self.reqs[job].computed = upto
        self.cache.checkpoint(self.reqs[job], up_to=upto)

    def write(self, job: int, token: int) -> None:
        """One decode: the last token gets its slot, and one more is known."""
        req = self.reqs[job]
        self.allocate(job, req.computed + 1)
        req.computed += 1
        req.full_untruncated_fill_ids.append(token)

    def finish(self, job: int) -> None:
        req = self.reqs.pop(job)
        self.cache.checkpoint(req, up_to=req.computed)
        own = self.pages.req_to_token[job, req.kv.cache_protected_len : req.allocated]
        self.pages.free_segment(own, req.kv.cache_protected_len)
        self.cache.unlock(req.lock)

    def state(self) -> list[Any]:
        prefixes, num_nodes, stack = [], 0, [(self.cache.root_node, ("", ()))]
        while stack:
            node, (salt, path) = stack.pop()
            for child in node.children.values():
                ids = tuple(child.key.token_ids)
                below = (child.key.cache_salt or "", (*path, *ids))
                ends = range(len(path) + self.size, len(below[1]) + 1, self.size)
                prefixes += [(below[0], below[1][:end]) for end in ends]
                num_nodes += 1
                stack.append((child, below))
        free = len(self.pages.free) + int(self.cache.evictable_size()) // self.size
        return [free, num_nodes, digest(prefixes)]


def draw_ids(rng: random.Random, size: int) -> list[int]:
    """A path in a small tree of prompts, so that many begin alike and part anywhere."""
    ids = [int(rng.random() < 0.15) for _ in range(rng.randrange(1, 9 * size))]
    return [*ids, *(rng.randrange(2, 4) for _ in range(rng.randrange(2)))]


def walk(radix: Any, by: str, size: int, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{by} {size} {seed}")
    num = 40 if size == 1 else 24
    theirs = Theirs(radix, num, size, by)
    deeds: list[list[Any]] = []
    todo: dict[int, list[int]] = {}  # job -> [computed, known]
    for job in range(DEEDS):
        if len(todo) < 4 and rng.random() < 0.5:
            ids, salt = draw_ids(rng, size), rng.choice(("", "", "", "s"))
            deed: list[Any] = ["start", job, ids, salt, rng.randrange(-2, 3)]
            todo[job] = [theirs.start(*deed[1:]), len(ids)]
            deed = [*deed, todo[job][0]]
        elif todo:
            chosen = rng.choice(list(todo))
            computed, known = todo[chosen]
            left = known - computed
            upto = computed + (left if rng.random() < 0.5 else rng.randrange(1, left + 1))
            if (-(-upto // size) - theirs.reqs[chosen].allocated // size) * size > theirs.room():
                chosen = max(todo)  # memory is full: whoever came last ends
                deed = ["finish", chosen]
            elif left > 1 or computed < len(theirs.reqs[chosen].origin_input_ids):
                deed = ["chunk", chosen, upto]
            elif rng.random() < 0.8:
                deed = ["write", chosen, rng.randrange(2)]
            else:
                deed = ["finish", chosen]
            getattr(theirs, deed[0])(*deed[1:])
            if deed[0] == "chunk":
                todo[chosen][0] = upto
                if upto == known:
                    theirs.reqs[chosen].full_untruncated_fill_ids.append(0)
                    todo[chosen][1] += 1
            elif deed[0] == "write":
                todo[chosen] = [computed + 1, known + 1]
            else:
                del todo[chosen]
        else:
            continue
        deeds.append([deed, theirs.state()])
    return {"by": by, "size": size, "num_blocks": num, "deeds": deeds}


def main(folder: Path) -> None:
    radix, _ = import_sglang(folder)
    walks = [walk(radix, *chosen) for chosen in WALKS]
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in walks)
    sys.stdout.write(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
