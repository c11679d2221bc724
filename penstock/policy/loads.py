"""How loaded a replica is: the scalars that routers, movers and scalers compare. Lower is less loaded, always.

All are functions of a report, which may be old, and of `Sent`: what the fleet sent there since, as far as its ledger
knows (cluster.dispatches). With NOTHING_SENT they are what the report says and no more.

    inflight             requests sent and not ended: the fleet's own count, view.outstanding
    num_waiting          jobs that wait, and were sent since                                   xLLM, llm-d
    pending_tokens       prompt tokens to compute: waiting and not cached, running, sent       DualMap
    miss_plus_pending    (prompt - hit) + pending_tokens                                       Llumnix v2
    queue_s              pending_tokens in seconds, less those since the report                Mooncake, DualMap
    ttft_s               queue_s + transfer + prefill(prompt - hit | hit)                      Mooncake, xLLM
    tpot_s               one decode step with this request in it                               xLLM, Llumnix v2
    foreseen_tpot_s      the same, with those counted that no report holds yet                 xLLM
    kv_ratio             (used + all waiting blocks) / total; busy from 1 on                   Llumnix v1
    told_kv_ratio        the same of the report alone, whatever was sent since                 xLLM, llm-d
    kv_ratio_projected   (used + waiting + rest of running prompts + sent) / total             Llumnix v2
    neg_freeness         -(total - sum of virtual usages) / jobs, a block a unit               Llumnix
    neg_steps            -(free - waiting blocks) / jobs; -inf of an idle one                  Llumnix v1
    adaptive_decode      128 when idle, else 128 - jobs, from 128 jobs on jobs                 Llumnix v1

`saturated` is no load but a batch, read off the cost model.

Sources: Llumnix (Sun et al., OSDI 2024; v1 and v2 code), xLLM, Mooncake, DualMap; see the policies that use them.
"""

from __future__ import annotations

from math import inf

from penstock.core.records import Record
from penstock.core.types import Report
from penstock.core.views import PhaseCost

LARGEST = 4096  # jobs, when a batch counts as saturated at the latest

LENDERS_KEEP = 8  # 1 / LENDERS_KEEP of a memory is not lent, whatever is asked (engine.loans)

FULL_BATCH = 128  # jobs that Llumnix takes for a full decode batch


class Sent(Record):
    """Sums over the requests sent to a replica that its report does not hold yet. `tokens`: of prompts, to compute."""

    num: int = 0
    tokens: int = 0
    blocks: int = 0


NOTHING_SENT = Sent()


def num_waiting(report: Report, sent: Sent = NOTHING_SENT) -> int:
    return report.num_waiting + sent.num


def pending_tokens(report: Report, sent: Sent = NOTHING_SENT) -> int:
    waiting = report.waiting_tokens - report.cached_tokens
    return waiting + report.prefill_tokens + sent.tokens


def miss_plus_pending(report: Report, sent: Sent, num_prompt: int, hit: int) -> int:
    return num_prompt - hit + pending_tokens(report, sent)


def queue_s(report: Report, sent: Sent, token_s: float, *, elapsed_s: float = 0.0) -> float:
    """`token_s`: what a prompt token takes, on average. `elapsed_s` since the report: it worked meanwhile."""
    told_s = token_s * pending_tokens(report)
    return max(0.0, told_s - elapsed_s) + token_s * sent.tokens


def ttft_s(waits_s: float, cost: PhaseCost, num_prompt: int, hit: int) -> float:
    """`waits_s`: queue and, where blocks come from elsewhere, their transfer."""
    return waits_s + cost.prefill_s(num_prompt - hit, hit)


def tpot_s(report: Report, cost: PhaseCost, num_prompt: int) -> float:
    return cost.decode_s(report.num_decoding + 1, report.decode_tokens + num_prompt)


def foreseen_tpot_s(report: Report, cost: PhaseCost, num_prompt: int, outstanding: int) -> float:
    """`outstanding`: by the fleet's count. Those that the report does not hold are taken for as long as this one."""
    jobs = max(outstanding, report.num_decoding)
    unseen = (jobs - report.num_decoding) * num_prompt
    return cost.decode_s(jobs + 1, report.decode_tokens + unseen + num_prompt)


def has_room(report: Report, num_prompt: int, outstanding: int) -> bool:
    """Whether its blocks suffice for one more request like those that it has not reported yet."""
    unseen = max(0, outstanding - report.num_running) + 1
    return unseen * -(-(num_prompt + 1) // report.block_size) <= report.free_blocks


def used_blocks(report: Report) -> int:
    return report.total_blocks - report.free_blocks


def kv_ratio(report: Report, sent: Sent = NOTHING_SENT) -> float:
    """0 of a replica that has told of no memory."""
    total = report.total_blocks
    return (used_blocks(report) + report.waiting_blocks + sent.blocks) / total if total else 0.0


def told_kv_ratio(report: Report, _: Sent = NOTHING_SENT) -> float:
    return kv_ratio(report)


def kv_ratio_projected(report: Report, sent: Sent = NOTHING_SENT) -> float:
    total = report.total_blocks
    if not total:
        return 0.0
    waiting = report.waiting_blocks - report.cached_tokens // report.block_size
    return (used_blocks(report) + waiting + rest_blocks(report) + sent.blocks) / total


def neg_freeness(report: Report, urgent_blocks: int | None = None) -> float:
    """Steps that the batch can go on before memory ends, negated.

    The virtual usage of what runs is what it holds and what the rest of its prompt will take; with `urgent_blocks`, all
    memory but those while anything urgent runs, so that others stay away. Of what waits it is that of the first, so
    that somebody who cannot start makes a replica look full. inf: it is draining.
    """
    if report.is_draining:
        return inf
    free = report.free_blocks - report.head_blocks - rest_blocks(report)
    if report.num_urgent and urgent_blocks is not None:
        free -= max(0, report.total_blocks - urgent_blocks)
    return -free / freeness_jobs(report)


def rest_blocks(report: Report) -> int:
    """What running prompts will take that are not computed to their end."""
    return -(-report.prefill_tokens // report.block_size)


def freeness_jobs(report: Report) -> int:
    """Those that share what is left: who runs, and the first who waits."""
    return max(1, report.num_running + (report.num_waiting > 0))


def away_of(blocks: int, total: int) -> int:
    """Of a request that takes so many blocks in all, those that others must keep: all beyond the half of its home that
    it works in, if it takes more than its home has for one.
    """
    return 0 if blocks <= total - total // LENDERS_KEEP else blocks - total // 2


def neg_steps(report: Report, sent: Sent = NOTHING_SENT) -> float:
    jobs = report.num_running + report.num_waiting + sent.num
    return -(report.free_blocks - report.waiting_blocks - sent.blocks) / jobs if jobs else -inf


def adaptive_decode(num_jobs: int, full: int = FULL_BATCH) -> int:
    """Llumnix's order of decode targets: one that decodes already and is not full before one that is idle."""
    if not num_jobs:
        return full
    return num_jobs if num_jobs >= full else full - num_jobs


def saturated(cost: PhaseCost) -> int:
    """The batch from which a step grows in proportion to it: twice as many jobs take half as long again."""
    batch = 1
    while batch < LARGEST and cost.decode_s(2 * batch, 0) < 1.5 * cost.decode_s(batch, 0):
        batch *= 2
    return batch
