"""The form of a packed model's file; see packed.py.

    magic | sizes | digest | JSON: [number type, shape, offset] of each tensor | pickle of the rest | the tensors

The file is written in whole pieces of PIECE_BYTES, because a file system that can keeps each in one large page, and a
mapping that decoding streams through for every token is slower in small ones.

In the pickle a tensor is its number, the kernels' library and the process's rank are names, and what holds a table of
the library holds the name of its instruction set: addresses mean nothing in another process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import mmap
import pickle
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.engine.torch.kernels import library as native

MAGIC = b"penstock packed\n"
SIZES = struct.Struct("<QQQ")  # of the JSON, of the pickle, of the whole file
DIGEST = hashlib.sha256
START = len(MAGIC) + SIZES.size + DIGEST().digest_size
ALIGNMENT = 4096
PIECE_BYTES = 2 << 20
FROM_TORCH = frozenset({"device", "Size", "float32", "bfloat16", "float16", "int64", "int32"})
FROM_OTHERS = frozenset(
    {("functools", "partial"), ("torch._C._nn", "gelu"), ("torch.nn.functional", "silu")}
)
OWN = "penstock."


class Unkept(Exception):
    """Why something cannot be kept, or what is kept cannot be used."""


def take_apart(thing: object, rank: object) -> tuple[bytes, list[Tensor]]:
    """(the file up to its tensors, those). Raises Unkept."""
    tensors: list[Tensor] = []
    stream = io.BytesIO()
    try:
        _Pickler(stream, tensors, rank).dump(thing)
    except (pickle.PickleError, TypeError, AttributeError) as why:
        raise Unkept(str(why)) from None
    body = stream.getvalue()
    _Unpickler(io.BytesIO(body), tensors, rank).load()  # what could not be read is not written
    table = b""
    while len(table) != len(table := _table_of(tensors, START + len(table) + len(body))):
        pass  # offsets grow with the table, which grows with them
    size = offsets[-1] if (offsets := _ends(tensors, START + len(table) + len(body))) else 0
    sizes = SIZES.pack(len(table), len(body), size)
    return MAGIC + sizes + DIGEST(sizes + table + body).digest() + table + body, tensors


def put_together(path: Path, rank: object) -> object:
    """What a file holds, its tensors in mapped memory. Raises Unkept, OSError."""
    with path.open("rb") as file:
        start = file.read(START)
        if len(start) < START or not start.startswith(MAGIC):
            raise Unkept("it does not begin as it should")
        sizes, told = start[len(MAGIC) :][: SIZES.size], start[-DIGEST().digest_size :]
        table_size, body_size, whole = SIZES.unpack(sizes)
        table, body = file.read(table_size), file.read(body_size)
        if DIGEST(sizes + table + body).digest() != told:
            raise Unkept("its head was changed")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if len(mapped) != whole:
        raise Unkept(f"it has {len(mapped)} bytes of {whole}")
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    tensors = [_tensor(mapped, *entry) for entry in json.loads(table)]
    try:
        return _Unpickler(io.BytesIO(body), tensors, rank).load()
    except (pickle.PickleError, AssertionError, TypeError) as why:
        raise Unkept(str(why)) from None


def size_of(mapped: mmap.mmap, begin: int) -> int:
    """Bytes of what lies there, for `read_from`."""
    whole: int = SIZES.unpack_from(mapped, begin + len(MAGIC))[2]
    return whole


def read_from(mapped: mmap.mmap, begin: int, rank: object) -> object:
    """What lies at `begin` of some memory in the form of such a file, its tensors where they are. Raises Unkept."""
    start = mapped[begin : begin + START]
    if not start.startswith(MAGIC):
        raise Unkept("it does not begin as it should")
    sizes, told = start[len(MAGIC) :][: SIZES.size], start[-DIGEST().digest_size :]
    table_size, body_size, _ = SIZES.unpack(sizes)
    at = begin + START
    middle = at + table_size
    table, body = mapped[at:middle], mapped[middle : middle + body_size]
    if DIGEST(sizes + table + body).digest() != told:
        raise Unkept("its head was changed")
    entries = [(dtype, shape, begin + offset) for dtype, shape, offset in json.loads(table)]
    tensors = [_tensor(mapped, *entry) for entry in entries]
    return _Unpickler(io.BytesIO(body), tensors, rank).load()


class Sink(Protocol):
    def write(self, data: memoryview, /) -> object: ...


class Pieces:
    """Writes what it is given in whole pieces, a shorter one at the end."""

    def __init__(self, file: Sink) -> None:
        self.size = 0
        self._file, self._piece = file, memoryview(bytearray(PIECE_BYTES))

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest.nbytes:
            at = self.size % PIECE_BYTES
            now = min(rest.nbytes, PIECE_BYTES - at)
            self._piece[at : at + now] = rest[:now]
            self.size, rest = self.size + now, rest[now:]
            if self.size % PIECE_BYTES == 0:
                self._file.write(self._piece)

    def align(self) -> None:
        self.write(bytes(-self.size % ALIGNMENT))

    def end(self) -> None:
        self._file.write(self._piece[: self.size % PIECE_BYTES])


def offsets_of(tensors: Sequence[Tensor], begin: int) -> list[int]:
    found, at = [], begin
    for tensor in tensors:
        at += -at % ALIGNMENT
        found.append(at)
        at += tensor.nbytes
    return found


def _ends(tensors: Sequence[Tensor], begin: int) -> list[int]:
    starts = offsets_of(tensors, begin)
    return [at + one.nbytes for at, one in zip(starts, tensors, strict=True)]


def _table_of(tensors: Sequence[Tensor], begin: int) -> bytes:
    places = zip(tensors, offsets_of(tensors, begin), strict=True)
    table = [(str(one.dtype).removeprefix("torch."), list(one.shape), at) for one, at in places]
    return json.dumps(table).encode()


def _tensor(mapped: mmap.mmap, dtype: str, shape: list[int], offset: int) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(mapped, dtype=kind, count=count, offset=offset).view(shape)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor], rank: object) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors, self._rank = tensors, rank
        self._known: dict[tuple[object, ...], int] = {}

    def persistent_id(self, thing: object) -> object:
        if isinstance(thing, Tensor):
            return "tensor", self._number(thing)
        if isinstance(thing, native.Library):
            return "library", 0
        return ("rank", 0) if thing is self._rank else None

    def reducer_override(self, thing: object) -> Any:
        if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
            return NotImplemented
        fields = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        if not isinstance(fields.get("library"), native.Library) or "table" not in fields:
            return NotImplemented
        library, table = fields.pop("library"), fields.pop("table")
        isa = next(name for name, place in library.tables.items() if place == table)
        return with_table, (type(thing), isa, fields)

    def _number(self, tensor: Tensor) -> int:
        if tensor.is_mkldnn or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise Unkept("it holds tensors in a layout of another library")
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))
        if key not in self._known:
            self._known[key] = len(self._tensors)
            self._tensors.append(tensor)
        return self._known[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: Sequence[Tensor], rank: object) -> None:
        super().__init__(stream)
        self._tensors, self._rank = tensors, rank

    def persistent_load(self, told: tuple[str, int]) -> object:
        kind, number = told
        if kind == "tensor":
            return self._tensors[number]
        return native.load() if kind == "library" else self._rank

    def find_class(self, module: str, name: str) -> object:
        """Classes and functions that this package defines itself, and a few of torch's."""
        is_torch = module == "torch" and name in FROM_TORCH
        is_own = module.startswith(OWN) and "." not in name
        if is_torch or is_own or (module, name) in FROM_OTHERS:
            found = super().find_class(module, name)
            if not is_own or getattr(found, "__module__", None) == module:
                return found
        raise Unkept(f"it names {module}.{name}")


def with_table(kind: type, isa: str, fields: dict[str, object]) -> object:
    """A packed layer over the library of this process."""
    library, table = native.pick(isa)
    return partial(kind, library=library, table=table)(**fields)
