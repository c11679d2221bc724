"""The executor port on a diffusion language model: the real twin of sim.canvases.

A job's first step, and the first after it lost its memory, tells how long its canvas is and which blocks of the arena
it has. A step's outputs are the blocks that it resolved, each whole and cut behind the first token that ends the text;
nothing is told before, as the tokens of an open block may be written in any order.

Of the sampling parameters temperature, seed, max_tokens, stop tokens and ignore_eos have a meaning here. Whoever asks
for another is refused with its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from penstock.core.canvas import meaningless
from penstock.core.plans import Opening, Plan, Sampled, Work
from penstock.core.prompt import TokenPrompt
from penstock.core.rng import stream
from penstock.core.types import CanvasRule, Caps, Request
from penstock.engine.folder import ModelFacts
from penstock.engine.torch.chance import chance_of
from penstock.engine.torch.diffusion.canvas import Canvas
from penstock.engine.torch.diffusion.model import Counts, DiffusionModel, Told
from penstock.engine.torch.diffusion.unmask import Noise
from penstock.engine.torch.lane import Step
from penstock.engine.torch.whole_steps import WholeSteps

if TYPE_CHECKING:
    from penstock.engine.torch.build import EngineConfig

BROKEN = "the model gave no finite numbers for the next tokens"


class DiffusionExecutor(WholeSteps):
    """Implements core.ports.Executor. Made by `penstock.engine.torch.open.open_executor`."""

    def __init__(
        self,
        model: DiffusionModel,
        num_blocks: int,
        facts: ModelFacts,
        config: EngineConfig,
        rule: CanvasRule,
    ) -> None:
        self.facts, self.config = facts, config
        self.num_blocks, self.block_size = num_blocks, config.block_size
        dtype = str(model.decoder.embedding.dtype).removeprefix("torch.")
        self.notes = {"device": str(model.device), "dtype": dtype, "attention": "packed, no mask"}
        self.notes["canvas"] = described(rule)
        self.counts = Counts()  # of the last step
        self._model, self._rule = model, rule
        super().__init__(
            Caps(
                num_layers=facts.num_layers,
                max_context=min(config.max_context or facts.max_context, facts.max_context),
                canvas=rule,
            ),
            threads=config.threads,
        )
        self._seeds = stream(config.seed, "sampling")
        self._opened: dict[int, tuple[Request, Noise | None]] = {}
        self._canvases: dict[int, Canvas] = {}

    @property
    def kv_bytes(self) -> int:
        return self._model.attention.num_bytes

    def _close(self, seqs: Iterable[int]) -> None:
        for seq in seqs:
            self._canvases.pop(seq, None)
            self._opened.pop(seq, None)

    def _step(self, plan: Plan) -> Step:
        """One plan, on the lane's thread."""
        self._close(plan.closed)
        refused = {}
        for opening in plan.opened:
            reason = self._open(opening)
            if reason is not None:
                refused[opening.seq] = reason
        outputs = [Sampled(seq, 0, error=reason) for seq, reason in refused.items()]
        work = [one for one in plan.work if one.seq not in refused]
        if not work:
            return tuple(outputs)
        canvases = [self._placed(one) for one in work]
        pairs = [(canvas, one.phase) for canvas, one in zip(canvases, work, strict=True)]
        told = yield from self._model.step(pairs, self.counts)
        for one, answer in zip(work, told, strict=True):
            outputs += self._heard(one.seq, answer)
        return tuple(outputs)

    def _open(self, opening: Opening) -> str | None:
        """Take a job in; the reason when it cannot be served."""
        request, seed = opening.request, self._seeds.getrandbits(64)
        reason = self._refusal(request)
        if reason is not None:
            return reason
        chosen, noise = request.sampling, None
        if chosen.temperature > 0:
            chance = chance_of(seed if chosen.seed is None else chosen.seed, opening.answer)
            drawn = torch.Generator().manual_seed(chance & (2**63 - 1))
            noise = Noise(chosen.temperature, drawn)
        self._opened[opening.seq] = (request, noise)
        return None

    def _refusal(self, request: Request) -> str | None:
        prompt, chosen = request.prompt, request.sampling
        if request.kind != "generate":
            return f"a diffusion language model cannot {request.kind}"
        if not isinstance(prompt, TokenPrompt):
            return "the prompt has no token ids, which a real model needs"
        if request.parts or request.adapter is not None:
            return "this model takes text only, and has no adapters"
        name = meaningless(chosen)
        if name is not None:
            return f"{name} has no meaning for a model that fills masks in any order: leave it out"
        ids = [*prompt.ids, *chosen.stop_ids]
        if not (0 <= min(ids) and max(ids) < self.facts.vocab_size):
            return (
                f"the prompt or a stop token is outside the vocabulary of {self.facts.vocab_size}"
            )
        return None

    def _placed(self, work: Work) -> Canvas:
        """The canvas of a planned job, in the memory it was given."""
        canvas = self._canvases.get(work.seq)
        if canvas is None:
            request, noise = self._opened[work.seq]
            assert isinstance(request.prompt, TokenPrompt) and work.is_fresh
            prompt = list(request.prompt.ids)
            num_masks = work.tokens - len(prompt)
            canvas = Canvas.begun(prompt, num_masks, self._rule, self._model.mask_id, noise)
            self._canvases[work.seq] = canvas
        elif work.is_fresh:
            canvas.wipe()
        if work.is_fresh:
            first = torch.tensor(work.blocks, dtype=torch.int64) * self.block_size
            canvas.slots = (first[:, None] + torch.arange(self.block_size)).flatten()
        return canvas

    def _heard(self, seq: int, told: Told) -> list[Sampled]:
        if seq not in self._canvases:
            return []  # closed while the step ran
        if told.is_broken:
            return [Sampled(seq, 0, error=BROKEN)]
        if not told.tokens:
            return []
        chosen = self._opened[seq][0].sampling
        stops = frozenset(chosen.stop_ids)
        if not chosen.ignore_eos:
            stops |= frozenset(self.facts.eos_ids)
        ends = [place for place, token in enumerate(told.tokens) if token in stops]
        ids = told.tokens[: ends[0] + 1] if ends else told.tokens
        return [Sampled(seq, len(ids), ids, bool(ends))]


def described(rule: CanvasRule) -> str:
    """How answers are filled, and whether that is what the model itself would write."""
    every = rule.refresh_every
    often = "once a block" if every is None else f"every {every} steps" if every > 1 else "always"
    told = f"blocks of {rule.block_tokens} in {rule.steps} steps, refreshed {often}, "
    if every == 1 or rule.delay >= rule.steps:
        return told + "exact"
    return (
        told + f"retention {rule.retention:g}: `penstock bench agreement` tells what that changes"
    )
