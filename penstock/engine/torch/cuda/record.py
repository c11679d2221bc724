"""What of a model's steps is recorded when it is opened, and how that is told."""

from __future__ import annotations

from penstock.engine.torch.cuda import experts
from penstock.engine.torch.cuda.graphs import (
    CudaRecorder,
    DecodeGraphs,
    Recorder,
    Room,
    batch_sizes,
)
from penstock.engine.torch.cuda.prompts import PromptGraphs
from penstock.engine.torch.decoder import Decoder


def record(
    decoder: Decoder, room: Room, most_jobs: int, recorder: Recorder | None = None
) -> tuple[DecodeGraphs | None, str]:
    """The recordings, and what they are of; or why there are none."""
    recorder = recorder or CudaRecorder()
    if decoder.shape.experts is not None:
        reason = experts.why_not(decoder)
        if reason is not None:
            return None, f"none: {reason}"
        sizes = batch_sizes(min(most_jobs, experts.MOST_ROWS))
        mixtures = experts.open_mixtures(decoder)
        made = DecodeGraphs(decoder, recorder, room, sizes=sizes, mixtures=mixtures)
        return made, f"decode steps of up to {sizes[-1]} jobs, {len(sizes)} sizes"
    sizes = batch_sizes(most_jobs)
    made = DecodeGraphs(decoder, recorder, room, sizes=sizes)
    # Second: it may give up recordings, and memory that no recording holds any more is no longer theirs to share.
    prompts = PromptGraphs(decoder, recorder, room)
    made.prompts = prompts if prompts.sizes else None
    longest = f"{prompts.sizes[-1]} tokens" if prompts.sizes else "none"
    said = (
        f"decode steps of up to {sizes[-1]} jobs, {len(sizes)} sizes; with prompts, up to {longest}"
    )
    return made, said
