"""Blocks between processes of one machine: each keeps its KV memory in an anonymous file that others map and read.

So a copy is one copy, from the source's memory to the target's, made by the target; the source does nothing for it and
no byte passes through whoever started the two. The file has no name in the file system: it is found through the process
that holds it (/proc/PID/fd/N, which only its user may enter), and by a token, should the number have been given away.
It lives as long as somebody maps it, so a source that dies while it is read harms nobody.

Small copies are made at once, others in a thread, beside the steps. Addresses of several regions are joined by "+".
"""

from __future__ import annotations

import asyncio
import mmap
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from penstock.core.errors import ReplicaLost
from penstock.core.moving import KvCard
from penstock.net.blocks import Readable, Region, Runs, block_bytes

SCHEME = "shared:"
JOINT = "+"
AT_ONCE_BYTES = 1 << 20


class SharedFile:
    """Anonymous memory that other processes of this user can map. `memory` is all of it, zeros at first."""

    def __init__(self, num_bytes: int) -> None:
        self.token = secrets.token_hex(8)
        self._file = os.memfd_create(f"penstock-{self.token}", os.MFD_CLOEXEC)
        os.ftruncate(self._file, num_bytes)
        self.memory = mmap.mmap(self._file, num_bytes)
        self.memory.madvise(mmap.MADV_HUGEPAGE)  # where shared memory may have large pages

    def address(self, shape: tuple[int, ...]) -> str:
        """Where peers find it, and what it is."""
        numbers = "x".join(map(str, shape))
        return f"{SCHEME}{os.getpid()}:{self._file}:{self.token}:{numbers}"

    def close(self) -> None:
        """Nobody can map it any more; those who have keep it."""
        os.close(self._file)


def process_of(address: str) -> str:
    return address.removeprefix(SCHEME).partition(":")[0]


def is_offered() -> bool:
    """Whether this system has what it takes."""
    return hasattr(os, "memfd_create") and hasattr(mmap, "MADV_HUGEPAGE")


def opened(address: str, *, is_written: bool = False) -> Region:
    """A peer's memory, to be read, or written too. Raises ReplicaLost when it is not there any more."""
    if not address.startswith(SCHEME):
        raise ReplicaLost("its memory is not shared with others")
    pid, number, token, numbers = address.removeprefix(SCHEME).split(":")
    path = f"/proc/{pid}/fd/{number}"
    try:
        if token not in os.readlink(path):
            raise ReplicaLost(f"process {pid} is another one by now")
        file = os.open(path, os.O_RDWR if is_written else os.O_RDONLY)
    except OSError as error:
        raise ReplicaLost(f"the memory of process {pid} cannot be read: {error.strerror}") from None
    try:
        memory = mmap.mmap(file, 0, prot=mmap.PROT_READ | (mmap.PROT_WRITE if is_written else 0))
    except OSError as error:
        raise ReplicaLost(
            f"the memory of process {pid} cannot be mapped: {error.strerror}"
        ) from None
    finally:
        os.close(file)
    shape = tuple(int(each) for each in numbers.split("x"))
    return np.frombuffer(memory, np.uint8).reshape(shape)


class SharedTransport:
    """A core.transport.Transport. `region` lies in a SharedFile that `card` tells of."""

    def __init__(self, region: Region, card: KvCard) -> None:
        self._region, self._card = region, card
        self._own = Readable(region)
        self._peers: dict[str, Readable] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="penstock-blocks")

    @property
    def card(self) -> KvCard:
        return self._card

    @property
    def behind(self) -> int | None:
        return None if len(self._own.regions) == 1 else int(self._region.shape[1])

    def add(self, region: Region, address: str) -> None:
        """Peers read this region too, behind the other one; before anybody has been told of the card."""
        self._own = Readable(self._region, region)
        self._card = replace(self._card, address=f"{self._card.address}{JOINT}{address}")

    async def pull(self, address: str, runs: Runs) -> None:
        there = self._peer(address)
        num_bytes = block_bytes(self._region) * sum([count for _, _, count in runs])
        if num_bytes <= AT_ONCE_BYTES:
            there.copy_to(self._region, runs)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._worker, there.copy_to, self._region, runs)

    async def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        if block_bytes(self._region) * len(blocks) <= AT_ONCE_BYTES:
            return self._own.sums(blocks)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._own.sums, blocks)

    async def close(self) -> None:
        self._worker.shutdown(wait=True)
        self._peers.clear()

    def _peer(self, address: str) -> Readable:
        found = self._peers.get(address)
        if found is None:
            self._forget_the_dead()
            regions = [opened(each) for each in address.split(JOINT)]
            found = self._peers[address] = Readable(*regions)
        return found

    def _forget_the_dead(self) -> None:
        for address in list(self._peers):
            if not Path(f"/proc/{process_of(address)}").exists():
                del self._peers[address]
