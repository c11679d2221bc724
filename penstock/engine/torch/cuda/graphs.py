"""Decode steps recorded once and played again: a step of many small kernels costs one launch.

A recorded step reads and writes fixed memory, so there is one for each of a few batch sizes, and a step takes the
next larger one. Rows that are left over belong to nobody: they read and write a spare block of the cache. All sizes
share memory, as only one is played at a time; the largest is recorded first.

Here are plain decode steps: one token a job, every row sampled, all layers at once; steps with prompts are those of
prompts.py. Mixtures are recorded as experts.py has them. A step that is played has
no boundaries to stop at; it ends sooner than one that has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine.torch.decoder import Decoder, StepInput
from penstock.engine.torch.played import Played
from penstock.engine.torch.ports import StepMeta
from penstock.engine.torch.step import StepArrays

if TYPE_CHECKING:
    from penstock.engine.torch.cuda.experts import Mixtures

Play = Callable[[], None]
WHOLE_BYTES = 64 << 10  # of a table of blocks that is copied whole


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then every eighth, up to `most` or the first above."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], sizes[-1] + 8))
    return sizes


class Room(NamedTuple):
    """`spare_block`: of the cache, used by no job."""

    max_context: int
    block_size: int
    spare_block: int
    device: torch.device


class Prompts(Protocol):
    def play(self, arrays: StepArrays) -> Tensor | None: ...


class Recorder(Protocol):
    def record(self, run: Callable[[], None]) -> Play:
        """Run it, and return what runs it again, on the same memory."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Play:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and workspaces made outside the recording
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


@dataclass(slots=True)
class _Room:
    """The arrays of a step of fixed size, side by side in one piece of memory, and its table of blocks."""

    short: Tensor  # bytes
    arrays: dict[str, Tensor]
    table: Tensor  # int32 [size, width]

    @classmethod
    def of(cls, size: int, width: int, device: torch.device, is_pinned: bool = False) -> _Room:
        short = torch.zeros(28 * size, dtype=torch.uint8, device=device, pin_memory=is_pinned)
        long = short[: 24 * size].view(torch.int64).view(3, size)
        arrays = dict(zip(("ids", "positions", "slots"), long, strict=True))
        arrays["context"] = short[24 * size :].view(torch.int32)
        table = torch.zeros(size, width, dtype=torch.int32, device=device, pin_memory=is_pinned)
        return cls(short, arrays, table)


@dataclass(slots=True)
class _Slot:
    """Fixed memory of one batch size: what is read, and where the host writes it.

    `meta` has what else the recording reads: nobody else would keep it.
    """

    inputs: _Room
    staged: _Room
    written: dict[str, NDArray[np.int64]]  # of `staged`
    table: NDArray[np.int32]
    meta: StepMeta
    play: Play


class DecodeGraphs:
    """The recorded steps of a decoder. `prompts`: of steps with prompts, which another has recorded."""

    def __init__(
        self,
        decoder: Decoder,
        recorder: Recorder,
        room: Room,
        *,
        sizes: Sequence[int],
        mixtures: Mixtures | None = None,
    ) -> None:
        """`mixtures`: of a model that has any."""
        self.prompts: Prompts | None = None
        self._decoder, self._device, self._mixtures = decoder, room.device, mixtures
        self._max_context, self._block_size = room.max_context, room.block_size
        # Rows of nobody: one position of the spare block.
        self._vacant = {
            "ids": 0,
            "positions": 0,
            "context": 1,
            "slots": room.spare_block * room.block_size,
            "block_table": room.spare_block,
        }
        self._sizes, shape = sorted(sizes), decoder.shape
        most = self._sizes[-1]
        # Of all sizes, and held by none of them: what a recording leaves alive cannot be used by the next.
        self._hidden = torch.zeros(
            most, shape.hidden, dtype=decoder.embedding.dtype, device=room.device
        )
        self._logits = torch.zeros(most, shape.vocab_size, device=room.device)
        if mixtures is not None:
            mixtures.set_alone(True)
        self._slots = {size: self._record(size, recorder) for size in reversed(self._sizes)}
        if mixtures is not None:
            mixtures.set_alone(False)

    def play(self, arrays: StepArrays) -> Played:
        """What came out is kept until the next; NOT_PLAYED: not a step to play."""
        count = len(arrays.ids)
        if not arrays.is_plain_decode or count > self._sizes[-1]:
            hidden = None if self.prompts is None else self.prompts.play(arrays)
            return Played(hidden)
        slot = self._slots[next(size for size in self._sizes if size >= count)]
        self._stage(slot, arrays, count)
        slot.play()
        hidden, logits = self._hidden[:count], self._logits[:count]
        if self._mixtures is None:
            return Played(hidden, logits)
        return Played(hidden, logits, self._mixtures.taken)

    def _stage(self, slot: _Slot, arrays: StepArrays, count: int) -> None:
        """What the host wrote last was read: the tokens of that step were fetched since."""
        for name, array in slot.written.items():
            array[:count] = getattr(arrays, name)
            array[count:] = self._vacant[name]
        slot.inputs.short.copy_(slot.staged.short, non_blocking=True)
        fixed, width = slot.inputs.table, arrays.block_table.shape[1]
        if fixed.nbytes <= WHOLE_BYTES:
            slot.table[:count, :width] = arrays.block_table
            slot.table[count:, 0] = self._vacant["block_table"]
            fixed.copy_(slot.staged.table, non_blocking=True)
            return
        # Only as many columns as somebody reads; together in memory, so that one copy does.
        size = len(fixed)
        near = slot.table.reshape(-1)[: size * width].reshape(size, width)
        near[:count] = arrays.block_table
        near[count:, 0] = self._vacant["block_table"]
        staged = slot.staged.table.flatten()[: size * width].view(size, width)
        fixed[:, :width] = staged.to(self._device, non_blocking=True)

    def _record(self, size: int, recorder: Recorder) -> _Slot:
        width = -(-self._max_context // self._block_size)
        staged = _Room.of(size, width, torch.device("cpu"), self._device.type == "cuda")
        inputs = _Room.of(size, width, self._device)
        held = inputs.arrays
        for name, array in held.items():
            array.fill_(self._vacant[name])
        inputs.table.fill_(self._vacant["block_table"])
        meta = StepMeta(
            query_start=torch.arange(size + 1, dtype=torch.int32, device=self._device),
            context=held["context"],
            block_table=inputs.table,
            slots=held["slots"],
            max_query=1,
            max_context=self._max_context,
        )

        def run() -> None:
            step = StepInput(held["ids"], held["positions"], None, meta)
            hidden = finished(self._decoder, step)
            self._hidden[:size] = hidden
            self._logits[:size] = self._decoder.logits(hidden)

        written = {name: array.numpy() for name, array in staged.arrays.items()}
        return _Slot(inputs, staged, written, staged.table.numpy(), meta, recorder.record(run))


def finished(decoder: Decoder, step: StepInput) -> Tensor:
    forward = decoder.forward(step)
    try:
        while True:
            next(forward)
    except StopIteration as end:
        hidden: Tensor = end.value
        return hidden
