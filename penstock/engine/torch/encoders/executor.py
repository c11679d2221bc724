"""The executor port on an encoder: a request of kind "embed" ends with its prompt, and its vector is all it gets.

An encoder sees both sides of a position, so a text is computed in one piece: with the chunk that reaches its end.
Chunks before that only count, and a step may compute a whole text more than its chunks say. Nothing is kept from one
step to another: blocks of the ledger are places in a queue here, and no memory stands behind them.

A model with labels tells numbers about a text instead of an embedding; who asks knows which of the two it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from penstock.core.plans import Plan, Sampled
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Caps, Request
from penstock.engine.folder import ModelFacts
from penstock.engine.torch.encoders.model import Encoder, Text
from penstock.engine.torch.encoders.pooling import BROKEN
from penstock.engine.torch.lane import Step
from penstock.engine.torch.whole_steps import WholeSteps

if TYPE_CHECKING:
    from penstock.engine.torch.build import EngineConfig


class EncoderExecutor(WholeSteps):
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
        super().__init__(
            Caps(num_layers=facts.num_layers, max_context=facts.max_context + 1),
            threads=config.threads,
        )
        self._texts: dict[int, Text] = {}

    @property
    def kv_bytes(self) -> int:
        return 0

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
