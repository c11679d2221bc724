"""Cached blocks in a file on disk: fixed slots, each with a head that says whose contents they are, and checksums.

    file    one page that says what this is of, then slots
    slot    head (magic, name of the block, stamp, length, checksum of the contents, checksum of the head), contents

Blocks are written and read by one thread, in the order in which that is asked for. A slot is good if its head is
whole, names the block that is looked for, and its contents have the checksum: whatever was cut off, overwritten or has
rotted is found out when it is read, and is no more than a block that has to be computed. Each reason is told once.

Room on the disk is taken before anything is written to it, GROWTH slots at a time. When the disk is full, or fails,
nothing more is written; what is there can still be read.

What the file is of (`identity`) must be the same for what it holds to be used by the next process: weights, number
types, layout. Then heads are read when it is opened, and `found` tells names and slots, the longest unused first. Only
one process at a time has a file (its lock ends with it).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from penstock.core.errors import BadConfig
from penstock.core.plans import Filing
from penstock.core.types import BlockHash
from penstock.net.blocks import Region

HEAD = struct.Struct("<8s16sQQII")
MAGIC = b"pnstkkv1"
PAGE = 4096
GROWTH = 64  # slots
logger = logging.getLogger(__name__)

OnFiled = Callable[
    [int, tuple[int, ...], str | None], None
]  # the filing, its bad places, why nothing more is written


class Shelf:
    """`region`: host memory [pieces, blocks, bytes]. `tell` is called on the shelf's own thread."""

    def __init__(
        self, path: Path, region: Region, *, num_slots: int, identity: str, tell: OnFiled
    ) -> None:
        """Raises BadConfig where the file cannot be had."""
        self.path, self._region, self._tell = path, region, tell
        self.num_slots = num_slots
        self._length = int(region.shape[0] * region.shape[2])
        self._stride = stride_of(self._length)
        self._stamp = self._num_there = 0
        self._error: str | None = None
        self._warned: set[str] = set()  # what was warned of
        self._file = _open(path)
        try:
            self.found = self._recall(identity)
        except OSError as error:
            os.close(self._file)
            raise BadConfig(f"{path} cannot be used: {error.strerror}") from None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="penstock-shelf")

    def begin(self, filing: Filing) -> None:
        self._worker.submit(self._run, filing)

    def close(self) -> None:
        """Return when what was begun is done."""
        self._worker.shutdown(wait=True)
        os.close(self._file)

    # ------------------------------------------------------------------ on the worker's thread

    def _run(self, filing: Filing) -> None:
        """Tells of every filing: whoever waits for one that nobody tells of waits for ever."""
        act = self._write if filing.is_out else self._read
        try:
            bad = [
                place
                for place, ((block, slot), name) in enumerate(
                    zip(filing.pairs, filing.names, strict=True)
                )
                if not act(block, slot, name)
            ]
        except Exception as error:  # the outermost loop of this thread
            logger.exception("%s: no more cached blocks go to this disk", self.path)
            self._error = f"{self.path}: {type(error).__name__}: {error}"
            bad = list(range(len(filing.pairs)))
        self._tell(filing.id, tuple(bad), self._error)

    def _write(self, block: int, slot: int, name: BlockHash) -> bool:
        if self._error is not None:
            return False
        contents = np.ascontiguousarray(self._region[:, block])
        self._stamp += 1
        try:
            self._grow(slot + 1)
            head = _head(name, self._stamp, contents)
            _write_all(self._file, [head, contents.reshape(-1).data], self._at(slot))
        except OSError as error:
            self._error = f"{self.path}: {error.strerror}"
            logger.warning("%s; no more cached blocks go to this disk", self._error)
            return False
        return True

    def _read(self, block: int, slot: int, name: BlockHash) -> bool:
        head, contents = bytearray(HEAD.size), np.empty(self._length, np.uint8)
        try:
            size = os.preadv(self._file, [head, contents.data], self._at(slot))
        except OSError as error:
            self._warn_once("cannot be read", f"slot {slot}: {error.strerror}")
            return False
        told = _told(head)
        is_good = size == HEAD.size + self._length and told is not None and told[0] == name
        if not is_good or told is None or zlib.crc32(contents.data) != told[2]:
            self._warn_once("does not hold what was written there", f"slot {slot}")
            return False
        self._region[:, block] = contents.reshape(self._region.shape[0], -1)
        return True

    def _warn_once(self, reason: str, about: str) -> None:
        """A file that rots does so in many places."""
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                "%s %s (%s); such blocks are computed again, and counted without another word",
                self.path, reason, about,
            )  # fmt: skip

    def _grow(self, slots: int) -> None:
        """Take room for at least so many slots; raises OSError where there is none."""
        if slots <= self._num_there:
            return
        wanted = min(self.num_slots, -(-slots // GROWTH) * GROWTH)
        begin = self._at(self._num_there)
        os.posix_fallocate(self._file, begin, self._at(wanted) - begin)
        self._num_there = wanted

    def _at(self, slot: int) -> int:
        return PAGE + slot * self._stride

    # ------------------------------------------------------------------ opening

    def _recall(self, identity: str) -> list[tuple[BlockHash, int]]:
        """What an earlier process left; the file is emptied where it was of something else."""
        told = {"identity": identity, "length": self._length, "stride": self._stride}
        page = json.dumps(told, sort_keys=True).encode().ljust(PAGE)
        if len(page) > PAGE:
            raise BadConfig(f"{self.path}: the name of what it is of is too long")
        if os.pread(self._file, PAGE, 0) != page:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, page, 0)
            return []
        size = os.fstat(self._file).st_size
        if size > self._at(self.num_slots):  # it was allowed more before
            os.ftruncate(self._file, self._at(self.num_slots))
        self._num_there = min(self.num_slots, max(0, size - PAGE) // self._stride)
        found: dict[BlockHash, tuple[int, int]] = {}
        for slot in range(self._num_there):
            head = _told(os.pread(self._file, HEAD.size, self._at(slot)))
            if head is not None and head[1] >= found.get(head[0], (0, 0))[0]:
                found[head[0]] = head[1], slot
                self._stamp = max(self._stamp, head[1])
        return [(name, slot) for name, (_, slot) in sorted(found.items(), key=lambda one: one[1])]


def stride_of(length: int) -> int:
    """What a block of `length` bytes takes of the file."""
    return -(-(HEAD.size + length) // PAGE) * PAGE


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadConfig(
            f"{path} cannot be opened for cached blocks: {error.strerror}",
            hint="cache.tiers.dir names a folder that can be written",
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise BadConfig(
            f"{path} is another engine's", hint="give each server a cache.tiers.dir of its own"
        ) from None
    return file


def _head(name: BlockHash, stamp: int, contents: np.ndarray) -> bytes:
    told = HEAD.pack(MAGIC, name, stamp, contents.nbytes, zlib.crc32(contents.reshape(-1).data), 0)
    return told[:-4] + struct.pack("<I", zlib.crc32(told[:-4]))


def _told(head: bytes | bytearray) -> tuple[BlockHash, int, int] | None:
    """Name, stamp and checksum of the contents; None: this is no head."""
    if len(head) < HEAD.size:
        return None
    magic, name, stamp, _, checksum, own = HEAD.unpack(head)
    if magic != MAGIC or zlib.crc32(bytes(head[:-4])) != own:
        return None
    return BlockHash(name), stamp, checksum


def _write_all(file: int, pieces: Sequence[bytes | memoryview], at: int) -> None:
    """os.pwritev may write less."""
    data = [memoryview(piece).cast("B") for piece in pieces]
    while data:
        done = os.pwritev(file, data, at)
        at += done
        while data and done >= len(data[0]):
            done -= len(data.pop(0))
        if data:
            data[0] = data[0][done:]
