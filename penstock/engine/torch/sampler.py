"""From logits to tokens, for a whole batch at once.

Order: logit bias, minimum length (stop tokens banned), repetition / presence / frequency penalties, grammar (what it
does not allow is banned), temperature, min-p, top-k, top-p, draw. Log-probabilities are of the model itself, before all
of this. A temperature of 0 takes the most likely token of the shaped logits.

Cost rules: nothing sorts the vocabulary and nothing draws a number per vocabulary entry. A batch of greedy rows
without wishes is one argmax. A row is drawn with one uniform through the inverse of its cumulated distribution: rows
without limits over the vocabulary in id order, rows with top-k, top-p or min-p over what these leave, in falling order
(kernels.draw). Where there is no kernel, torch's topk finds their candidates: as many as top-k says; without top-k they
start at FIRST_CANDIDATES and are widened only for rows whose limits reach further. Which path a row takes depends on
its own parameters alone, so a draw never depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.core.types import TokenLogprob
from penstock.engine.torch import kernels
from penstock.engine.torch.chance import uniform
from penstock.engine.torch.jobs import JobState, JobTable
from penstock.engine.torch.kernels.draw import Limits, ban_, can_limit, entry_at
from penstock.engine.torch.wishes import Wishes

FIRST_CANDIDATES = 64
WIDEN = 16


class Drawn(NamedTuple):
    """`is_broken` rows had no finite logits: their model or their bias is at fault."""

    ids: list[int]
    is_broken: list[bool]
    logprobs: list[TokenLogprob | None]


def draw(
    logits: Tensor, table: JobTable, jobs: Sequence[JobState], ahead: Sequence[int] = ()
) -> Drawn:
    """One token for each row of fp32 logits [R, V]; row r belongs to jobs[r]. May write into `logits`.

    `ahead`: so many guesses stand between what the job knows and this row; left out, there are none.
    """
    wishes = [job.wishes for job in jobs]
    logprobs: list[TokenLogprob | None] = [None] * len(jobs)
    if all([wish.is_plain for wish in wishes]):
        ids, best = kernels.pick_tokens(logits)
        return Drawn(ids, _broken(best), logprobs)
    wanting = [row for row, wish in enumerate(wishes) if wish.has_logprobs]
    shaped = [row for row, wish in enumerate(wishes) if wish.is_shaped]
    raw = logits.clone() if wanting and shaped else logits
    ahead = ahead or [0] * len(jobs)
    for row in shaped:
        _shape(logits[row], table, jobs[row], ahead[row])
    positions = [job.num_output + more for job, more in zip(jobs, ahead, strict=True)]
    ids, best = draw_shaped(logits, wishes, positions)
    if wanting:
        where = torch.tensor(wanting, device=logits.device)
        drawn = torch.tensor([ids[row] for row in wanting], device=logits.device)
        tops = [jobs[row].sampling.logprobs or 0 for row in wanting]
        for row, entry in zip(wanting, token_logprobs(raw[where], drawn, tops), strict=True):
            logprobs[row] = entry
    return Drawn(ids, _broken(best), logprobs)


def draw_shaped(
    logits: Tensor, wishes: Sequence[Wishes], positions: Sequence[int]
) -> tuple[list[int], list[float]]:
    """(tokens, greatest logits) of rows that have no penalties left to apply; `positions` count output tokens."""
    if not any([wish.heat for wish in wishes]):
        return kernels.pick_tokens(logits)
    chance = [uniform(wish.chance, at) for wish, at in zip(wishes, positions, strict=True)]
    if not any([wish.is_limited for wish in wishes]):
        return kernels.pick_tokens(logits, [wish.heat for wish in wishes], chance)
    if can_limit(logits):
        limits = [Limits(wish.top_k, wish.top_p, wish.min_p) for wish in wishes]
        return kernels.pick_tokens(logits, [wish.heat for wish in wishes], chance, limits=limits)
    ids, best = kernels.pick_tokens(
        logits, [0.0 if wish.is_limited else wish.heat for wish in wishes], chance
    )
    limited = [row for row, wish in enumerate(wishes) if wish.is_limited and wish.heat]
    if limited:
        for row, token in limited_in_torch(logits, limited, wishes, best, chance):
            ids[row] = token
    return ids, best


def limited_in_torch(
    logits: Tensor,
    rows: Sequence[int],
    wishes: Sequence[Wishes],
    best: Sequence[float],
    chance: Sequence[float],
) -> list[tuple[int, int]]:
    """(row, token) of `rows`; the other arguments are of all rows."""
    device, left = logits.device, [wishes[row] for row in rows]
    heat = torch.tensor([wish.heat for wish in left], device=device)
    top = torch.tensor([best[row] for row in rows], device=device)
    some = logits[torch.tensor(rows, device=device)].sub_(top[:, None]).div_(heat[:, None])
    goal = torch.tensor([chance[row] for row in rows], device=device, dtype=torch.double)
    return list(zip(rows, _draw_within_limits(some, left, goal), strict=True))


def _broken(best: list[float]) -> list[bool]:
    return [not isfinite(value) for value in best]


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


def _shape(logits: Tensor, table: JobTable, job: JobState, ahead: int) -> None:
    """Biases, bans and penalties of one row [V], in place."""
    chosen, outputs = job.sampling, table.outputs(job, ahead)
    if chosen.logit_bias:
        ids, values = zip(*chosen.logit_bias, strict=True)
        logits.index_add_(0, _on(logits, ids), torch.tensor(values, device=logits.device))
    if len(outputs) < chosen.min_tokens and job.stops:
        logits[_on(logits, sorted(job.stops))] = -torch.inf
    if chosen.repetition_penalty != 1.0:
        seen = _on(logits, np.unique(table.tokens[job.row, : job.known + ahead]))
        old = logits[seen]
        factor = chosen.repetition_penalty
        logits[seen] = torch.where(old > 0, old / factor, old * factor)
    if len(outputs) and (chosen.presence_penalty or chosen.frequency_penalty):
        used, counts = np.unique(outputs, return_counts=True)
        cost = chosen.presence_penalty + chosen.frequency_penalty * counts
        logits[_on(logits, used)] -= torch.from_numpy(cost.astype(np.float32)).to(logits.device)
    if job.matcher is not None:
        bits = job.matcher.allowed_bits(outputs.tolist())
        ban_(logits[: job.matcher.num_tokens], bits)


def _on(logits: Tensor, ids: Sequence[int] | NDArray[np.int32]) -> Tensor:
    return torch.as_tensor(np.asarray(ids, np.int64), device=logits.device)


def _draw_within_limits(logits: Tensor, wishes: Sequence[Wishes], chance: Tensor) -> list[int]:
    """Tokens for rows with top-k, top-p or min-p, of logits that were divided by their temperature."""
    vocabulary = logits.shape[1]
    ids, rest, width = [0] * len(wishes), list(range(len(wishes))), FIRST_CANDIDATES
    while rest:
        left = [wishes[row] for row in rest]
        asked = max([wish.top_k for wish in left if wish.top_k < vocabulary], default=0)
        where = torch.tensor(rest, device=logits.device)
        some = logits if len(rest) == len(ids) else logits[where]
        found, done = _draw_limited(some, left, chance[where], min(max(width, asked), vocabulary))
        for row, token in zip(rest, found.tolist(), strict=True):
            ids[row] = token
        rest = [row for row, is_done in zip(rest, done.tolist(), strict=True) if not is_done]
        width *= WIDEN
    return ids


def _draw_limited(
    logits: Tensor, wishes: Sequence[Wishes], chance: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Tokens from the `width` most likely candidates; False where the limits may reach further."""
    device = logits.device
    told = [(wish.top_p, wish.min_p) for wish in wishes]
    top_p, min_p = torch.tensor(told, device=device)[:, :, None].unbind(1)
    top_k = torch.tensor([wish.top_k for wish in wishes], device=device)[:, None]
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


def _invert(weights: Tensor, chance: Tensor) -> Tensor:
    """Index of the entry in which `chance` of each row's total weight falls. Entries of weight 0 are never hit."""
    edges = weights.double().cumsum(-1)
    return entry_at(edges, chance[:, None] * edges[:, -1:])
