"""A Service that keeps the port's promises and says what it is told to: the gateway's world in these tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.core.errors import Draining, UnknownModel
from penstock.core.ports import OnOutput
from penstock.core.types import FinishReason, Output, Report, Request, TokenLogprob

Script = Callable[[Request, int], Sequence[int]]  # (request, answer) -> token ids


@dataclass
class Scripted:
    """Says `script(request, answer)`, `bundle` tokens a step, a step each `step_s`; keeps max_tokens and stop ids."""

    script: Script
    names: Sequence[str] = ("tiny",)
    step_s: float = 0.0
    bundle: int = 1
    num_cached: int = 0
    says_cached_always: bool = False  # with each output, not with the last only
    fail_with: Exception | None = None
    fail_after: int | None = None  # outputs before the failure; None = at once
    is_draining: bool = False
    is_alive: bool = True
    requests: list[Request] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    cancelled: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def models(self) -> Sequence[str]:
        return self.names

    async def submit(self, request: Request, on_output: OnOutput | None = None) -> None:
        if self.is_draining:
            raise Draining("this server is shutting down")
        if request.model not in self.names:
            raise UnknownModel(f"no model {request.model}")
        self.requests.append(request)
        if self.fail_with is not None and self.fail_after is None:
            raise self.fail_with
        self.running.add(request.id)
        try:
            await self._speak(request, on_output)
            self.finished.append(request.id)
        except asyncio.CancelledError:
            self.cancelled.append(request.id)
            raise
        finally:
            self.running.discard(request.id)

    async def _speak(self, request: Request, on_output: OnOutput | None) -> None:
        scripts = [list(self._bounded(request, answer)) for answer in range(request.n)]
        said = [0] * request.n
        num_outputs = 0
        while any(place < len(ids) for place, (ids, _) in zip(said, scripts, strict=True)):
            await asyncio.sleep(self.step_s)
            for answer, (ids, finish) in enumerate(scripts):
                fresh = tuple(ids[said[answer] : said[answer] + self.bundle])
                if not fresh:
                    continue
                if self.fail_with is not None and num_outputs == self.fail_after:
                    raise self.fail_with
                num_outputs += 1
                said[answer] += len(fresh)
                is_last = said[answer] == len(ids)
                if on_output is not None:
                    on_output(self._output(request, answer, fresh, finish if is_last else None))

    def _bounded(self, request: Request, answer: int) -> tuple[Sequence[int], FinishReason]:
        sampling = request.sampling
        ids: list[int] = []
        for id in self.script(request, answer):
            ids.append(id)
            if id in sampling.stop_ids and len(ids) > sampling.min_tokens:
                return ids, "stop"
            if len(ids) == sampling.max_tokens:
                return ids, "length"
        assert ids, "a script says something"
        return ids, "stop"

    def _output(
        self, request: Request, answer: int, ids: tuple[int, ...], finish: FinishReason | None
    ) -> Output:
        wanted = request.sampling.logprobs
        prompt_wanted = request.sampling.prompt_logprobs
        logprobs = () if wanted is None else tuple(logprob(id, wanted) for id in ids)
        prompt: tuple[TokenLogprob | None, ...] = ()
        if prompt_wanted is not None:
            told = request.prompt.ids  # type: ignore[attr-defined]
            prompt = (None, *(logprob(id, prompt_wanted) for id in told[1:]))
        cached = self.num_cached if finish or self.says_cached_always else 0
        return Output(answer, ids, len(ids), finish, logprobs, prompt, cached)

    def reports(self) -> Sequence[Report]:
        return [
            Report(
                replica="replica-0",
                at=0.0,
                is_alive=self.is_alive,
                is_draining=self.is_draining,
                num_running=len(self.running),
                free_blocks=75,
                total_blocks=100,
                lanes=((0.6, 128), (0.0, 0)),
                drafts=(8, 6),
            )
        ]

    async def drain(self) -> None:
        self.is_draining = True
        while self.running:
            await asyncio.sleep(0.005)


def logprob(id: int, wanted: int) -> TokenLogprob:
    """A made-up but recognisable number: minus a hundredth of the id."""
    top = tuple((id + place, -(id + place) / 100) for place in range(wanted))
    return TokenLogprob(id, -id / 100, top)
