"""Steps with prompts in them, recorded once and played again, where launching them takes longer than computing them.

A recording has a fixed number of tokens and of chunks; a step takes the next larger ones. What is left over of the
tokens belongs to no chunk: attention leaves those rows as they are, whatever is in them is written to the spare block,
and nobody reads a row but its own chunk. Chunks that are left over are empty. So prompts, parts of prompts and decoding
may be mixed as they come, as far as nothing but the next tokens is wanted of them.

A step that is played cannot be left between two layers, so none is kept that takes longer than LONGEST_S; longer ones
take longer to compute than to launch, and would gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine.torch.cuda.graphs import Play, Recorder, Room, finished
from penstock.engine.torch.decoder import Decoder, StepInput
from penstock.engine.torch.ports import StepMeta
from penstock.engine.torch.step import StepArrays

TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
CHUNKS = (4, 64)
LONGEST_S = 0.02
Longs = NDArray[np.int64]
Ints = NDArray[np.int32]


class _Arrays(NamedTuple):
    """Memory of the largest step, of which smaller ones use the beginning: on the device, and where the host writes.

    longs   ids, positions, slots of the tokens; rows, of a number for each chunk
    ints    where chunks begin, and their contexts
    table   of the chunks' blocks
    """

    longs: Tensor
    ints: Tensor
    table: Tensor

    @classmethod
    def of(cls, width: int, device: torch.device, is_pinned: bool = False) -> _Arrays:
        tokens, chunks = TOKENS[-1], CHUNKS[-1]
        sizes = (
            (3 * tokens + chunks, torch.int64),
            (2 * chunks + 1, torch.int32),
            (chunks * width, torch.int32),
        )
        return cls(
            *(torch.zeros(n, dtype=t, device=device, pin_memory=is_pinned) for n, t in sizes)
        )


class PromptGraphs:
    def __init__(
        self, decoder: Decoder, recorder: Recorder, room: Room, *, tokens: tuple[int, ...] = TOKENS
    ) -> None:
        self._decoder, self._device, self._max_context = decoder, room.device, room.max_context
        self._spare_block, self._spare_slot = room.spare_block, room.spare_block * room.block_size
        self._width, device = -(-room.max_context // room.block_size), room.device
        self._inputs = _Arrays.of(self._width, device)
        self._staged = _Arrays.of(self._width, torch.device("cpu"), device.type == "cuda")
        self._longs: Longs = self._staged.longs.numpy()
        self._ints: Ints = self._staged.ints.numpy()
        self._table: Ints = self._staged.table.numpy()
        shape = decoder.shape
        self._hidden = torch.zeros(
            CHUNKS[-1], shape.hidden, dtype=decoder.embedding.dtype, device=device
        )
        self._plays: dict[tuple[int, int], tuple[Play, StepMeta]] = {}
        for count in reversed(tokens):
            for chunks in reversed(CHUNKS):
                self._record(count, chunks, recorder)
        self.sizes = sorted({count for count, _ in self._plays})

    def play(self, arrays: StepArrays) -> Tensor | None:
        """Hidden states of the rows that sample, kept until the next; None: not a step to play."""
        count, num_chunks = len(arrays.ids), len(arrays.context)
        least = max(num_chunks, len(arrays.rows))
        # Of a number of tokens there may be one for few chunks only, or for many only.
        fits = [(t, c) for t, c in self._plays if t >= count and c >= least]
        if not fits or not arrays.wants_next_tokens:
            return None
        tokens, chunks = min(fits)
        self._stage(arrays, tokens, chunks)
        self._plays[tokens, chunks][0]()
        return self._hidden[: len(arrays.rows)]

    def _stage(self, arrays: StepArrays, tokens: int, chunks: int) -> None:
        """What the host wrote last was read: a step is over when the card is done with it."""
        count, num_chunks = len(arrays.ids), len(arrays.context)
        long = self._longs[: 3 * tokens].reshape(3, tokens)
        long[0, :count], long[1, :count], long[2, :count] = (
            arrays.ids,
            arrays.positions,
            arrays.slots,
        )
        long[:2, count:] = 0
        long[2, count:] = self._spare_slot
        rows = self._longs[3 * tokens : 3 * tokens + chunks]
        rows[: len(arrays.rows)], rows[len(arrays.rows) :] = arrays.rows, 0
        starts, context = self._ints[: chunks + 1], self._ints[chunks + 1 : 2 * chunks + 1]
        starts[: num_chunks + 1], starts[num_chunks + 1 :] = arrays.query_start, count
        context[:num_chunks], context[num_chunks:] = arrays.context, 1
        for part, size in (("longs", 3 * tokens + chunks), ("ints", 2 * chunks + 1)):
            staged, inputs = getattr(self._staged, part), getattr(self._inputs, part)
            inputs[:size].copy_(staged[:size], non_blocking=True)
        # Only as many columns as somebody reads; together in memory, so that one copy does.
        width = arrays.block_table.shape[1]
        self._table[: num_chunks * width].reshape(num_chunks, width)[:] = arrays.block_table
        near = self._staged.table[: num_chunks * width].view(num_chunks, width)
        fixed = self._inputs.table[: chunks * self._width].view(chunks, self._width)
        fixed[:num_chunks, :width] = near.to(self._device, non_blocking=True)

    def _record(self, tokens: int, chunks: int, recorder: Recorder) -> None:
        held, ints = self._inputs.longs.zero_(), self._inputs.ints
        held[2 * tokens : 3 * tokens] = self._spare_slot
        ints[1 : chunks + 1] = tokens  # one chunk of them all, while this is recorded
        ints[chunks + 1 : 2 * chunks + 1] = tokens
        table = self._inputs.table[: chunks * self._width].view(chunks, self._width)
        table.fill_(self._spare_block)
        meta = StepMeta(
            query_start=ints[: chunks + 1],
            context=ints[chunks + 1 : 2 * chunks + 1],
            block_table=table,
            slots=held[2 * tokens : 3 * tokens],
            max_query=max(2, tokens),
            max_context=self._max_context,
        )
        rows = held[3 * tokens : 3 * tokens + chunks]
        step = StepInput(held[:tokens], held[tokens : 2 * tokens], rows, meta)

        def run() -> None:
            self._hidden[:chunks] = finished(self._decoder, step)

        if tokens > self._max_context:
            return
        try:
            play = recorder.record(run)
        except torch.OutOfMemoryError:
            return  # it was run before it was to be recorded; smaller ones may do
        if _seconds(play, self._device) <= LONGEST_S:
            self._plays[tokens, chunks] = play, meta


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """By the device's clock; where it has none it does not matter."""
    if device.type != "cuda":
        return 0.0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
