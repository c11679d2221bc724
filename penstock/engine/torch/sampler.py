"""From logits to tokens, for a whole batch at once.

Order: logit bias, minimum length (stop tokens banned), repetition / presence / frequency penalties, temperature,
min-p, top-k, top-p, draw. Log-probabilities are of the model itself, before all of this. A temperature of 0 takes
the most likely token of the shaped logits.

Cost rules: nothing sorts the vocabulary and nothing draws a number per vocabulary entry. A batch of greedy rows
without wishes is one argmax. A row is drawn with one uniform through the inverse of its cumulated distribution: rows
without limits over the vocabulary in id order (first the run of RUN entries is found, by the sums of runs, then the
entry in it), rows with top-k, top-p or min-p over their most likely candidates in falling order. Candidates are as
many as top-k says; without top-k they start at FIRST_CANDIDATES and are widened only for rows whose limits reach
further. Which path a row takes depends on its own parameters alone, so a draw never depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from penstock.core.types import TokenLogprob
from penstock.engine.torch.chance import uniforms
from penstock.engine.torch.jobs import JobState, JobTable

FIRST_CANDIDATES = 64
WIDEN = 16
RUN = 128


class Drawn(NamedTuple):
    """`is_broken` rows had no finite logits: their model or their bias is at fault."""

    ids: list[int]
    is_broken: list[bool]
    logprobs: list[TokenLogprob | None]


def draw(logits: Tensor, table: JobTable, jobs: Sequence[JobState]) -> Drawn:
    """One token for each row of fp32 logits [R, V]; row r belongs to jobs[r]. May write into `logits`."""
    rows = np.array([job.row for job in jobs])
    chosen = table.sampling[rows]
    if chosen["is_plain"].all():
        ids, is_broken = _most_likely(logits)
        return Drawn(ids.tolist(), is_broken, [None] * len(jobs))
    raw = (
        logits.clone() if chosen["has_logprobs"].any() else logits
    )  # what follows writes into logits
    for at in np.flatnonzero(chosen["is_shaped"]).tolist():
        _shape(logits[at], table, jobs[at])
    ids, is_broken = _most_likely(logits)
    warm = np.flatnonzero(chosen["temperature"])
    if len(warm):
        counts = (table.known[rows] - [job.num_prompt for job in jobs]).astype(np.int64)
        where = torch.from_numpy(warm).to(logits.device)
        some = logits if len(warm) == len(jobs) else logits[where]
        ids[where] = _draw_warm(some, chosen[warm], counts[warm])
    logprobs: list[TokenLogprob | None] = [None] * len(jobs)
    wanting: list[int] = np.flatnonzero(chosen["has_logprobs"]).tolist()
    if wanting:
        told = [jobs[at].sampling.logprobs or 0 for at in wanting]
        where = torch.tensor(wanting, device=logits.device)
        for at, entry in zip(wanting, token_logprobs(raw[where], ids[where], told), strict=True):
            logprobs[at] = entry
    return Drawn(ids.tolist(), is_broken, logprobs)


def _most_likely(logits: Tensor) -> tuple[Tensor, list[bool]]:
    """The likeliest token of each row; True for rows whose best is no finite number (it is NaN if anything is)."""
    if logits.device.type != "cpu":
        best, ids = logits.max(-1)
        return ids, (~torch.isfinite(best)).tolist()
    array = logits.numpy()  # its argmax takes a tenth of torch's on one thread
    found = array.argmax(-1)
    best_found = array[np.arange(len(found)), found]
    return torch.from_numpy(found), (~np.isfinite(best_found)).tolist()


def token_logprobs(logits: Tensor, ids: Tensor, tops: Sequence[int]) -> list[TokenLogprob]:
    """The model's log-probability of ids[r] in row r, with the tops[r] most likely alternatives."""
    total = logits.logsumexp(-1)
    own = (logits.gather(1, ids[:, None]).squeeze(1) - total).tolist()
    most = min(max(tops), logits.shape[1])
    if most == 0:
        return [TokenLogprob(*pair) for pair in zip(ids.tolist(), own, strict=True)]
    values, places = logits.topk(most)
    likely, names = (values - total[:, None]).tolist(), places.tolist()
    return [
        TokenLogprob(token, own[r], tuple(zip(names[r][: tops[r]], likely[r], strict=False)))
        for r, token in enumerate(ids.tolist())
    ]


def _shape(logits: Tensor, table: JobTable, job: JobState) -> None:
    """Biases, bans and penalties of one row [V], in place."""
    chosen, outputs = job.sampling, table.outputs(job)
    if chosen.logit_bias:
        ids, values = zip(*chosen.logit_bias, strict=True)
        logits.index_add_(0, _on(logits, ids), torch.tensor(values, device=logits.device))
    if len(outputs) < chosen.min_tokens and job.stops:
        logits[_on(logits, sorted(job.stops))] = -torch.inf
    if chosen.repetition_penalty != 1.0:
        seen = _on(logits, np.unique(table.tokens[job.row, : table.known[job.row]]))
        old = logits[seen]
        factor = chosen.repetition_penalty
        logits[seen] = torch.where(old > 0, old / factor, old * factor)
    if len(outputs) and (chosen.presence_penalty or chosen.frequency_penalty):
        used, counts = np.unique(outputs, return_counts=True)
        cost = chosen.presence_penalty + chosen.frequency_penalty * counts
        logits[_on(logits, used)] -= torch.from_numpy(cost.astype(np.float32)).to(logits.device)


def _on(logits: Tensor, ids: Sequence[int] | NDArray[np.int32]) -> Tensor:
    return torch.as_tensor(np.asarray(ids, np.int64), device=logits.device)


def _draw_warm(logits: Tensor, chosen: NDArray[np.void], counts: NDArray[np.int64]) -> Tensor:
    """Tokens for rows with a temperature. Writes into `logits`."""
    device = logits.device
    heat = _column(chosen, "temperature", device)
    logits = logits.sub_(logits.amax(-1, keepdim=True)).div_(heat[:, None])
    chance = torch.from_numpy(uniforms(chosen["seed"], chosen["answer"], counts)).to(device)
    ids = torch.empty(len(logits), dtype=torch.int64, device=device)
    limited = chosen["is_limited"]
    free = np.flatnonzero(~limited)
    if len(free):
        where = torch.from_numpy(free).to(device)
        some = logits if len(free) == len(ids) else logits[where]
        ids[where] = _draw_free(some.exp_(), chance[where])
    rest, width = np.flatnonzero(limited), FIRST_CANDIDATES
    while len(rest):
        left = chosen[rest]
        asked = left["top_k"][left["top_k"] < logits.shape[1]]
        where = torch.from_numpy(rest).to(device)
        most = min(max(width, int(asked.max(initial=0))), logits.shape[1])
        found, is_done = _draw_limited(logits[where], left, chance[where], most)
        ids[where] = found
        rest, width = rest[~is_done.cpu().numpy()], width * WIDEN
    return ids


def _draw_free(weights: Tensor, chance: Tensor) -> Tensor:
    """Entries of unnormalised weights [R, V], by the inverse of their running sum."""
    size = weights.shape[1]
    if short := -size % RUN:
        weights = F.pad(weights, (0, short))
    runs = weights.unflatten(1, (-1, RUN))  # type: ignore[no-untyped-call]
    edges = runs.sum(-1).double().cumsum(-1)
    goal = chance[:, None] * edges[:, -1:]
    run = _entry(edges, goal)[:, None]
    inside = runs.gather(1, run[:, :, None].expand(-1, 1, RUN)).squeeze(1).double().cumsum(-1)
    before = F.pad(edges, (1, 0)).gather(1, run)
    return ((run * RUN).squeeze(1) + _entry(inside, goal - before)).clamp_(max=size - 1)


def _draw_limited(
    logits: Tensor, chosen: NDArray[np.void], chance: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Tokens from the `width` most likely candidates; False where the limits may reach further."""
    device = logits.device
    top_p, min_p, top_k = (
        _column(chosen, name, device)[:, None] for name in ("top_p", "min_p", "top_k")
    )
    values, places = logits.topk(width)
    floor = values[:, :1] + min_p.log()  # min_p 0: minus infinity
    rank = torch.arange(width, device=device)
    keep = (rank < top_k) & (values >= floor)
    within = torch.where(keep, values, -torch.inf).logsumexp(-1, keepdim=True)
    mass = within
    if bool((top_k > width).any()):
        over = torch.where(logits >= floor, logits, -torch.inf) if min_p.any() else logits
        mass = torch.where(top_k <= width, within, over.logsumexp(-1, keepdim=True))
    weights = torch.where(keep, (values - mass).exp(), 0.0).double()
    before = weights.cumsum(-1) - weights
    keep &= (before < top_p) | (top_p >= 1.0)
    is_done = ~keep[:, -1] | (top_k[:, 0] <= width) | (width == logits.shape[1])
    picked = _invert(torch.where(keep, weights, 0.0), chance)
    return places.gather(1, picked[:, None]).squeeze(1), is_done


def _column(chosen: NDArray[np.void], name: str, device: torch.device) -> Tensor:
    return torch.from_numpy(chosen[name].copy()).to(device)


def _invert(weights: Tensor, chance: Tensor) -> Tensor:
    """Index of the entry in which `chance` of each row's total weight falls. Entries of weight 0 are never hit."""
    edges = weights.double().cumsum(-1)
    return _entry(edges, chance[:, None] * edges[:, -1:])


def _entry(edges: Tensor, goal: Tensor) -> Tensor:
    """Where in the running sums `edges` [R, N] each goal [R, 1] falls."""
    found = torch.searchsorted(edges, goal.contiguous(), right=True)
    # rounding may put the goal on the last edge: step back to the entry that reaches it
    last = torch.searchsorted(edges, edges[:, -1:].contiguous())
    # a row that is not finite has no such entry: any will do, the row is told as broken
    return torch.minimum(found, last).clamp_(max=edges.shape[1] - 1).squeeze(1)
