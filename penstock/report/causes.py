"""Why an answer took as long as it did: the seconds of its life, each under one cause, in words.

The parts of an Explanation sum to its end-to-end time: nothing is left over and nothing counted twice. The life begins
where the request was first offered (its fleet's log, when that is at hand, else its replica's) and ends with its last
token.

    routing        from the fleet's door to the replica that served it, refusals elsewhere included
    elsewhere      at the replica that had it before, and on the way from there (its own log tells more); of requests
                   with images what was there is told as here, and the way of keys and values is elsewhere
    step-boundary  until the step under way when it arrived had ended: nothing can start sooner
    queue-...      waiting for its first start, by what bound the decisions meanwhile: max-jobs (as many answers ran as
                   may), tokens (the step's token budget was used up), blocks (KV memory), policy (the batch policy
                   held it back without naming one of these)
    encode-queue   until its images were encoded: for the tower, behind what goes before it
    encode         steps that encoded them, whatever else was in these steps
    transfer       the way of their embeddings to the replica that computed its prompt
    prefill        steps that computed its prompt; where others' prompts shared a step, its share of the tokens
    shared-prefill the rest of these steps: others' prompts beside its own
    preempted      thrown out for memory and waiting to start again
    recompute      computing again what had been thrown away
    decode         its steps of one token, at the pace of the smallest batch seen on this replica
    batch          the same steps, longer because the batch was bigger (or the contexts longer)
    interference   decode steps stretched by others' prompts: longer than steps of as many decodes and nothing else;
                   and steps of nothing but prompts while it had to stand by
    passed-over    running, but not planned in a step, with no prompt to blame
    between-steps  no step was running: the scheduler's and the host's time
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.types import Slo
from penstock.report.table import seconds

CAUSES: dict[str, str] = {
    "routing": "routing",
    "elsewhere": "at another replica before",
    "step-boundary": "waiting for the step under way",
    "queue-max-jobs": "queueing: as many answers ran as may",
    "queue-tokens": "queueing: the token budget of the steps was used up",
    "queue-blocks": "queueing: KV memory was short",
    "queue-policy": "queueing: held back by the batch policy",
    "encode-queue": "waiting for the images to be encoded",
    "encode": "encoding the images",
    "transfer": "embeddings on their way",
    "preempted": "preempted, waiting to start again",
    "recompute": "recomputing after a preemption",
    "prefill": "own prefill",
    "shared-prefill": "others' prompts beside its own prefill",
    "interference": "decode stretched by others' prefill",
    "passed-over": "running, but not planned",
    "batch": "bigger batch",
    "decode": "decode",
    "between-steps": "between steps",
}
WORK = ("encode", "prefill", "decode")  # what the answer would have cost alone
DUST_S = 1e-6  # parts below it are rounding, and not told in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One answer. `parts`: seconds by cause, as CAUSES has them, without zeros; `first_parts`: until the first token.

    `ahead`: requests that waited when it arrived, `ahead_of` names the first of them; `overtaken_by`: who started
    between its arrival and its start, gathered for requests that were asked for by name. `moves`: between replicas, in
    words; its `parts` are those of the last replica, and what was before them is `elsewhere`.
    """

    request: str
    answer: int
    who: str
    tenant: str
    priority: int
    slo: Slo
    reason: str
    offered_at: float
    end_at: float
    parts: dict[str, float]
    first_parts: dict[str, float] | None = None
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    ahead: int = 0
    ahead_of: tuple[str, ...] = ()
    overtaken_by: tuple[str, ...] = ()
    max_batch: int = 0
    why_routed: str = ""
    why_started: str = ""
    evictions: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()
    tries: tuple[str, ...] = field(default=())

    @property
    def e2e_s(self) -> float:
        return self.end_at - self.offered_at

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_parts is None else sum(self.first_parts.values())

    @property
    def tpot_s(self) -> float | None:
        ttft_s = self.ttft_s
        return (
            None
            if ttft_s is None or self.num_output < 2
            else (self.e2e_s - ttft_s) / (self.num_output - 1)
        )

    @property
    def delay_s(self) -> float:
        """What others, memory and the policies cost it."""
        return sum(value for cause, value in self.parts.items() if cause not in WORK)

    @property
    def severity(self) -> tuple[float, float]:
        """The larger, the worse: by how much the worst broken or nearest promise was used up, then the delay."""
        used = [
            value / bound
            for value, bound in (
                (self.ttft_s, self.slo.ttft_s),
                (self.tpot_s, self.slo.tpot_s),
                (self.e2e_s, self.slo.deadline_s),
            )
            if value is not None and bound is not None
        ]
        return max(used, default=0.0), self.delay_s

    def main_cause(self) -> str:
        """The largest part that is not its own work."""
        delays = {cause: value for cause, value in self.parts.items() if cause not in WORK}
        return max(delays, key=lambda cause: delays[cause]) if delays else "decode"

    def sentences(self) -> list[str]:
        """The parts in words, the largest first."""
        ordered = sorted(self.parts.items(), key=lambda item: -item[1])
        return [
            f"{seconds(value)}  {CAUSES[cause]}{self._detail(cause)}"
            for cause, value in ordered
            if value >= DUST_S
        ]

    def _detail(self, cause: str) -> str:
        told = ""
        if cause.startswith("queue-"):
            told = f"{self.ahead} waited before it" if self.ahead else "nobody waited before it"
            if self.ahead_of:
                told += f", first {', '.join(self.ahead_of)}"
            if self.overtaken_by:
                told += f"; started meanwhile: {_some(self.overtaken_by)}"
        elif cause == "routing":
            told = ", then ".join(self.tries)
        elif cause in ("preempted", "recompute"):
            told = f"{self.num_preemptions} preemption{'s' * (self.num_preemptions != 1)}"
        elif cause == "prefill":
            told = f"{self.num_prompt - self.num_cached:,} prompt tokens"
            told += f", {self.num_cached:,} more were cached" if self.num_cached else ""
        elif cause == "decode":
            told = f"{self.num_output} tokens in {self.num_steps} steps"
        elif cause == "batch":
            told = f"up to {self.max_batch} answers at once"
        return f" ({told})" if told else ""

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        names = (
            "request", "answer", "who", "tenant", "priority", "reason", "offered_at", "end_at", "e2e_s", "ttft_s",
            "tpot_s", "delay_s", "parts", "first_parts", "num_prompt", "num_cached", "num_output", "num_preemptions",
            "num_steps", "ahead", "ahead_of", "overtaken_by", "max_batch", "why_routed", "why_started", "evictions",
            "tries", "moves",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"main_cause": self.main_cause()}


def _some(names: tuple[str, ...], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
