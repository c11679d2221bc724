"""Decode steps recorded once and played again: a step of many small kernels costs one launch.

A recorded step reads and writes fixed memory, so there is one for each of a few batch sizes, and a step takes the
next larger one. Rows that are left over belong to nobody: they read and write a spare block of the cache. All sizes
share memory, as only one is played at a time; the largest is recorded first.

Only plain decode steps are played: one token a job, every row sampled, all layers at once. A model of experts decides
on the host which of them to read and is not recorded. A step that is played has no boundaries to stop at; it ends
sooner than one that has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.engine.torch.decoder import Decoder, StepInput
from penstock.engine.torch.ports import StepMeta
from penstock.engine.torch.step import StepArrays

Play = Callable[[], None]


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then every eighth, up to `most` or the first above."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], sizes[-1] + 8))
    return sizes


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
class _Slot:
    """Fixed memory of one batch size. `staged` is where the host writes: one tensor for each of `inputs`."""

    inputs: dict[str, Tensor]
    staged: dict[str, Tensor]
    play: Play


class DecodeGraphs:
    """The recorded steps of a decoder. `spare_block`: of its cache, used by no job."""

    def __init__(
        self,
        decoder: Decoder,
        recorder: Recorder,
        *,
        sizes: Sequence[int],
        max_context: int,
        block_size: int,
        spare_block: int,
        device: torch.device,
    ) -> None:
        self._decoder, self._device = decoder, device
        self._max_context, self._block_size = max_context, block_size
        # Rows of nobody: one position of the spare block.
        self._vacant = {
            "ids": 0,
            "positions": 0,
            "context": 1,
            "slots": spare_block * block_size,
            "block_table": spare_block,
        }
        self._sizes, shape = sorted(sizes), decoder.shape
        most = self._sizes[-1]
        # Of all sizes, and held by none of them: what a recording leaves alive cannot be used by the next.
        self._hidden = torch.zeros(most, shape.hidden, dtype=decoder.embedding.dtype, device=device)
        self._logits = torch.zeros(most, shape.vocab_size, device=device)
        self._slots = {size: self._record(size, recorder) for size in reversed(self._sizes)}

    def play(self, arrays: StepArrays) -> tuple[Tensor, Tensor] | None:
        """(hidden [R, hidden], logits fp32 [R, vocabulary]), kept until the next; None: not a step to play."""
        count = len(arrays.ids)
        if not arrays.is_plain_decode or count > self._sizes[-1]:
            return None
        slot = self._slots[next(size for size in self._sizes if size >= count)]
        self._stage(slot, arrays, count)
        slot.play()
        return self._hidden[:count], self._logits[:count]

    def _stage(self, slot: _Slot, arrays: StepArrays, count: int) -> None:
        """What the host wrote last was read: the tokens of that step were fetched since."""
        for name in ("ids", "positions", "slots", "context"):
            staged = slot.staged[name]
            staged[:count] = torch.from_numpy(getattr(arrays, name))
            staged[count:] = self._vacant[name]
            slot.inputs[name].copy_(staged, non_blocking=True)
        # Only as many columns as somebody reads; together in memory, so that one copy does.
        table, fixed = torch.from_numpy(arrays.block_table), slot.inputs["block_table"]
        size, width = len(fixed), table.shape[1]
        staged = slot.staged["block_table"].flatten()[: size * width].view(size, width)
        staged[:count] = table
        staged[count:, 0] = self._vacant["block_table"]
        fixed[:, :width] = staged.to(self._device, non_blocking=True)

    def _record(self, size: int, recorder: Recorder) -> _Slot:
        staged = self._room(size, torch.device("cpu"), is_pinned=self._device.type == "cuda")
        inputs = self._room(size, self._device)
        for name, value in self._vacant.items():
            inputs[name].fill_(value)
        meta = StepMeta(
            query_start=torch.arange(size + 1, dtype=torch.int32, device=self._device),
            context=inputs["context"],
            block_table=inputs["block_table"],
            slots=inputs["slots"],
            max_query=1,
            max_context=self._max_context,
        )

        def run() -> None:
            hidden = _finished(
                self._decoder, StepInput(inputs["ids"], inputs["positions"], None, meta)
            )
            self._hidden[:size] = hidden
            self._logits[:size] = self._decoder.logits(hidden)

        return _Slot(inputs, staged, recorder.record(run))

    def _room(self, size: int, device: torch.device, is_pinned: bool = False) -> dict[str, Tensor]:
        width = -(-self._max_context // self._block_size)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device, pin_memory=is_pinned)

        return {
            "ids": zeros(size, dtype=torch.int64),
            "positions": zeros(size, dtype=torch.int64),
            "slots": zeros(size, dtype=torch.int64),
            "context": zeros(size, dtype=torch.int32),
            "block_table": zeros(size, width, dtype=torch.int32),
        }


def _finished(decoder: Decoder, step: StepInput) -> Tensor:
    forward = decoder.forward(step)
    try:
        while True:
            next(forward)
    except StopIteration as end:
        hidden: Tensor = end.value
        return hidden
