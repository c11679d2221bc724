"""Kernel calls that are recorded once and then run many times, a whole piece of a forward by one call.

Theory. Weights stream through the caches between two calls, so whatever Python needs for the next call is never near:
a call that costs 3 us in a tight loop costs 50 in a forward. A program holds the filled structs of all calls of a
forward over fixed buffers; a step writes into them what changes (how many rows, where the step's arrays are) with one
array operation for each thing that changes, and runs each piece by one call into the library.

Rules.
- A recorder is given the very entries and structs that the plain calls use, so both compute the same bits.
- A program belongs to its buffers, and buffers to one step at a time: two steps under way need two of them.
- What has no kernel is recorded as a Python function, and run in its place in the order.
- A thread that has a `Halt` runs pieces on end by one call, which looks at the halt between any two: whoever wants
  something of the thread sets it, and gets it after the piece that runs. Without one, pieces run one at a time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine.torch.kernels import library as native

ALIGNMENT = 64
Entry = Callable[[int, object, int], None]
Native = tuple[int, int]  # address of the first step, how many
Segment = Native | Callable[[], None]
Moving = Mapping[str, object]  # field of a struct -> key of the value that each step puts there


class Halt:
    """Asks a thread to look up after the piece it is in. Set by any thread."""

    def __init__(self) -> None:
        self._told = ctypes.c_int32(0)
        self.address = ctypes.addressof(self._told)

    def set(self, is_asked: bool) -> None:
        self._told.value = int(is_asked)

    def bind(self) -> None:
        """To the thread that calls this."""
        _OF_THREAD.halt = self


_OF_THREAD = threading.local()


class ProgramStep(ctypes.Structure):
    _fields_: ClassVar = [("entry", ctypes.c_void_p), ("call", ctypes.c_void_p)]


@runtime_checkable
class Recordable(Protocol):
    """A linear layer whose call can be recorded."""

    def record(self, into: Recorder, x: Tensor, out: Tensor) -> None:
        """x [rows, in] -> out [rows, out]; the first `Recorder.ROWS` rows of both."""
        ...


class Turns(Protocol):
    """Cosines and sines by position; see RopeTable."""

    def upto(self, context: int) -> Tensor: ...


@dataclass(slots=True)
class Now:
    """What recorded Python functions see of the step that runs."""

    rows: int
    positions: Tensor
    max_context: int = 1


class Recorder:
    """Collects the calls of a forward over buffers of `rows` rows; `program` ends it."""

    ROWS = "rows"

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self.library, self.table = native.pick(None)
        self.tensors: list[Tensor] = []  # kept alive: the structs hold addresses
        self._scratch: dict[tuple[str, int], Tensor] = {}
        self._calls: list[tuple[Entry, ctypes.Structure, Moving]] = []
        self._pieces: list[list[Segment]] = [[]]
        self.now = Now(rows, torch.zeros(rows, dtype=torch.int64))
        self.turns: set[Turns] = set()

    def buffer(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros of the operating system's: rows that no step has used take no memory."""
        dtype = dtype or self.dtype
        found = torch.from_numpy(np.zeros(self.rows * width * dtype.itemsize, np.uint8))
        found = found.view(dtype).view(self.rows, width)
        self.tensors.append(found)
        return found

    def scratch(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer that every layer uses again."""
        key = (f"{name} {dtype}", width)
        if key not in self._scratch:
            self._scratch[key] = self.buffer(width, dtype)
        return self._scratch[key]

    def call(self, entry: Entry, call: ctypes.Structure, moving: Moving) -> None:
        piece = self._pieces[-1]
        first = len(self._calls)
        if piece and isinstance(piece[-1], tuple):
            first, count = piece[-1]
            piece[-1] = (first, count + 1)
        else:
            piece.append((first, 1))
        self._calls.append((entry, call, moving))

    def python(self, run: Callable[[], None]) -> None:
        self._pieces[-1].append(run)

    def linear(self, linear: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> None:
        if isinstance(linear, Recordable):
            linear.record(self, x, out)
            return

        def run() -> None:
            rows = self.now.rows
            out[:rows].copy_(linear(x[:rows]))

        self.python(run)

    def end_piece(self) -> None:
        self._pieces.append([])

    def program(self) -> Program:
        assert not self._pieces[-1], "the last piece was not ended"
        return Program(self, self._calls, self._pieces[:-1])


class Program:
    """See the module's text."""

    def __init__(
        self,
        recorder: Recorder,
        calls: Sequence[tuple[Entry, ctypes.Structure, Moving]],
        pieces: Sequence[Sequence[Segment]],
    ) -> None:
        self._kept = recorder.tensors
        self._run, self._table = recorder.library.program, recorder.table
        places, size = [], 0
        for _, call, _ in calls:
            places.append(size)
            size += -(-ctypes.sizeof(call) // ALIGNMENT) * ALIGNMENT
        self._bytes = np.zeros(size + ALIGNMENT, np.uint8)
        skew = -self._bytes.ctypes.data % ALIGNMENT
        self._bytes = self._bytes[skew : skew + size]
        base = self._bytes.ctypes.data
        self._steps = (ProgramStep * len(calls))()
        for place, (entry, call, _), step in zip(places, calls, self._steps, strict=True):
            self._bytes[place : place + ctypes.sizeof(call)] = np.frombuffer(bytes(call), np.uint8)
            step.entry = ctypes.cast(entry, ctypes.c_void_p).value  # type: ignore[arg-type]
            step.call = base + place
        at, each = ctypes.addressof(self._steps), ctypes.sizeof(ProgramStep)
        self._pieces = [
            [(at + s[0] * each, s[1]) if isinstance(s, tuple) else s for s in piece]
            for piece in pieces
        ]
        self._moving = self._find_moving(places, calls)
        self._all = recorder.library.pieces
        alone = [p[0] for p in self._pieces if len(p) == 1]
        self._counts = np.array([one[1] for one in alone if isinstance(one, tuple)], np.int64)

    def _find_moving(
        self, places: Sequence[int], calls: Sequence[tuple[Entry, ctypes.Structure, Moving]]
    ) -> list[tuple[object, NDArray[Any], NDArray[np.int64]]]:
        """(key, a view of all structs in the field's width, where in it)"""
        found: dict[tuple[object, int], list[int]] = {}
        for place, (_, call, moving) in zip(places, calls, strict=True):
            for name, key in moving.items():
                field = getattr(type(call), name)
                assert (place + field.offset) % field.size == 0
                found.setdefault((key, field.size), []).append((place + field.offset) // field.size)
        views: dict[int, NDArray[Any]] = {
            4: self._bytes.view(np.int32),
            8: self._bytes.view(np.int64),
        }
        return [(key, views[size], np.array(at)) for (key, size), at in found.items()]

    def set(self, values: Mapping[object, int]) -> None:
        """What this step has: a value for each key that was recorded."""
        for key, view, at in self._moving:
            view[at] = values[key]

    def run(self, piece: int, threads: int) -> None:
        for segment in self._pieces[piece]:
            if isinstance(segment, tuple):
                self._run(self._table, segment[0], segment[1], threads)
            else:
                segment()

    def run_on(self, first: int, end: int, threads: int) -> int:
        """Run pieces from the first on, as many as nobody minds; the one that is next."""
        halt: Halt | None = getattr(_OF_THREAD, "halt", None)
        if halt is None or len(self._counts) < len(self._pieces):
            self.run(first, threads)
            return first + 1
        steps, counts = self._pieces[first][0], self._counts.ctypes.data + 8 * first
        assert isinstance(steps, tuple)
        done: int = self._all(self._table, steps[0], counts, end - first, halt.address, threads)
        return first + done

    @property
    def num_native(self) -> int:
        return sum(isinstance(segment, tuple) for piece in self._pieces for segment in piece)

    @property
    def num_python(self) -> int:
        return sum(not isinstance(segment, tuple) for piece in self._pieces for segment in piece)
