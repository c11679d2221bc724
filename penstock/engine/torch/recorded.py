"""The decoder's layers as programs of kernel calls (kernels/program.py), for steps of few rows on a CPU.

    piece 2i, 2i + 1    attention, MLP of layer i: the same pieces, with the same bits, as the plain forward's

On a lane's thread pieces run on end, and the forward yields only after the last one or when the lane is wanted.

A thread has one `Space`: buffers of MOST_ROWS rows, of which only those that are used take memory, and the program over
them. A step is its guest (`Visit`) from its beginning to its end. Between two pieces all that a step holds are two rows
of hidden numbers a token; when it is left and another step runs, they are moved out of the buffers, and back before it
goes on. Steps of more rows, where Python's part is small and buffers are large, run plainly. What has no kernel (a
mixture's routing, latent heads, a linear layer of another library) is called in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.engine.torch.adapters.rows import AdapterRows
from penstock.engine.torch.heads import GroupedHeads
from penstock.engine.torch.kernels import CpuPagedAttention, available
from penstock.engine.torch.kernels.program import Recorder
from penstock.engine.torch.kernels.recording import USER_ROWS, USER_SLOTS, USERS
from penstock.engine.torch.mlp import PlainMlp
from penstock.engine.torch.norms import Norm, RmsNorm
from penstock.engine.torch.ports import StepMeta

if TYPE_CHECKING:
    from penstock.engine.torch.decoder import Decoder, Layer, StepInput

MOST_ROWS = 256


@dataclass(slots=True, eq=False)
class Visit:
    """One step's stay: `x` and `part` [T, hidden] while they are not in the space's buffers."""

    step: StepInput
    num_rows: int
    x: Tensor | None
    part: Tensor | None = None  # None with an x: zeros


class Space:
    """Buffers, the program of all layers over them, and the visit whose rows they hold."""

    def __init__(
        self, decoder: Decoder, backend: CpuPagedAttention, layers: Sequence[Layer]
    ) -> None:
        self._decoder, self.backend, self.layers = decoder, backend, layers
        recorder = self._recorder = Recorder(MOST_ROWS, decoder.embedding.dtype)
        hidden = decoder.embedding.shape[1]
        self._x, self._part, self._normed = (recorder.buffer(hidden) for _ in range(3))
        self._visit: Visit | None = None
        self._turns: list[Tensor] = []
        self._nowhere = recorder.now.positions
        for layer in layers:
            self._record(layer)
        self.program = recorder.program()

    def run(self, visit: Visit, piece: int, end: int, threads: int) -> int:
        """Some pieces from this one on; the one that is next."""
        if self._visit is not visit:
            self._exchange(visit)
        if visit.step.adapters is not None:
            visit.step.adapters.enter()  # for what is called in its place
        return self.program.run_on(piece, end, threads)

    def end(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """What came out: views of the buffers, good until this thread runs another step, or what was moved out."""
        if visit.x is not None and visit.part is not None:
            return visit.x, visit.part
        assert self._visit is visit
        return self._x[: visit.num_rows], self._part[: visit.num_rows]

    def leave(self, visit: Visit) -> None:
        if self._visit is visit:
            self._visit, self._turns = None, []
            self._recorder.now.positions = self._nowhere

    def _exchange(self, visit: Visit) -> None:
        """Move out whose rows are here, and this visit's in."""
        other, count = self._visit, visit.num_rows
        if other is not None:
            rows = slice(other.num_rows)
            other.x, other.part = self._x[rows].clone(), self._part[rows].clone()
        assert visit.x is not None and count <= MOST_ROWS and visit.x.dtype == self._x.dtype
        self._x[:count].copy_(visit.x)
        if visit.part is None:
            self._part[:count].zero_()
        else:
            self._part[:count].copy_(visit.part)
        self._visit, visit.x, visit.part = visit, None, None
        self._place(visit)

    def _place(self, visit: Visit) -> None:
        """Have the program work on this step's arrays."""
        step, meta = visit.step, visit.step.meta
        assert step.positions.is_contiguous() and meta.slots.is_contiguous()
        assert meta.block_table.stride(1) == 1
        now = self._recorder.now
        now.rows, now.positions, now.max_context = visit.num_rows, step.positions, meta.max_context
        turns = {table: table.upto(meta.max_context) for table in self._recorder.turns}
        self._turns = list(turns.values())  # another lane may make a longer one and drop this
        self.program.set(
            {
                Recorder.ROWS: visit.num_rows,
                "chunks": len(meta.context),
                "table_stride": meta.block_table.stride(0),
                "positions": step.positions.data_ptr(),
                "query_start": meta.query_start.data_ptr(),
                "context": meta.context.data_ptr(),
                "block_table": meta.block_table.data_ptr(),
                "slots": meta.slots.data_ptr(),
            }
            | {table: found.data_ptr() for table, found in turns.items()}
            | _told_of(step.adapters)
        )

    def _record(self, layer: Layer) -> None:
        recorder, normed, part = self._recorder, self._normed, self._part
        self._record_norm(layer.attention_norm, normed)
        heads, backend = layer.attention, self.backend
        if isinstance(heads, GroupedHeads) and heads.wide_norm is None:
            heads.record(recorder, normed, part, backend)
        else:
            recorder.python(lambda: self._put(layer.attention(*self._seen(), backend)))
        self._record_post(layer.attention_post)
        recorder.end_piece()
        assert layer.mlp_norm is not None
        self._record_norm(layer.mlp_norm, normed)
        mlp = layer.mlp
        if isinstance(mlp, PlainMlp) and mlp.can_record():
            mlp.record(recorder, normed, part, self._decoder.shape.intermediate)
        else:
            recorder.python(lambda: self._put(layer.mlp(self._seen()[0], self._the_step.taken)))
        self._record_post(layer.mlp_post)
        recorder.end_piece()

    def _record_norm(self, norm: Norm, out: Tensor) -> None:
        if isinstance(norm, RmsNorm):
            norm.record(self._recorder, self._part, self._x, out)
            return

        def run() -> None:
            rows = self._recorder.now.rows
            found, total = norm(self._part[:rows], self._x[:rows])
            out[:rows].copy_(found)
            self._x[:rows].copy_(total)

        self._recorder.python(run)

    def _record_post(self, norm: Norm | None) -> None:
        if isinstance(norm, RmsNorm):
            norm.record(self._recorder, None, self._part, self._part)
        elif norm is not None:
            self._recorder.python(lambda: self._put(norm(None, self._part[: self._rows])[0]))

    @property
    def _rows(self) -> int:
        return self._recorder.now.rows

    @property
    def _the_step(self) -> StepInput:
        assert self._visit is not None
        return self._visit.step

    def _seen(self) -> tuple[Tensor, Tensor, StepMeta]:
        step = self._the_step
        return self._normed[: self._rows], step.positions, step.meta

    def _put(self, part: Tensor) -> None:
        self._part[: self._rows].copy_(part)


def _told_of(adapters: AdapterRows | None) -> dict[object, int]:
    """What the calls of adapters are given."""
    if adapters is None:
        return {}
    users = adapters.users
    assert users is not None  # else the step runs plainly
    return {
        USERS: len(users.rows),
        USER_ROWS: users.rows.data_ptr(),
        USER_SLOTS: users.slots.data_ptr(),
    }


class Spaces:
    """Those of one decoder, for each thread that runs steps: one of its layers, and one of those with adapters."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._of_thread = threading.local()
        self.takes_adapters = False  # whether all that they add can be recorded

    def find(self, x: Tensor, adapters: AdapterRows | None = None) -> Space | None:
        """The one for a step of rows x; None where it is to run plainly."""
        layers: Sequence[Layer] | None = self._decoder.layers
        if adapters is not None:
            layers = self._decoder.adapted if adapters.users is not None else None
        if layers is None or (adapters is not None and not self.takes_adapters):
            return None
        backend = self._decoder.attention
        if len(x) > MOST_ROWS or not isinstance(backend, CpuPagedAttention):
            return None
        if not backend.can_record or torch.is_grad_enabled():
            return None
        kept: dict[bool, Space] = self._of_thread.__dict__.setdefault("spaces", {})
        space: Space | None = kept.get(adapters is None)
        if space is None or space.backend is not backend or space.layers is not layers:
            space = kept[adapters is None] = Space(self._decoder, backend, layers)
        return space


def spaces_of(decoder: Decoder) -> Spaces | None:
    """None where the decoder's layers cannot be recorded."""
    alone = decoder.rank.world == 1 and decoder.embedding.device.type == "cpu"
    is_known = all(layer.mlp_norm is not None and layer.early is None for layer in decoder.layers)
    return Spaces(decoder) if alone and is_known and available() else None
