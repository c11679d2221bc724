"""What a log says of a request that arrives. In a file of its own, which is compiled (core.compiled)."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from penstock.core.events import Arrived
from penstock.core.moving import JobState
from penstock.core.prompt import TracedPrompt
from penstock.core.types import BlockHash, Request


def arrival_of(
    request: Request,
    *,
    at: float,
    who: str,
    seq: int,
    hashes: Sequence[BlockHash],
    state: JobState | None = None,
    move: int | UnsetType = UNSET,
) -> Arrived:
    """What is to be known of a request to take its decisions again; `hashes` are those it was taken in with."""
    prompt = request.prompt
    traced = prompt if isinstance(prompt, TracedPrompt) and prompt.hash_ids and hashes else None
    return Arrived(
        at=at,
        who=who,
        request=request.id,
        seq=seq,
        model=request.model,
        num_prompt=prompt.num_tokens,
        max_tokens=request.sampling.max_tokens,
        n=request.n,
        tenant=request.tenant,
        priority=request.priority,
        slo=request.slo,
        adapter=request.adapter,
        program=request.program,
        request_kind=request.kind,
        hashes=tuple([each.hex() for each in hashes]) if hashes and traced is None else (),
        hash_ids=() if traced is None else traced.hash_ids,
        traced_size=None if traced is None else traced.traced_size,
        salt="" if traced is None else traced.salt,
        is_scored=request.scores_prompt,
        num_output=UNSET if state is None else state.num_output,
        ages=UNSET if state is None else (state.age_s, state.first_token_age_s),
        move=move,
        images=tuple([part.num_tokens for part in request.parts]) if request.parts else UNSET,
    )
