"""How far a simulation is from a logged run, and how far others say they are.

`mean` and `p99` are signed errors of those figures; `mape` is the mean over requests of |simulated - real| / real, in
which nothing cancels out. TTFT near saturation is mostly queueing, and the queue amplifies any error of the step times:
so it is also told of the requests that were scheduled as soon as the engine saw them. All in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.lab.vllm_logs import Latency
from penstock.report.summary import spread_of

GATE = {"tpot_mean": 5.0, "tpot_p99": 5.0, "e2e_mean": 6.0}
GOAL = {"tpot_mape": 2.5, "e2e_mape": 3.5, "ttft_mape": 15.0, "ttft_not_queued_mape": 20.0}
FIGURES = ("ttft", "tpot", "e2e")

DYNOSIM = "DynoSim + AIConfigurator 0.10"
SERVINGSIM = "LLMServingSim 2"
# DynoSim: run untuned on these logs, tables of vLLM 0.19. LLMServingSim: its own validation, over four logs.
PUBLISHED: dict[str, dict[str, dict[str, str]]] = {
    "RTXPRO6000_Llama-3.1-8B": {
        DYNOSIM: {"tpot_mape": "2.3", "e2e_mape": "2.0", "ttft_mape": "14.9", "ttft_not_queued_mape": "28"},
    },
    "RTXPRO6000_Qwen3-32B": {
        DYNOSIM: {"tpot_mape": "1.9", "e2e_mape": "3.7", "ttft_mape": "16", "ttft_not_queued_mape": "41"},
    },
}  # fmt: skip
PUBLISHED_FOR_ALL = {
    SERVINGSIM: {"tpot_mean": "+-1.7", "e2e_mean": "+-2.2", "ttft_mean": "-14..+1"}
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Errors in percent by figure and kind, `tpot_mean` for example; `num_not_queued` requests did not queue."""

    errors: dict[str, float]
    num_not_queued: int

    @property
    def is_through(self) -> bool:
        """Within the gate."""
        return all(abs(self.errors[name]) <= bound for name, bound in GATE.items())

    def beyond(self, bounds: dict[str, float]) -> list[str]:
        """What is not within these bounds, in words."""
        return [
            f"{name} {self.errors[name]:+.1f} % (bound {bound:g} %)"
            for name, bound in bounds.items()
            if name in self.errors and abs(self.errors[name]) > bound
        ]


def scores_of(
    real: Sequence[Latency], simulated: Sequence[Latency], is_queued: Sequence[bool]
) -> Scores:
    """Of the same requests in the same order."""
    errors: dict[str, float] = {}
    for figure in FIGURES:
        was = [getattr(one, f"{figure}_s") for one in real]
        came = [getattr(one, f"{figure}_s") for one in simulated]
        before, after = spread_of(was), spread_of(came)
        for kind in ("mean", "p99"):
            errors[f"{figure}_{kind}"] = 100 * (getattr(after, kind) / getattr(before, kind) - 1)
        errors[f"{figure}_mape"] = _mape(was, came)
    at_once = [
        (a.ttft_s, b.ttft_s)
        for a, b, waited in zip(real, simulated, is_queued, strict=True)
        if not waited
    ]
    if at_once:
        errors["ttft_not_queued_mape"] = _mape([a for a, _ in at_once], [b for _, b in at_once])
    return Scores(errors=errors, num_not_queued=len(at_once))


def _mape(was: Sequence[float], came: Sequence[float]) -> float:
    return 100 * sum(abs(b / a - 1) for a, b in zip(was, came, strict=True)) / len(was)
