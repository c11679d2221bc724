"""Plans whose chunks pass different layers: decodes through all of them beside a prompt through one group.

    layers        0 .. a        a .. b              b .. L
    rows          decodes       decodes, prompt     decodes        -> decodes sample; the prompt's rows are carried on

A step's layers are cut into stretches that the same chunks pass. Within a stretch the rows of those chunks run
together, as in any other step, so that a layer's weights (in a mixture: an expert's) are read once for all of them;
between stretches all rows wait side by side in one array. A group writes the keys and values of its own layers, and
only the group that ends with the last layer may sample.

What a chunk needs to go on is the residual stream of its rows, kept with its job (`Carried`) from one plan to the
next: tokens * hidden numbers. The rows that entered the last group are kept beside those that left it, until the job's
next plan: that one may ask for the same group once more, when the plan before it was aborted before anybody heard of
its end. Nothing is carried over a preemption, nor from one chunk to another.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.core.plans import Work
from penstock.engine.torch.decoder import Decoder, Piece, StepInput
from penstock.engine.torch.jobs import Carried, JobState
from penstock.engine.torch.step import StepArrays

Range = tuple[int, int]


@dataclass(slots=True)
class Stretch:
    """A run of layers, and the chunks (places in the plan's work) that pass it."""

    layers: Range
    chunks: list[int]


def settled(work: Sequence[Work], num_layers: int) -> list[Work]:
    """Only chunks that reach the last layer sample."""
    found = []
    for chunk in work:
        first, end = chunk.layers or (0, num_layers)
        assert 0 <= first < end <= num_layers, f"there are no layers {chunk.layers}"
        found.append(chunk if end == num_layers else chunk._replace(samples=False))
    return found


def stretches_of(ranges: Sequence[Range]) -> list[Stretch]:
    """Neighbouring layers that the same chunks pass are one stretch; layers that nobody passes are in none."""
    borders = sorted({border for layers in ranges for border in layers})
    found: list[Stretch] = []
    for first, end in zip(borders, borders[1:], strict=False):
        inside = [at for at, (low, high) in enumerate(ranges) if low <= first and end <= high]
        if inside:
            found.append(Stretch((first, end), inside))
    return found


def forward_in_groups(
    decoder: Decoder,
    arrays: StepArrays,
    step: StepInput,
    *,
    work: Sequence[Work],
    jobs: Sequence[JobState],
) -> Generator[Piece, None, Tensor]:
    """`Decoder.forward` for such a plan. Leaves with each job what its chunk carries on."""
    num_layers = len(decoder.layers)
    ranges = [chunk.layers or (0, num_layers) for chunk in work]
    spans = [slice(*pair) for pair in zip(*_borders(arrays), strict=True)]
    streams = decoder.embed(step.ids)
    for (first, _), span, chunk, job in zip(ranges, spans, work, jobs, strict=True):
        if first:
            streams[span] = _entering(job, chunk, first)
    beside = streams.numel() * streams.element_size()
    for stretch in stretches_of(ranges):
        rows, part = _rows(spans, stretch.chunks, streams), arrays.part(stretch.chunks)
        inner = part.on(streams.device)
        inner.taken = step.taken
        x, change = yield from decoder.through(streams[rows], inner, stretch.layers, beside)
        streams[rows] = x.add_(change)
        del x, change
    for layers, span, chunk, job in zip(ranges, spans, work, jobs, strict=True):
        if chunk.layers is not None:
            _carry(job, chunk, layers, streams[span] if layers[1] < num_layers else None)
    return decoder.finish(streams, None, step.rows)


def _borders(arrays: StepArrays) -> tuple[list[int], list[int]]:
    borders = arrays.query_start.tolist()
    return borders[:-1], borders[1:]


def _rows(spans: Sequence[slice], chunks: Sequence[int], streams: Tensor) -> Tensor | slice:
    """The rows of some chunks; a slice where they lie together."""
    if chunks[-1] - chunks[0] + 1 == len(chunks):
        return slice(spans[chunks[0]].start, spans[chunks[-1]].stop)
    picked = np.concatenate([np.arange(spans[at].start, spans[at].stop) for at in chunks])
    return torch.from_numpy(picked).to(streams.device)


def _entering(job: JobState, chunk: Work, layer: int) -> Tensor:
    carried = job.carried
    is_there = carried is not None and carried.is_of(chunk) and layer in carried.at
    assert carried is not None and is_there, f"job {job.seq} carries nothing into layer {layer}"
    return carried.at[layer]


def _carry(job: JobState, chunk: Work, layers: Range, leaving: Tensor | None) -> None:
    first, end = layers
    at = {} if job.carried is None or not first else {first: job.carried.at[first]}
    if leaving is not None:
        at[end] = leaving.clone()
    job.carried = Carried(chunk.start, chunk.tokens, at)
