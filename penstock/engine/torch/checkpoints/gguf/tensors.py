"""The tensors of a GGUF file, under Hugging Face's names. Files are mapped: only what is asked for is read."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.folder import model_facts, read_json
from penstock.engine.torch.checkpoints.gguf.blocks import FLOATS, GROUP, exact, numbers
from penstock.engine.torch.checkpoints.gguf.folder import POINTER
from penstock.engine.torch.checkpoints.gguf.format import KINDS, Kind, Placed
from penstock.engine.torch.checkpoints.gguf.names import Source, sources
from penstock.engine.torch.checkpoints.hints import AGAIN, SAME
from penstock.engine.torch.checkpoints.stored import Part
from penstock.engine.torch.quantised import Quantised, quantise, stacked

BY_NAME = {kind.name: kind for kind in KINDS.values()}
ROWS_AT_ONCE = 4096  # of what is quantised again: its fp32 form is several times as large


class GgufTensors:
    """A `Stored`. `folder` stands for the file; see folder.py."""

    def __init__(self, folder: Path) -> None:
        self._shape = model_facts(folder).shape
        self._tensors = _placed(folder)
        shapes = {name: one.shape for name, one in self._tensors.items()}
        self._sources = sources(self._shape.family, shapes)
        self._maps: dict[Path, mmap.mmap] = {}
        self._read: Counter[tuple[str, bool]] = Counter()

    @property
    def where(self) -> Path:
        return next(iter(self._tensors.values())).path

    def names(self) -> Collection[str]:
        return self._sources.keys()

    def place(self, name: str) -> Path:
        return self._of(self._sources[name].name).path

    def shape(self, name: str) -> tuple[int, ...]:
        source = self._sources[name]
        shape = self._of(source.name).shape
        if source.beside is not None:
            heads, width, plain = shape
            return heads * (plain + self._of(source.beside).shape[1]), width
        if source.expert is not None:
            return shape[1:]
        is_gate = name.endswith("shared_expert_gate.weight") and len(shape) == 1
        return (1, *shape) if is_gate else shape

    def is_quantised(self, name: str) -> bool:
        source = self._sources[name]
        return source.beside is None and self._of(source.name).kind.name not in FLOATS

    def read(self, name: str, part: Part, *, as_numbers: bool = False) -> Tensor | Quantised:
        source = self._sources[name]
        placed = self._of(source.name)
        if source.beside is not None:
            return self._keys_and_values(source)[part]
        if len(part) == 1:
            return self._vector(name, source, placed)[part]
        data, inside = _blocks(self._bytes(placed, source, part[0]), placed.kind, part[1])
        if placed.kind.name in FLOATS or as_numbers:
            return numbers(placed.kind, data)[:, inside].clone()
        group = math.gcd(placed.kind.numbers, GROUP)
        if part[1].start % group or part[1].stop % group:
            raise BadModel(
                f"{placed.path}: inputs {part[1].start} to {part[1].stop} of {name} cut through groups of "
                f"{group} ({placed.kind.name})",
                hint="choose a smaller tensor_parallel, whose shares are whole groups",
            )
        held = exact(placed.kind, data)
        self._read[placed.kind.name, held is not None] += 1
        return held or _again(placed.kind, data, inside)

    def said(self) -> str | None:
        if not self._read:
            return None
        kept = sorted({kind for kind, is_exact in self._read if is_exact})
        again = sorted({kind for kind, is_exact in self._read if not is_exact})
        told = []
        if kept:
            told.append(f"{', '.join(kept)} as stored")
        if again:
            told.append(f"{', '.join(again)} quantised again, to 8 bits in groups of {GROUP}")
        return f"GGUF: {'; '.join(told)}"

    def close(self) -> None:
        self._maps.clear()

    def _of(self, name: str) -> Placed:
        placed = self._tensors.get(name)
        if placed is None:
            raise BadModel(f"{self.where} has no tensor {name!r}", hint=SAME)
        return placed

    def _whole(self, placed: Placed) -> Tensor:
        """All bytes of a tensor, uint8 [.., bytes of a row]: the file's memory, not a copy."""
        data = self._mapped(placed.path)
        if placed.first + placed.num_bytes > len(data):
            raise BadModel(f"{placed.path} has become shorter since it was opened", hint=AGAIN)
        found = torch.frombuffer(
            data, dtype=torch.uint8, offset=placed.first, count=placed.num_bytes
        )
        return found.view(*placed.shape[:-1], -1)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise BadModel(f"{path} cannot be read: {error}", hint=AGAIN) from None
        return self._maps[path]

    def _bytes(self, placed: Placed, source: Source, rows: slice) -> Tensor:
        data = self._whole(placed)
        if source.expert is not None:
            data = data[source.expert]
        if data.dim() == 1:
            data = data[None]
        turned = self._turned(source, rows)
        return data[rows] if turned is None else data[turned]

    def _vector(self, name: str, source: Source, placed: Placed) -> Tensor:
        value = numbers(placed.kind, self._whole(placed)[None])[0].clone()
        turned = self._turned(source, slice(0, len(value)))
        if turned is not None:
            value = value[turned]
        if self._shape.norm == "rms_offset" and name.endswith("norm.weight"):
            value = value.float() - 1  # stored as what multiplies
        return value

    def _turned(self, source: Source, rows: slice) -> Tensor | None:
        """Where these rows of queries or keys lie in the file; None: where they say."""
        if source.turn == "none":
            return None
        width = self._shape.head_dim
        row = torch.arange(rows.start, rows.stop)
        head, within = row // width, row % width
        half = width // 2
        return head * width + within % half * 2 + within // half

    def _keys_and_values(self, source: Source) -> Tensor:
        """Of latent attention: for each head the rows that make its key, then those that make its value."""
        assert source.beside is not None
        keys, values = (self._cube(self._of(name)) for name in (source.name, source.beside))
        return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)

    def _cube(self, placed: Placed) -> Tensor:
        flat = numbers(placed.kind, self._whole(placed).flatten(0, 1))
        return flat.view(placed.shape).float()


def _placed(folder: Path) -> Mapping[str, Placed]:
    told = cast(dict[str, list[object]], read_json(folder / POINTER)["tensors"])
    return {
        name: Placed(Path(str(path)), BY_NAME[str(kind)], tuple(shape), first)  # type: ignore[arg-type]
        for name, (path, kind, shape, first) in told.items()
    }


def _blocks(data: Tensor, kind: Kind, columns: slice) -> tuple[Tensor, slice]:
    """The blocks in which some columns lie, and where in them."""
    first, last = columns.start // kind.numbers, -(-columns.stop // kind.numbers)
    found = data[:, first * kind.num_bytes : last * kind.num_bytes].contiguous()
    before = first * kind.numbers
    return found, slice(columns.start - before, columns.stop - before)


def _again(kind: Kind, data: Tensor, inside: slice) -> Quantised:
    return stacked(
        [
            quantise(numbers(kind, some)[:, inside], 8, GROUP)
            for some in torch.split(data, ROWS_AT_ONCE)
        ]
    )
