"""The GGUF file format: a header of typed metadata, a table of tensors, then their bytes. Imports no torch.

Everything is little-endian. Strings and arrays state their length first; a tensor states its dimensions with the
consecutive one first, here turned round to rows first. Sizes are checked as they are read: a file that was cut short,
or is no GGUF, is a BadModel that says so.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.hints import AGAIN

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "B",
    1: "b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
ALIGNMENT = 32
MOST_DIMENSIONS = 4
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")

Metadata = Mapping[str, object]


class Kind(NamedTuple):
    """A number format: so many numbers in a block of so many bytes."""

    name: str
    numbers: int
    num_bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    16: Kind("IQ2_XXS", 256, 66),
    17: Kind("IQ2_XS", 256, 74),
    18: Kind("IQ3_XXS", 256, 98),
    19: Kind("IQ1_S", 256, 50),
    20: Kind("IQ4_NL", 32, 18),
    21: Kind("IQ3_S", 256, 110),
    22: Kind("IQ2_S", 256, 82),
    23: Kind("IQ4_XS", 256, 136),
    28: Kind("F64", 1, 8),
    29: Kind("IQ1_M", 256, 56),
    30: Kind("BF16", 1, 2),
    34: Kind("TQ1_0", 256, 54),
    35: Kind("TQ2_0", 256, 66),
    39: Kind("MXFP4", 32, 17),
}


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor: `shape` with rows first, `first` its first byte in the file."""

    path: Path
    kind: Kind
    shape: tuple[int, ...]
    first: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.kind.numbers * self.kind.num_bytes


@dataclass(frozen=True, slots=True)
class Header:
    metadata: Metadata
    tensors: Mapping[str, Placed]


def read_header(path: Path) -> Header:
    """Of one file. Raises BadModel."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise BadModel(f"{path} is not a GGUF file: it has {size} bytes", hint=AGAIN)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reading(path, data).header()
    except OSError as error:
        raise BadModel(f"{path} cannot be read: {error}") from None


def read_headers(path: Path) -> Header:
    """Of a file, and of those that are numbered with it: metadata of the first, tensors of all. Raises BadModel."""
    paths = all_parts(path)
    headers = [read_header(one) for one in paths]
    tensors = {name: placed for header in headers for name, placed in header.tensors.items()}
    told = headers[0].metadata.get("split.tensors.count")
    if isinstance(told, int) and told != len(tensors):
        raise BadModel(
            f"{paths[0]}: {len(tensors)} tensors in {len(paths)} files, the first says {told}",
            hint="all files must come from the same model: fetch them again",
        )
    return Header(headers[0].metadata, tensors)


def all_parts(path: Path) -> list[Path]:
    """The files of a model, of which `path` is one. Raises BadModel where some are missing."""
    found = NUMBERED.match(path.name)
    if found is None:
        return [path]
    stem, _, count = found.groups()
    paths = [path.with_name(f"{stem}-{at:05}-of-{count}.gguf") for at in range(1, int(count) + 1)]
    missing = [one for one in paths if not one.exists()]
    if missing:
        raise BadModel(f"{missing[0]} is missing, part of {stem}", hint="download that file")
    return paths


class _Reading:
    """A cursor over one file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            hint = "give a .gguf file, or a folder of safetensors"
            if bytes(self.data[:7]) == b"version":
                hint = "this is a Git LFS pointer: run `git lfs pull` in the folder"
            raise BadModel(f"{self.path} is not a GGUF file", hint=hint)
        version = self.number("<I")
        if version not in VERSIONS:
            told = "is big-endian" if version >> 16 else f"has version {version}"
            raise BadModel(
                f"{self.path} {told}: GGUF versions 2 and 3, little-endian, are read",
                hint="convert the model again with a current converter",
            )
        num_tensors, num_keys = self.number("<Q"), self.number("<Q")
        metadata = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.number("<I"))
        tensors = [self.tensor() for _ in range(num_tensors)]
        stated = metadata.get("general.alignment")
        alignment = stated if isinstance(stated, int) and stated > 0 else ALIGNMENT
        start = -(-self.at // alignment) * alignment
        placed = {
            name: Placed(self.path, kind, shape, start + at) for name, kind, shape, at in tensors
        }
        self.check_size(placed)
        return Header(metadata, placed)

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise BadModel(f"{self.path} ends inside its header", hint=AGAIN)
        found = self.data[self.at : self.at + count]
        self.at += count
        return found

    def number(self, form: str) -> int:
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(found)

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.number("<I"), self.number("<Q"))
        form = self.form(kind)
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return found

    def array(self, kind: int, count: int) -> list[object]:
        if kind in (STRING, ARRAY):
            if count > len(self.data):  # each takes at least a byte
                raise BadModel(f"{self.path} ends inside its header", hint=AGAIN)
            return [self.value(kind) for _ in range(count)]
        form = np.dtype(self.form(kind))
        found: list[object] = np.frombuffer(self.take(count * form.itemsize), form).tolist()
        return found

    def form(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise BadModel(f"{self.path}: metadata of unknown type {kind}", hint=AGAIN)
        return NUMBERS[kind]

    def tensor(self) -> tuple[str, Kind, tuple[int, ...], int]:
        name, count = self.string(), self.number("<I")
        if not 0 < count <= MOST_DIMENSIONS:
            raise BadModel(f"{self.path}: tensor {name!r} has {count} dimensions", hint=AGAIN)
        shape = tuple(self.number("<Q") for _ in range(count))[::-1]
        kind, first = self.number("<I"), self.number("<Q")
        if kind not in KINDS:
            raise BadModel(
                f"{self.path}: tensor {name!r} has number format {kind}, which is not known here",
                hint=f"read are {', '.join(one.name for one in KINDS.values())}",
            )
        if shape[-1] % KINDS[kind].numbers:
            raise BadModel(
                f"{self.path}: rows of tensor {name!r} have {shape[-1]} numbers, {KINDS[kind].name} "
                f"comes in blocks of {KINDS[kind].numbers}",
                hint=AGAIN,
            )
        return name, KINDS[kind], shape, first

    def check_size(self, placed: Mapping[str, Placed]) -> None:
        """Tensors lie inside the file and not over each other, as they would if a number format were a wrong one."""
        end, before = 0, ""
        for name, one in sorted(placed.items(), key=lambda pair: pair[1].first):
            if one.first < end:
                raise BadModel(
                    f"{self.path}: tensors {before!r} and {name!r} lie over each other", hint=AGAIN
                )
            end, before = one.first + one.num_bytes, name
        if end > len(self.data):
            raise BadModel(
                f"{self.path} ends inside tensor {before!r}: {len(self.data)} bytes, of which it needs {end}",
                hint=AGAIN,
            )
