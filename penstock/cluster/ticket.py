"""One request between its caller and the replica that has it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from penstock.cluster.movement import Movement
from penstock.core.clock import now
from penstock.core.errors import BadRequest, PenstockError, StepFailed
from penstock.core.forward import ForwardedPrompt
from penstock.core.moving import JobState
from penstock.core.ports import OnEnded, OnOutput
from penstock.core.types import Output, Request, Stage
from penstock.policy.scale import Served

if TYPE_CHECKING:
    from penstock.cluster.fleet import Fleet

LEAST_S = 1e-3  # of a promise whose time is over
ERRORS: dict[str, type[PenstockError]] = {"BadRequest": BadRequest}  # by Output.code


class Ticket:
    """One request between the caller and the replica that has it; a core.ports.Call."""

    __slots__ = (
        "fleet", "request", "on_ended", "on_output", "left", "replica", "tried", "is_heard", "is_cancelled", "error",
        "arrived_at", "first_at", "num_output", "ids", "movement", "pauses", "has_waited", "borrows",
    )  # fmt: skip

    def __init__(
        self, fleet: Fleet, request: Request, on_ended: OnEnded, on_output: OnOutput | None
    ) -> None:
        self.fleet, self.request = fleet, request
        self.on_ended: OnEnded | None = on_ended
        self.on_output = on_output
        self.left = request.n
        self.replica = ""
        self.tried: tuple[str, ...] = ()
        self.is_heard = False
        self.is_cancelled = False
        self.has_waited = False  # for the route policy to be asked again
        self.error: PenstockError | None = None
        self.arrived_at = now()
        self.first_at: float | None = None
        self.num_output = 0
        self.ids: list[int] = []
        self.movement: Movement | None = None
        self.pauses: Stage | None = None  # before which it stands still, to be handed on
        self.borrows = False  # others keep blocks for it

    def served(self, error: Exception | None) -> Served:
        """What became of it."""
        first_at = self.first_at
        return Served(
            now(),
            self.arrived_at,
            None if first_at is None else first_at - self.arrived_at,
            self.request.prompt.num_tokens,
            self.num_output,
            error is not None,
        )

    def state(self) -> JobState | None:
        """From which another replica can go on when this one is lost; None: nobody can."""
        request, ids = self.request, tuple(self.ids)
        is_whole = self.on_output is not None and len(ids) in (0, self.num_output)
        if request.n > 1 or request.kind != "generate" or not is_whole:
            return None
        if isinstance(request.prompt, ForwardedPrompt):
            return None
        if request.sampling.prompt_logprobs is not None:
            return None
        return JobState(
            num_output=self.num_output,
            output_ids=ids,
            age_s=now() - self.arrived_at,
            first_token_age_s=None if self.first_at is None else now() - self.first_at,
        )

    def request_now(self) -> Request:
        """With what is left of its promises if it waited or was turned away: replicas count from when they hear."""
        spent_s, slo = now() - self.arrived_at, self.request.slo
        has_tried = self.has_waited or len(self.tried) > 1
        if not has_tried or not spent_s or (slo.ttft_s is None and slo.deadline_s is None):
            return self.request
        left = [
            None if bound is None else max(bound - spent_s, LEAST_S)
            for bound in (slo.ttft_s, slo.deadline_s)
        ]
        return replace(self.request, slo=replace(slo, ttft_s=left[0], deadline_s=left[1]))

    def cancel(self) -> None:
        self.on_ended = None
        self.fleet.abandon(self)

    def end(self, error: Exception | None) -> None:
        """Tell the caller, once."""
        on_ended, self.on_ended = self.on_ended, None
        if on_ended is not None:
            on_ended(error)

    def hear(self, output: Output) -> None:
        if not self.is_heard:
            if self.pauses == "prefill":
                if not output.num_tokens and output.finish is None:
                    self._encoded()
                    return
                self.pauses = None  # it was not waited for
            self.is_heard = True
            self.first_at = now()
            self.fleet.begin(self)
            self.fleet.happen("prefilled", self.request.id)
        self.num_output += output.num_tokens
        self.ids += output.ids
        if output.finish is not None:
            self.left -= 1
            if output.finish == "error":
                told = output.error or "the request failed inside the engine"
                self.error = ERRORS.get(output.code or "", StepFailed)(told)
        if self.on_output is not None and not self.is_cancelled:
            try:
                self.on_output(output)
            except Exception as error:  # noqa: BLE001 - it is the caller's, and others share this message
                self.fleet.abandon(self)
                self.end(error)
        if not self.left:
            self.fleet.finish(self)
        elif self.pauses and not self.is_cancelled:
            self.fleet.hand_on(self)

    def _encoded(self) -> None:
        """Its images are."""
        if not self.is_cancelled:
            self.fleet.hand_on(self)

    def fail(self, error: PenstockError) -> None:
        if self.movement is None or self.movement.source_lost(error):
            self.fleet.retry(self, error)
