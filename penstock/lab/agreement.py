"""How much the text of a diffusion language model changes with what it keeps: every setting beside the exact run.

The model is opened once, in this process, and served by the real replica, policy and executor, greedily and as a batch.
A setting is a `CanvasRule`; each is measured twice:

    continued   the answer is a canvas of masks behind the prompt, as callers are served. `same`: positions whose token
                is that of the exact run; `whole`: answers all of whose tokens are; `dense`: as `same`, against the
                setting that refreshes as often and keeps all. After one different token a text may go another way,
                so `same` falls faster than the model gets worse
    infilled    the first block behind the prompt with every second of its tokens masked, and the true text around it:
                what is guessed right, where one wrong guess does not lead to the next

`right` is against the true continuation, where the prompts' file tells one. Exact: every step computes everything
(`delay` as long as the block's steps), which is the model's own sampling by low confidence, block by block. Keeping all
is not exact as long as steps are reused: what lies outside the block is as of the last refresh.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import BadConfig, BadModel
from penstock.core.events import Event, Stepped
from penstock.core.prompt import TokenPrompt
from penstock.core.types import CanvasRule, Output, Request, RequestId, Sampling
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.engine.folder import ModelFacts, model_facts
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy.admit.full_fit import FullFit
from penstock.policy.batch.diffusion import Diffusion
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs

if TYPE_CHECKING:
    from penstock.engine.torch.build import EngineConfig
    from penstock.engine.torch.diffusion.model import DiffusionModel

HELD_OUT = "held_out.jsonl"  # beside the weights: prompts that a model's maker offers


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is loaded, and the number of its blocks."""

    model: DiffusionModel
    num_blocks: int
    facts: ModelFacts
    config: EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`truth`: how the text went on, as far as that is known."""

    kind: str
    prompt: tuple[int, ...]
    truth: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Shares of one setting on prompts of one kind; None where the truth is not known.

    `computed`: query tokens for each token told. `kept`: positions kept, of an answer of the mean length.
    """

    kind: str
    rule: CanvasRule
    num: int
    same: float
    whole: float
    dense: float | None
    right: float | None
    infilled: float | None
    computed: float
    kept: int


def settings(
    usual: CanvasRule,
    retentions: Sequence[float],
    refreshes: Sequence[int],
    thresholds: Sequence[float] = (),
) -> list[CanvasRule]:
    """The exact run first; then what is kept, refreshed once a block; the usual refreshed more often; and unmasked
    in parallel.
    """
    found = [exact(usual)]
    found += [replace(usual, retention=share, refresh_every=None) for share in retentions]
    both = dict.fromkeys((1.0, usual.retention))
    found += [
        replace(usual, retention=share, refresh_every=every)
        for every in refreshes
        for share in both
    ]
    found += [
        replace(usual, retention=share, threshold=least) for least in thresholds for share in both
    ]
    return list(dict.fromkeys(found))


def exact(rule: CanvasRule) -> CanvasRule:
    return replace(rule, delay=rule.steps, refresh_every=None, retention=1.0)


def is_exact(rule: CanvasRule) -> bool:
    return rule.delay >= rule.steps


def agreement(
    model: str,
    *,
    prompts: Path | None,
    rules: Sequence[CanvasRule],
    num_masks: int = 64,
    config: EngineConfig | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Agreement]:
    """One entry a kind of prompt and rule; the first rule is what the others are compared with."""
    from penstock.engine.torch.build import EngineConfig
    from penstock.engine.torch.diffusion.infill import infilled
    from penstock.engine.torch.diffusion.open import open_diffusion

    facts = model_facts(model)
    if facts.canvas is None:
        raise BadModel(
            f"{model} writes from left to right: there is nothing to compare",
            hint="this is for diffusion language models (LLaDA, Dream)",
        )
    asked = read_prompts(facts, prompts, num_masks)
    config = config or EngineConfig()
    model_opened, num_blocks = open_diffusion(facts, config)
    opened = Opened(model_opened, num_blocks, facts, config)
    texts, infills = [], []
    for place, rule in enumerate(rules):
        on_done(place, len(rules))
        texts.append(served(opened, rule, asked, num_masks))
        infills.append(
            [
                infilled(opened.model, rule, one.prompt, one.truth) if one.truth else (0, 0)
                for one in asked
            ]
        )
    on_done(len(rules), len(rules))
    return compared(asked, rules, texts, infills)


def read_prompts(facts: ModelFacts, path: Path | None, num_masks: int) -> list[Asked]:
    """Lines of {"prompt", "answer" (may be missing), "kind" (may be missing)}. Raises BadConfig."""
    from tokenizers import Tokenizer

    place = path or facts.folder / HELD_OUT
    if not place.exists():
        raise BadConfig(
            f"there are no prompts: {place} does not exist",
            hint='give --prompts FILE with lines like {"prompt": "...", "answer": "..."}',
        )
    tokenizer = Tokenizer.from_file(str(facts.folder / "tokenizer.json"))
    found = []
    for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1):
        try:
            told = json.loads(line)
            prompt, answer = str(told["prompt"]), str(told.get("answer", ""))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BadConfig(
                f'{place}:{number}: not an object with "prompt"',
                hint='a line is {"prompt": "...", "answer": "..."}; "answer" may be left out',
            ) from None
        ids, truth = (
            tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, answer)
        )
        if not ids or len(ids) + max(num_masks, len(truth)) > facts.max_context:
            raise BadConfig(
                f"{place}:{number}: a prompt of {len(ids)} tokens does not fit a context of {facts.max_context}",
                hint="leave the line out, or ask for fewer tokens",
            )
        kind = str(told.get("kind", "all"))
        found.append(Asked(kind=kind, prompt=tuple(ids), truth=tuple(truth)))
    if not found:
        raise BadConfig(f"{place} holds no prompts", hint="write one a line")
    return found


@dataclass(frozen=True, slots=True)
class Served:
    """Tokens of every answer, in the order of the prompts; query tokens of all steps."""

    texts: tuple[tuple[int, ...], ...]
    computed: int


@dataclass(slots=True)
class _Ears:
    """What a replica says."""

    told: dict[str, list[int]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    computed: int = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.computed += sum([tokens for _, tokens in event.chunks])

    def hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        for request, output in outputs:
            self.errors += [output.error] if output.error is not None else []
            self.told.setdefault(request, []).extend(output.ids)


def served(opened: Opened, rule: CanvasRule, asked: Sequence[Asked], num_masks: int) -> Served:
    """All prompts at once through the replica. Raises BadModel with what went wrong."""
    ears = _Ears()
    asyncio.run(_serve(opened, rule, asked, num_masks, ears))
    if ears.errors:
        raise BadModel(f"{opened.facts.folder}: {ears.errors[0]}")
    texts = [tuple(ears.told[f"{place}"]) for place in range(len(asked))]
    return Served(tuple(texts), ears.computed)


async def _serve(
    opened: Opened, rule: CanvasRule, asked: Sequence[Asked], num_masks: int, ears: _Ears
) -> None:
    from penstock.engine.torch.diffusion.executor import DiffusionExecutor

    nothing = Fitted({"step": 1.0}, name="", digest="", num_layers=1)
    replica = Replica(
        ReplicaConfig(num_blocks=opened.num_blocks, block_size=opened.config.block_size),
        DiffusionExecutor(opened.model, opened.num_blocks, opened.facts, opened.config, rule),
        ReplicaPolicies(
            order=Fcfs(), admit=FullFit(), batch=Diffusion(), evict=RecomputeLast(), blocks=Lru()
        ),
        Predictors(cost=StepPredictor(nothing, 1), lengths=RecentLengths()),
        log=ears,
        on_outputs=ears.hear,
    )
    running = asyncio.create_task(replica.run())
    greedy = Sampling(max_tokens=num_masks, temperature=0.0, ignore_eos=True)
    for place, one in enumerate(asked):
        prompt = TokenPrompt(list(one.prompt))
        name = RequestId(f"{place}")
        replica.submit(Request(id=name, model="model", prompt=prompt, sampling=greedy))
    await replica.drain()
    await replica.stop()
    await running


def compared(
    asked: Sequence[Asked],
    rules: Sequence[CanvasRule],
    texts: Sequence[Served],
    infills: Sequence[Sequence[tuple[int, int]]],
) -> list[Agreement]:
    """By kind of prompt, in the order of the rules, the first of which is the exact one."""
    found = []
    for kind in dict.fromkeys([one.kind for one in asked]):
        places = [place for place, one in enumerate(asked) if one.kind == kind]
        truths = [asked[place].truth for place in places]
        picked = [[text.texts[place] for place in places] for text in texts]
        for number, rule in enumerate(rules):
            mine, num_told = picked[number], sum([len(text) for text in texts[number].texts])
            dense = [at for at, other in enumerate(rules) if _is_dense_of(other, rule)]
            filled = [infills[number][place] for place in places]
            num_filled = sum([count for _, count in filled])
            length = sum([len(asked[place].prompt) for place in places]) // len(places)
            length += len(mine[0])
            found.append(
                Agreement(
                    kind=kind,
                    rule=rule,
                    num=len(places),
                    same=equal_share(mine, picked[0]),
                    whole=sum([a == b for a, b in zip(mine, picked[0], strict=True)]) / len(mine),
                    dense=equal_share(mine, picked[dense[0]]) if dense else None,
                    right=equal_share(mine, truths) if all(truths) else None,
                    infilled=sum([right for right, _ in filled]) / num_filled
                    if num_filled
                    else None,
                    computed=texts[number].computed / num_told,
                    kept=0 if is_exact(rule) else rule.num_kept(length),
                )
            )
    return found


def _is_dense_of(other: CanvasRule, rule: CanvasRule) -> bool:
    return not is_exact(rule) and other == replace(rule, retention=1.0)


def equal_share(texts: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Of the positions that both have, over all pairs."""
    pairs = [pair for text, other in zip(texts, others, strict=True) for pair in zip(text, other)]  # noqa: B905
    return sum([a == b for a, b in pairs]) / len(pairs)


def text_of(found: Sequence[Agreement]) -> str:
    """A table for each kind of prompt."""
    lines: list[str] = []
    for kind in dict.fromkeys([one.kind for one in found]):
        rows = [one for one in found if one.kind == kind]
        lines += (
            ["", f"{kind}: {rows[0].num} prompts"] if lines else [f"{kind}: {rows[0].num} prompts"]
        )
        heads = ("same", "whole", "dense", "right", "infilled", "computed", "kept")
        lines.append(f"  {'setting':38}" + "".join([f"{head:>10}" for head in heads]))
        for one in rows:
            shares = (one.same, one.whole, one.dense, one.right, one.infilled)
            told = [f"{_share(value):>10}" for value in shares]
            lines.append(
                f"  {named(one.rule):38}{''.join(told)}{one.computed:>10.1f}{one.kept:>10}"
            )
    lines += [
        "",
        "same, whole: tokens and answers as in the exact run; dense: tokens as when all is kept;",
    ]
    lines.append(
        "right, infilled: the true tokens; computed: query tokens a token; kept: positions"
    )
    return "\n".join(lines)


def named(rule: CanvasRule) -> str:
    if is_exact(rule):
        return "exact (every step whole)"
    often = "once a block" if rule.refresh_every is None else f"every {rule.refresh_every}"
    told = f"retention {rule.retention:g}, {often}"
    return told if rule.threshold is None else f"{told}, over {rule.threshold:g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
