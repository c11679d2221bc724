"""A replica that is never without work: which steps it plans, and what they would take on this or that executor.

Offline all requests are there from the start, so what is planned does not depend on how long steps take. The steps are
played once, each of a second in virtual time, through the real replica and its policies, and then priced by any number
of step models. Under equal steps a ratio of throughputs is a ratio of seconds.

The replica begins as in the middle of its life, since otherwise answers of one length would end together for ever: as
many requests as run side by side come first, drawn by the length of their answers (long ones are under way more
often), with an evenly drawn part of the answer behind them, as a part of the prompt. What is measured are the steps
from SKIPPED of the way to when the last prompt is computed.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from penstock.assemble.presets import policy_tables
from penstock.cluster.spec import policies_of
from penstock.core.events import Event, Finished, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Caps, Request, RequestId, Sampling
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.nano_layer import Load
from penstock.cost.predict import StepPredictor
from penstock.cost.step import StepCost, StepFeatures, StepModel
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run

SKIPPED = 0.6
Lengths = Sequence[tuple[int, int]]  # (prompt, output) tokens of requests


class Recorder:
    """A step model that says a second and writes down what it was asked."""

    name, digest = "a second a step", "second"

    def __init__(self) -> None:
        self.steps: list[StepFeatures] = []

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        self.steps.append(features)
        return 1.0

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return [self.seconds(features.grown(step), share) for step in range(count)]

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        return StepCost(1.0, None, None, None)


@dataclass(slots=True)
class Played:
    """What was planned. `num_late`: answers that ended by themselves, each of which cost a token more in NanoFlow."""

    steps: list[StepFeatures] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    num_late: int = 0
    num_preemptions: int = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished) and event.reason in ("stop", "length"):
            self.names.append(event.request)
            self.num_late += event.reason == "stop"
        elif isinstance(event, Stepped):
            self.num_preemptions += len(event.evicted)

    @property
    def steady(self) -> list[StepFeatures]:
        """Steps of the middle: full of decodes, with prompts still to come."""
        last = max((at for at, step in enumerate(self.steps) if step.num_prefills), default=0)
        return self.steps[int(SKIPPED * last) : last] or self.steps

    @property
    def num_tokens(self) -> int:
        return sum(step.num_tokens for step in self.steps)


def under_way(lengths: Lengths, num: int, seed: int) -> list[tuple[int, int]]:
    """(known, left) tokens of `num` requests that are met in the middle of their answers."""
    draw = stream(seed, "nano offline", "under way")
    ends = list(accumulate(output for _, output in lengths))
    found = []
    for _ in range(num):
        at = draw.randrange(ends[-1])
        place = bisect_right(ends, at)
        done = ends[place] - 1 - at
        found.append((lengths[place][0] + done, lengths[place][1] - done))
    return found


def play_offline(lengths: Lengths, policy: Mapping[str, object], *, num_blocks: int) -> Played:
    """Serve all of these at once with policies as in a fleet's table."""
    played, recorder = Played(), Recorder()
    tables = policy_tables(policy, has_prefix_cache=False)
    predictors = Predictors(
        cost=StepPredictor(Fitted({"step": 1.0}, name="", digest="", num_layers=1), 1),
        lengths=RecentLengths(),
    )

    async def main() -> None:
        executor = ModelledExecutor(recorder, caps=Caps(num_layers=1, max_context=1 << 20))
        config = ReplicaConfig(num_blocks=num_blocks, block_size=16)
        replica = Replica(config, executor, policies_of(tables), predictors, log=played)
        for place, (prompt, output) in enumerate(lengths):
            request = Request(
                id=RequestId(f"{place}"),
                model="model",
                prompt=TracedPrompt(prompt),
                sampling=Sampling(max_tokens=output + 1),  # so that all end by themselves
                true_output=output,
            )
            replica.submit(request, every_token=False)
            await asyncio.sleep(0)
        await replica.drain()
        await replica.stop()

    run(main())
    played.steps = recorder.steps
    return played


def mean_load(lengths: Lengths, tokens: int) -> Load:
    """The load of a full batch in the long run, from the lengths alone.

    A request's tokens are prompt and answer; a decode finds the prompt and half of the answer, in the mean over
    tokens, and a token of a prompt half of that.
    """
    prompts, outputs = [p for p, _ in lengths], [o for _, o in lengths]
    decodes = round(tokens * sum(outputs) / (sum(prompts) + sum(outputs)))
    prefills = tokens - decodes
    pairs = sum(p * (p + 1) / 2 for p in prompts) / sum(prompts)
    return Load(
        decodes=decodes,
        decode_context=decodes * round(mean_context(lengths)),
        prefills=prefills,
        num_prefills=1 + round(prefills * len(prompts) / sum(prompts)),
        pairs=prefills * round(pairs),
    )


def mean_context(lengths: Lengths) -> float:
    """Positions that a decode finds, in the mean over decoded tokens."""
    return sum(o * (p + o / 2) for p, o in lengths) / sum(o for _, o in lengths)


def tokens_per_s(steps: Sequence[StepFeatures], model: StepModel, most: int = 200) -> float:
    """Tokens a second, prompts and answers, over at most so many of the steps, evenly chosen."""
    chosen = [steps[place * len(steps) // most] for place in range(most)]
    chosen = list(steps) if len(steps) <= most else chosen
    return sum(step.num_tokens for step in chosen) / sum(map(model.seconds, chosen))
