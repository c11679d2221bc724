"""Keys and values in memory that the other replicas of this machine can read, so that requests can move to them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from penstock.core.moving import KvCard
from penstock.engine.torch.ports import Movable
from penstock.net.blocks import Region, block_bytes
from penstock.net.kv_shared import SharedFile, SharedTransport, is_offered

logger = logging.getLogger(__name__)


def shared_like(cache: Tensor) -> tuple[Tensor, SharedFile]:
    """A cache of the same shape, zeros, in a file of its own."""
    file = SharedFile(cache.numel() * cache.element_size())
    flat = torch.frombuffer(file.memory, dtype=torch.uint8)
    return flat.view(cache.dtype).view(cache.shape), file


def share(backend: object, *, name: str, block_size: int) -> SharedTransport | None:
    """Give a backend, before it is used, a cache that others can map; None where that cannot be.

    `name`: of the model; blocks travel between replicas of one model whose memory is laid out alike.
    """
    if not (is_offered() and isinstance(backend, Movable)) or backend.arena.device.type != "cpu":
        return None
    for attribute in ("cache", "_kv"):
        cache = getattr(backend, attribute, None)
        if isinstance(cache, Tensor) and cache.is_contiguous():
            try:
                shared, file = shared_like(cache)
            except OSError as error:  # a limit on files, a sandbox
                logger.warning("keys and values are not shared, so nothing can move: %s", error)
                return None
            setattr(backend, attribute, shared)
            region = region_of(backend.arena)
            pieces, _, size = region.shape
            kind = f"{type(backend).__name__}, {pieces} x {size} bytes of {cache.dtype}"
            card = KvCard(
                layout=f"{name}, {kind}",
                address=file.address(region.shape),
                block_size=block_size,
                block_bytes=block_bytes(region),
            )
            return SharedTransport(region, card)
    return None


def region_of(arena: Tensor) -> Region:
    """An arena [pieces, blocks, ...] as bytes."""
    found: Region = arena.view(torch.uint8).flatten(2).numpy()
    return found
