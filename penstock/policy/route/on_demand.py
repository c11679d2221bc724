"""Try, be turned away, try the next: a replica that works takes nobody, so nobody waits behind anybody.

Source: P/D-Serve (2024), section on on-demand forwarding; known from descriptions, its code is not public.

Idea: reports of load are older than short prompts take, so a queue that looks short may not be. Replicas therefore keep
no queue (`max_open` of the fleet) and turn away whom they cannot start at once; where a request goes is found out by
asking.

    ask       the replica with the fewest requests under way, of equals each in turn; none that turned it away
    wait      when all did: until some request has ended, or for `retry_s`; first come, first asked (cluster.waiting)
    give up   once the request's promise of a first token (without one: `patience_s`) is over

Parameters
    retry_s      seconds between two rounds, default 0.002
    patience_s   of requests without a promise, default 1

Where we differ: what the fleet has under way stands for open streams, the same thing seen from the other end. An idle
replica is not fed until it is full before the next one is asked. Does not: predict whether a prompt can still be in
time before it asks; a replica does that (admit in-time).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.policy.route import ONE_OUTSTANDING, Decision, View, after

KEPT_S = 10.0  # far longer than a round of questions


@dataclass(slots=True)
class OnDemand:
    retry_s: float = 0.002
    patience_s: float = 1.0
    _last: str | None = field(init=False, default=None, repr=False)
    _until: dict[str, float] = field(init=False, default_factory=dict, repr=False)  # by request

    def __post_init__(self) -> None:
        if not self.retry_s > 0 or not self.patience_s > 0:
            raise ValueError("retry_s and patience_s must be positive seconds")

    def decide(self, view: View) -> Decision:
        until = self._patience(view)
        if view.now > until:
            return Decision(None, "its time is over")
        columns = view.columns()
        if not columns.names:
            return Decision(None, "all are at work", again_s=self.retry_s)
        least = min(load // ONE_OUTSTANDING for load in columns.loads)
        places = zip(columns.names, columns.loads, strict=True)
        equals = [name for name, load in places if load // ONE_OUTSTANDING == least]
        self._last = after(self._last, equals)
        return Decision(self._last, f"{least} under way")

    def _patience(self, view: View) -> float:
        """Until when this request is tried. Those whose time has long been over are forgotten, the oldest first."""
        request = view.request
        while self._until:
            name, until = next(iter(self._until.items()))
            if until + KEPT_S >= view.now:
                break
            del self._until[name]
        promise = request.slo.ttft_s
        wait_s = self.patience_s if promise is None else promise
        return self._until.setdefault(request.id, view.now + wait_s)
