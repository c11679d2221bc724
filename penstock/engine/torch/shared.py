"""Keys and values in memory that other replicas can read, so that requests can move to them."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from penstock.core.moving import KvCard
from penstock.engine.torch.card_memory import CardMemory
from penstock.engine.torch.ports import Movable
from penstock.net.blocks import Region, block_bytes
from penstock.net.kv_either import EitherTransport
from penstock.net.kv_link import KvLink
from penstock.net.kv_shared import SharedFile, SharedTransport, is_offered
from penstock.net.kv_staged import StagedTransport
from penstock.net.kv_tcp import TcpTransport

logger = logging.getLogger(__name__)
KvTransport = SharedTransport | TcpTransport | EitherTransport | StagedTransport


def shared_like(cache: Tensor) -> tuple[Tensor, SharedFile]:
    """A cache of the same shape, zeros, in a file of its own."""
    file = SharedFile(cache.numel() * cache.element_size())
    flat = torch.frombuffer(file.memory, dtype=torch.uint8)
    return flat.view(cache.dtype).view(cache.shape), file


def transport_of(
    backend: object, *, name: str, block_size: int, link: KvLink
) -> KvTransport | None:
    """What others read a backend's cache by, before it is used; None where that cannot be. Raises BadConfig."""
    if isinstance(backend, Movable) and backend.arena.is_cuda:
        return staged(backend, name=name, block_size=block_size, link=link)
    shared = None
    if link.kind != "tcp":
        shared = share(backend, name=name, block_size=block_size)
    if not link.reaches_far or not isinstance(backend, Movable):
        return shared
    arena = backend.arena
    if not arena.is_contiguous():
        return shared
    region = region_of(arena)
    layout = _layout(backend, region.shape, arena.dtype, name)
    tcp = TcpTransport(region, layout=layout, block_size=block_size, link=link)
    return tcp if shared is None else EitherTransport(shared, tcp)


def share(backend: object, *, name: str, block_size: int) -> SharedTransport | None:
    """Give a backend a cache that others can map; None where that cannot be.

    `name`: of the model; blocks travel between replicas of one model whose memory is laid out alike.
    """
    if not (is_offered() and isinstance(backend, Movable)):
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
            card = KvCard(
                layout=_layout(backend, region.shape, cache.dtype, name),
                address=file.address(region.shape),
                block_size=block_size,
                block_bytes=block_bytes(region),
            )
            return SharedTransport(region, card)
    return None


def staged(backend: Movable, *, name: str, block_size: int, link: KvLink) -> StagedTransport:
    """Of a card, whose memory others cannot read."""
    memory = CardMemory(backend.arena)
    layout = _layout(backend, memory.shape, backend.arena.dtype, name)
    return StagedTransport(memory, layout=layout, block_size=block_size, link=link)


def _layout(backend: object, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> str:
    pieces, _, size = shape
    return f"{name}, {type(backend).__name__}, {pieces} x {size} bytes of {dtype}"


def region_of(arena: Tensor) -> Region:
    """An arena [pieces, blocks, ...] as bytes."""
    found: Region = arena.view(torch.uint8).flatten(2).numpy()
    return found


def shared_behind(like: Tensor, num_blocks: int, transport: KvTransport) -> Tensor | None:
    """Host memory for so many blocks of an arena, which peers read behind the device's; None where that cannot be."""
    if isinstance(transport, StagedTransport):
        return None
    shape = (like.shape[0], num_blocks, *like.shape[2:])
    num_bytes = math.prod(shape) * like.element_size()
    file = None
    if not isinstance(transport, TcpTransport):
        try:
            file = SharedFile(num_bytes)
        except OSError as error:
            logger.warning("host memory is not shared, so peers do not fetch from it: %s", error)
            return None
    flat = torch.empty(num_bytes, dtype=torch.uint8)
    if file is not None:
        flat = torch.frombuffer(file.memory, dtype=torch.uint8)
    host = flat.view(like.dtype).view(shape)
    region = region_of(host)
    if isinstance(transport, TcpTransport):
        transport.add(region)
    elif file is not None:
        transport.add(region, file.address(region.shape))
    return host
