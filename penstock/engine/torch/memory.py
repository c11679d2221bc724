"""How many blocks of keys and values fit.

Said by number, by bytes, or left open: then a share of the memory is taken that is free and not needed for anything
else (beside.py; half of what is free at least), but no more than CONTEXTS whole contexts need. What was said is taken
as it is, with a warning where it will not do. Free memory of a CPU is what the kernel calls available, within the limit
of this process's control group if there is one; of a GPU, what its driver reports.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from penstock.core.errors import BadConfig
from penstock.engine.torch.attention import KvLayout

CONTEXTS = 64
FREE_SHARE = {"cpu": 0.4, "cuda": 0.9}
LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
logger = logging.getLogger(__name__)


def block_bytes(layout: KvLayout) -> int:
    """Bytes of one block, all layers, keys and values."""
    each = layout.pieces * layout.num_kv_heads * layout.vector_bytes
    return each * layout.num_layers * layout.block_size


def choose_num_blocks(
    layout: KvLayout,
    max_context: int,
    *,
    num_blocks: int | None = None,
    memory_bytes: int | None = None,
    free_share: float | None = None,
    beside_bytes: int = 0,
) -> int:
    """Blocks to hold. `layout.num_blocks` is ignored. Raises BadConfig when not even one fits."""
    each, free = block_bytes(layout), free_bytes(layout.device)
    left = free - beside_bytes
    if num_blocks is not None:
        found = num_blocks
    elif memory_bytes is not None:
        found = memory_bytes // each
    else:
        share = FREE_SHARE.get(layout.device.type, 0.5) if free_share is None else free_share
        wanted = CONTEXTS * -(-max_context // layout.block_size)
        found = min(int(max(left, free // 2) * share) // each, wanted)
    if found < 1:
        raise BadConfig(
            f"no block of {each} bytes fits into the memory set aside for keys and values",
            hint="give it more memory (memory_bytes) or state num_blocks",
        )
    if found * each > left:
        told = (found * each, beside_bytes, free)
        logger.warning(
            "keys and values take %.1f GB and all else up to %.1f GB, but only %.1f GB are free",
            *[each / 1e9 for each in told],
        )
    return found


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = _available_bytes()
    for limit, used in LIMITS:
        told = _read_int(limit)
        if told is not None:
            return max(0, min(available, told - (_read_int(used) or 0)))
    return available


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 4 << 30  # not Linux: a modest guess, which num_blocks overrides
    table = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return int(table.get("MemAvailable", table["MemFree"]).split()[0]) * 1024


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
