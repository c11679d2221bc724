"""Prompts where the queue is shortest in seconds; answers packed onto the first replica that still keeps its pace.

Source: xLLM (JD, 2025; report arXiv:2510.14686, policy "slo_aware_policy" of jd-opensource/xllm-service).

Idea: replicas take either role at once (scale "xllm" changes them), so a decode replica that is kept empty is a
prefill replica in waiting. Answers are therefore packed, not spread, and a prompt may spill over.

    images      the fewest tokens of images before it
    prompt      the least queue_s; unless that is above the promise of a first token, and
                  the emptiest decode replica e is not the one that the answer would go to,
                  tpot_s(e) < fill * tpot (n - 1) / n       n decode replicas
                  prefill_s(prompt) at e < queue_s
                then e computes the prompt and writes the answer
    answer      the first by name with tpot_s <= fill * tpot and room for its blocks, else the least tpot_s

Parameters: `ttft_s`, `tpot_s`: promises of requests that make none (1 and 0.05, the source's defaults). `fill`: share
of the promised pace up to which a replica is packed (the source: 1). Contexts grow while answers are written, so a
replica that is packed to the brink breaks its promise to all.

Where we differ: TTFT and TPOT are predicted by the fleet's cost model; the source fits a polynomial and a plane to
profiles. What reports do not hold yet is counted by the fleet. The source does not look at memory here. A prompt that
spilled over is answered where it was computed; there it may go on to another decode replica.

Does not: know prefixes (the source's cache-aware score is another policy, as kv-aware is here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from penstock.core.types import Report
from penstock.policy.loads import NOTHING_SENT, foreseen_tpot_s, has_room
from penstock.policy.route import Decision, View, is_candidate

Foreseen = tuple[float, Report]  # tpot_s with this request


@dataclass(slots=True)
class Xllm:
    needs_cost: ClassVar[bool] = True
    ttft_s: float = 1.0
    tpot_s: float = 0.05
    fill: float = 0.7

    def __post_init__(self) -> None:
        if not self.ttft_s > 0 or not self.tpot_s > 0:
            raise ValueError("ttft_s and tpot_s must be positive seconds")
        if not 0 < self.fill <= 1:
            raise ValueError(f"fill must be above 0 and at most 1, got {self.fill}")

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        if view.stage == "decode":
            tpot_s, chosen = self._writer(view, _foreseen(view, able))
            return Decision(chosen.replica, f"{1e3 * tpot_s:.0f} ms a token")
        if view.stage == "encode":
            tokens, chosen = min(
                ((_image_tokens(view, report), report) for report in able),
                key=lambda each: (each[0], each[1].replica),
            )
            return Decision(chosen.replica, f"{tokens} tokens of images before it")
        queues_s = view.queues_s(able)
        waits_s, pairs = min(queues_s), zip(view.names(able), queues_s, strict=True)
        name = min(name for name, queue_s in pairs if queue_s == waits_s)
        promised_s = view.request.slo.ttft_s or self.ttft_s
        if waits_s > promised_s:
            spare = self._spare(view, waits_s)
            if spare is not None:
                return Decision(spare, f"{waits_s:.1f} s at {name}", is_overflow=True)
        return Decision(name, f"{waits_s:.2f} s queue")

    def _writer(self, view: View, foreseen: Sequence[Foreseen]) -> Foreseen:
        """The first that keeps its pace, else the fastest. `foreseen` is in the order of names."""
        prompt, promised_s = view.request.prompt.num_tokens, self._pace_s(view)
        for tpot_s, report in foreseen:
            under_way = view.outstanding.get(report.replica, 0)
            if tpot_s <= promised_s and has_room(report, prompt, under_way):
                return tpot_s, report
        return min(foreseen, key=lambda each: (each[0], each[1].replica))

    def _pace_s(self, view: View) -> float:
        return self.fill * (view.request.slo.tpot_s or self.tpot_s)

    def _spare(self, view: View, waits_s: float) -> str | None:
        """A decode replica that can compute the prompt too."""
        writers = [
            each for each in view.reports if each.role == "decode" and is_candidate(each, "decode")
        ]
        if len(writers) < 2 or view.cost is None:
            return None
        foreseen = _foreseen(view, writers)
        least_s, emptiest = min(foreseen, key=lambda each: (each[0], each[1].replica))
        if emptiest is self._writer(view, foreseen)[1]:
            return None
        keeps_pace = least_s < self._pace_s(view) * (len(writers) - 1) / len(writers)
        own_s = view.queue_s(emptiest) + view.cost.prefill_s(view.request.prompt.num_tokens)
        return emptiest.replica if keeps_pace and own_s < waits_s else None


def _image_tokens(view: View, report: Report) -> int:
    """That are to be encoded there, as told, and all that was sent there since."""
    return (report.image_tokens or 0) + view.sent.get(report.replica, NOTHING_SENT).tokens


def _foreseen(view: View, able: Sequence[Report]) -> list[Foreseen]:
    """By name. Without a cost model the count of requests stands for seconds."""
    prompt, found = view.request.prompt.num_tokens, []
    for report in sorted(able, key=lambda each: each.replica):
        under_way = view.outstanding.get(report.replica, 0)
        tpot_s = (
            float(under_way)
            if view.cost is None
            else foreseen_tpot_s(report, view.cost, prompt, under_way)
        )
        found.append((tpot_s, report))
    return found
