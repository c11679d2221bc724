"""What benchmarks/schedulers.py compares: workloads and their promises, and sets of policies."""

from __future__ import annotations

from collections.abc import Sequence

MIXED, LATER = "mixed", (30.0, 0.5)  # the promise of tenants with even numbers there
PROMISES: dict[str, dict[str, tuple[float, float]]] = {  # workload -> promise -> (TTFT s, TPOT s)
    "chat": {"prompt": (0.5, 0.1), "smooth": (2.0, 0.035), "relaxed": (10.0, 0.1)},
    "code": {"prompt": (1.0, 0.2), "smooth": (2.0, 0.06), "relaxed": (5.0, 0.2)},
    "long_context": {"prompt": (3.0, 0.15), "smooth": (8.0, 0.06), "relaxed": (20.0, 0.2)},
    "agents": {"prompt": (1.0, 0.15), "smooth": (3.0, 0.05), "relaxed": (10.0, 0.15)},
}
SPANS = {  # what stands instead of the four minutes of the files
    "chat": "duration_s = 240",
    "code": "num_requests = 400",
    "long_context": "num_requests = 160",
    "agents": "duration_s = 60",
}
GUESSES = {  # places at which the search begins, by promise
    "chat": (9, 7, 10, 9),
    "code": (0, -5, 8, 0),
    "long_context": (-9, -7, -2, -11),
    "agents": (3, 3, 5, 2),
}
V1 = "vllm-v1 (2048)"
Table = dict[str, object]
SCHEDULERS: dict[str, Table] = {
    V1: {"preset": "vllm-v1"},
    "vllm-v1 (512)": {"preset": "vllm-v1", "batch": {"max_tokens": 512}},
    "sglang": {"preset": "sglang"},
    "split-fuse": {"preset": "split-fuse"},
    "prefill-first": {"preset": "prefill-first"},
    "layered": {"preset": "layered"},
    "constant-dense": {"preset": "vllm-v1", "batch": {"name": "constant-dense"}},
    "semi-pd": {"preset": "semi-pd"},
    "past-future": {"preset": "vllm-v1", "admit": "past-future"},
    "sjf": {"preset": "vllm-v1", "order": "sjf"},
    "lpm": {"preset": "vllm-v1", "order": "lpm"},
    "dfs-weight": {"preset": "vllm-v1", "order": "dfs-weight"},
    "vtc": {"preset": "vllm-v1", "order": "vtc"},
    "drr": {"preset": "vllm-v1", "order": "drr"},
    "edf": {"preset": "vllm-v1", "order": "edf"},
    "slack-edf": {"preset": "vllm-v1", "order": "slack-edf"},
    "priority": {"preset": "vllm-v1", "order": "priority"},
    "flow-prefill": {"preset": "flow-prefill"},
    "jitserve": {"preset": "jitserve"},
    "fast-switch": {
        "preset": "vllm-v1", "order": "priority", "batch": {"name": "resident"}, "evict": "fastswitch",
    },
}  # fmt: skip
READS: dict[str, Sequence[str]] = {  # who is told which promises
    "slack-edf": ("prompt", "smooth", "relaxed", MIXED),
    "flow-prefill": ("prompt", "smooth", "relaxed", MIXED),
    "jitserve": ("relaxed", MIXED),  # made for promises that leave room
    "edf": (MIXED,),  # the default's like where all are promised the same
    "priority": (MIXED,),
    "fast-switch": (MIXED,),
}
SWAPPED = ("fast-switch", "fastswitch")
SHORT: dict[str, Table] = {  # where memory is short: who is admitted, and who leaves
    **{
        f"admit {name}": {"preset": "vllm-v1", "admit": name}
        for name in ("full-fit", "watermark", "past-future", "conservative")
    },
    **{
        f"evict {name}": {"preset": "vllm-v1", "evict": name}
        for name in ("least-computed", "cheapest-per-block", "cache-aware", "retract")
    },
    "sglang": {"preset": "sglang"},
    "fastswitch": {
        "preset": "vllm-v1", "order": "fcfs", "batch": {"name": "resident"}, "evict": "fastswitch",
    },
}  # fmt: skip
SHORT_BLOCKS, HOST_BLOCKS = 3500, 14000  # of 16 tokens; the whole card holds some 28,000
SHORT_WORKLOADS = ("chat", "long_context")
