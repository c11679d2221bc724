"""The executor port on an encoder: a request of kind "embed" ends with its prompt, and its vector is all it gets.

An encoder sees both sides of a position, so a text is computed in one piece: with the chunk that reaches its end.
Chunks before that only count, and a step may compute a whole text more than its chunks say. Nothing is kept from one
step to another: blocks of the ledger are places in a queue here, and no memory stands behind them.

A model with labels tells numbers about a text instead of an embedding; who asks knows which of the two it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from penstock.core.plans import Done, Plan, Sampled
from penstock.core.ports import Completion, Grain
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Caps, PlanId, Request
from penstock.engine.folder import ModelFacts
from penstock.engine.torch.encoders.model import Encoder, Text
from penstock.engine.torch.encoders.pooling import BROKEN
from penstock.engine.torch.lane import Abort, Close, Lane, Launch, Step

if TYPE_CHECKING:
    from penstock.engine.torch.build import EngineConfig


class EncoderExecutor:
    """Implements core.ports.Executor. Made by `penstock.engine.torch.open.open_leaf`."""

    def __init__(
        self,
        model: Encoder,
        num_blocks: int,
        facts: ModelFacts,
        config: EngineConfig,
        notes: dict[str, str],
    ) -> None:
        self.facts, self.config, self.notes = facts, config, notes
        self.num_blocks, self.block_size = num_blocks, config.block_size
        self._model = model
        # One more than a text may have: replicas keep a place for an answer's first token.
        self._caps = Caps(num_layers=facts.num_layers, max_context=facts.max_context + 1)
        self._texts: dict[int, Text] = {}
        self._live: set[PlanId] = set()
        self._on_completion: Callable[[Completion], None] | None = None
        self._lane = Lane(
            run=self._step, close=self._close, tell=self._tell, threads=config.threads
        )
        self._is_stopped = False

    @property
    def caps(self) -> Caps:
        return self._caps

    @property
    def kv_bytes(self) -> int:
        return 0

    @property
    def pids(self) -> list[int]:
        """Processes besides this one."""
        return []

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._on_completion = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        assert not self._is_stopped, "launched after stop"
        self._live.add(plan.id)
        self._lane.send(Launch(plan))
        return plan.id

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> None:
        """A plan is one step: it ends soon enough."""

    def resume(self, plan: PlanId) -> None:
        raise AssertionError("plans of encoders are never suspended")

    def abort(self, plan: PlanId) -> None:
        if plan in self._live:
            self._live.discard(plan)
            self._lane.mark(plan, "abort")
            self._lane.send(Abort(plan))

    def close_jobs(self, seqs: Sequence[int]) -> None:
        self._lane.send(Close(tuple(seqs)))

    async def stop(self) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            await self._lane.stop(tuple(self._live))
            self._live.clear()

    def _tell(self, told: Completion) -> None:
        """On the loop's thread: pass on what the lane did, unless the plan was aborted meanwhile."""
        assert isinstance(told, Done), "a step is never left in the middle"
        if told.plan not in self._live:
            return
        self._live.discard(told.plan)
        self._lane.unmark(told.plan)
        at = asyncio.get_running_loop().time()
        assert self._on_completion is not None, "nobody listens"
        self._on_completion(Done(told.plan, 1, told.outputs, (at,), told.error))

    def _close(self, seqs: Iterable[int]) -> None:
        for seq in seqs:
            self._texts.pop(seq, None)

    def _step(self, plan: Plan) -> Step:
        """One plan, on the lane's thread."""
        self._close(plan.closed)
        outputs = []
        for opening in plan.opened:
            reason = self._refusal(opening.request)
            if reason is None:
                request = opening.request
                assert isinstance(request.prompt, TokenPrompt)
                self._texts[opening.seq] = Text(request.prompt.ids, request.second_at)
            else:
                outputs.append(Sampled(opening.seq, 0, error=reason))
        whole = [
            (work.seq, text)
            for work in plan.work
            if (text := self._texts.get(work.seq)) and work.start + work.tokens == len(text.ids)
        ]
        if whole:
            told = yield from self._model.vectors([text for _, text in whole])
            for (seq, _), vector in zip(whole, told, strict=True):
                error = BROKEN if vector is None else None
                outputs.append(Sampled(seq, 0, vector=vector or b"", error=error))
        return tuple(outputs)

    def _refusal(self, request: Request) -> str | None:
        prompt = request.prompt
        if request.kind != "embed":
            return f"an encoder cannot {request.kind}: it makes embeddings"
        if not isinstance(prompt, TokenPrompt):
            return "the text has no token ids, which a real model needs"
        if request.parts or request.adapter is not None:
            return "this model takes text only, and has no adapters"
        if not (0 <= min(prompt.ids) and max(prompt.ids) < self.facts.vocab_size):
            return f"the text names a token outside the vocabulary of {self.facts.vocab_size}"
        return None
