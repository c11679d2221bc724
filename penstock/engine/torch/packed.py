"""Packed models kept in files: the next start maps the file instead of reading the checkpoint and packing it anew.

Theory. Packing touches every weight twice and takes seconds; what comes out depends on nothing but the checkpoint, this
program and the processor. So a file is named by all of these: path, size and time of each of the checkpoint's files,
the source of this room, torch's version, instruction sets, number type, method, shard. Whatever changes asks for
another name, and a file is never read by anything but the program that wrote it.

Rules.
- The file is mapped privately: replicas on one machine share its pages, and what nobody reads is never loaded.
- It is written to another name by a thread behind the first requests, and renamed when it is whole: two processes that
  start together both pack, and one of them keeps. Where it is known that several load the same (`alone`), one packs,
  writes, and then maps what it wrote like all others, so that no two hold the weights twice.
- A file that is cut or changed in its head is made anew. The tensors' bytes are not checked: that would read all.
- No disk space, a folder that cannot be written: a warning, and the engine goes on without.
- The folder holds at most `limit` bytes: what was not used for longest goes first. Models under LEAST_BYTES are packed
  in no time and not kept, nor are layouts of other libraries (oneDNN's).
- Unpickling makes objects of this package only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from penstock.engine.torch.kernels import build, isas
from penstock.engine.torch.packed_file import Pieces, Unkept, put_together, take_apart

LEAST_BYTES = 64 << 20
LIMIT_BYTES = 32 << 30
STALE_S = 3600.0  # a file half written for that long belongs to nobody
ROOM = Path(__file__).parent
PARTS_OF_A_CHECKPOINT = ("*.safetensors", "*.gguf", "*.json")
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment, unused-ignore]
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedStore:
    """`folder` None: nothing is kept. `limit`: bytes of all files in it."""

    folder: Path | None
    limit: int

    def place(self, checkpoint: Path, parts: Sequence[object]) -> Path | None:
        """The file of a checkpoint, packed as `parts` say."""
        if self.folder is None:
            return None
        digest = hashlib.sha256()
        for told in (_files(checkpoint), _program(), torch.__version__, isas(), *parts):
            digest.update(repr(told).encode() + b"\0")
        return self.folder / f"{digest.hexdigest()[:32]}.packed"

    def recall(self, place: Path | None, kind: type[T], rank: object) -> T | None:
        """What was kept there, if it is whole."""
        if place is None or not place.exists():
            return None
        try:
            found = put_together(place, rank)
            os.utime(place)
        except (OSError, ValueError, Unkept) as why:
            logger.warning("%s cannot be used (%s): packing anew", place, why)
            return None
        return found if isinstance(found, kind) else None

    @contextmanager
    def alone(self, place: Path) -> Iterator[None]:
        """Wait until no other process packs for this place. A folder that cannot be written makes nobody wait."""
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file = place.with_suffix(".lock").open("wb")
        except OSError:
            yield
            return
        with file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when this process ends
            yield

    def keep(self, place: Path | None, thing: object, rank: object) -> threading.Thread | None:
        """Begin to write a thing that recall will give; None when it is not to be kept."""
        if place is None:
            return None
        try:
            head, tensors = take_apart(thing, rank)
        except Unkept as why:
            logger.debug(
                "the packed model is not kept: %s", why
            )  # the note `packed` says where it is
            return None
        if sum(one.nbytes for one in tensors) < LEAST_BYTES:
            return None
        writer = threading.Thread(
            target=self._write, args=(place, head, tensors), name="penstock-packed", daemon=True
        )
        writer.start()
        return writer

    def _write(self, place: Path, head: bytes, tensors: Sequence[Tensor]) -> None:
        half = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}.half")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with half.open("wb") as file:
                self._make_room(half, len(head) + sum(one.nbytes for one in tensors))
                pieces = Pieces(file)
                pieces.write(head)
                for tensor in tensors:
                    pieces.align()
                    pieces.write(tensor.flatten().view(torch.uint8).numpy().data)
                pieces.end()
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, place)
        except OSError as error:
            logger.warning("the packed model cannot be kept in %s: %s", place.parent, error)
            with suppress(OSError):
                half.unlink()

    def _make_room(self, half: Path, size: int) -> None:
        folder, now = half.parent, half.stat().st_mtime
        for other in folder.glob("*.half"):
            if now - other.stat().st_mtime > STALE_S:
                other.unlink(missing_ok=True)
        kept = sorted((each.stat().st_mtime, each) for each in folder.glob("*.packed"))
        held = sum(each.stat().st_size for _, each in kept)
        while kept and held + size > self.limit:
            _, oldest = kept.pop(0)
            held -= oldest.stat().st_size
            oldest.unlink(missing_ok=True)
        if size > self.limit:
            raise OSError(f"it has {size} bytes, and {self.limit} are allowed")
        if shutil.disk_usage(folder).free < size:
            raise OSError(f"there are no {size} bytes free")


def _files(checkpoint: Path) -> list[tuple[str, int, int]]:
    found = [path for kind in PARTS_OF_A_CHECKPOINT for path in checkpoint.glob(kind)]
    found += [checkpoint] if checkpoint.is_file() else []
    told = [(os.path.realpath(path), path.stat()) for path in sorted(found)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in told]


@cache
def _program() -> str:
    """A digest of the source that packs and reads."""
    digest = hashlib.sha256()
    for path in sorted([*ROOM.rglob("*.py"), *ROOM.rglob("source/*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def store_of(told: str, kernel_cache: Path | None, limit: int) -> PackedStore:
    """`told`: "off", "auto" (a folder beside the kernels), or a folder."""
    if told == "off":
        return PackedStore(None, limit)
    if told == "auto":
        return PackedStore((kernel_cache or build.default_cache()) / "packed", limit)
    return PackedStore(Path(told).expanduser(), limit)
