"""Start a job only when everybody could write all that was asked for: nobody is ever evicted, memory stands empty.

Source: the conservative baseline of the Past-Future scheduler (WuSiYu/lightllm-ae, commit d93ff69, ReqQueue with
router_token_ratio 0), and its overcommitting variant.

Idea: take every answer to reach its max_tokens, and admit while the memory at the worst moment to come suffices. A
factor above 1 promises more memory than there is, for answers that end sooner.

    yes     peak(running, job; lengths = max_tokens) <= overcommit * total, and need(job, known) <= free,
            or nothing runs and need(job, known) <= free
    no      blocks(num_prompt + max_tokens - 1) > total
    later   otherwise

See penstock.policy.admit.peak for the peak. While all who run decode, a step adds one to what each holds and takes one
from what it has left, so the peak stays as it is: whoever was refused is refused until somebody leaves.

Parameters: overcommit (of total blocks, default 1.0: nobody is evicted); ahead_tokens (default None: all that was asked
for): look so far ahead only, which is xLLM's zero-eviction admission with 256 and evicts whom a long answer surprises.

Where we differ: memory is counted in blocks, and blocks that several jobs hold are counted once. Their server takes
max_tokens for all requests from one setting; here it is each request's own. Where callers state the true length,
overcommit 1.0 is the best that can be done without evicting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.core.views import JobView
from penstock.policy.admit import STABLE, Decision, View, cannot_start
from penstock.policy.admit.peak import Crowd, left_of


def longest(job: JobView) -> int:
    return job.max_tokens


def within(tokens: int) -> Callable[[JobView], int]:
    """Answers that go on for at most so many tokens from where they are."""

    def length(job: JobView) -> int:
        return min(job.max_tokens, job.num_output + tokens)

    return length


@dataclass(slots=True)
class Conservative:
    overcommit: float = 1.0
    ahead_tokens: int | None = None
    _crowd: Crowd | None = field(init=False, default=None, repr=False)
    _at: float = field(init=False, default=0.0, repr=False)  # the instant of the crowd
    _refused: tuple[int, ...] = field(init=False, default=(), repr=False)  # whom, beside whom
    _why: str = field(init=False, default="", repr=False)

    def __post_init__(self) -> None:
        if not self.overcommit > 0:
            raise ValueError(f"overcommit must be positive, got {self.overcommit}")
        if self.ahead_tokens is not None and self.ahead_tokens < 1:
            raise ValueError(f"ahead_tokens must be at least 1, got {self.ahead_tokens}")

    def decide(self, view: View) -> Decision:
        ledger, job = view.ledger, view.job
        refusal = cannot_start(view)
        if refusal is not None:
            return refusal
        beside = _beside(job, view.running)
        if beside == self._refused:
            return Decision("later", self._why, STABLE)
        length = longest if self.ahead_tokens is None else within(self.ahead_tokens)
        crowd = self._crowd
        if crowd is None or crowd.ledger is not ledger or self._at != view.now:
            crowd = self._crowd = Crowd.of(ledger, view.running, length)
            self._at = view.now
        lefts, capacity = (left_of(job, length),), self.overcommit * ledger.total
        if crowd.known:
            peak = crowd.peak(job, lefts)
            if peak > capacity:
                self._why = f"would peak at {peak:.0f} of {capacity:.0f} blocks"
                # Not where he was refused beside somebody admitted in this step: who that was, `beside` does not say.
                is_lasting = bool(view.running) and not crowd.admitted
                is_lasting = is_lasting and all(each.todo == 1 for each in view.running)
                self._refused = beside if is_lasting else ()
                return Decision("later", self._why, STABLE if is_lasting else 1)
        crowd.add(job, lefts)
        return Decision("yes")


def _beside(job: JobView, running: Sequence[JobView]) -> tuple[int, ...]:
    """A job and those who run: another one comes last, and one less is left when somebody leaves."""
    return (job.seq, job.known, len(running), running[-1].seq) if running else (job.seq, job.known)
