"""SGLang's decaying new-token ratio against vLLM's full fit: steps to drain a queue, and how many are thrown out.

Source: SGLang (sglang 0.5.23, srt/managers/schedule_policy.py, new_token_ratio); vLLM v1's reserve of the whole prompt
(vllm 0.33, v1/core/sched/scheduler.py). The length distributions are those of the Past-Future scheduler's evaluation
(LightLLM): Dist1 decode heavy, Dist2 balanced, Dist3 prefill heavy.

What is measured is memory only: 1,000 requests wait from the start, 120,000 tokens of KV memory, and prefill costs
nothing (no token budget), so the one question left is whom to admit. Steps are those in which somebody decodes. SGLang
decides at every step and so does vLLM here. ShareGPT-o1, the fourth column of that evaluation, is not available.

No token budget and no promises: the two budgets of vLLM and S-EDF, baselines where schedulers are compared, all
come to full fit here and are not run besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.core.events import Completed, Event, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.experiment import (
    Experiment,
    Ratio,
    Row,
    Scale,
    Settings,
    Verdict,
    by_seed,
    mean,
    number,
    outcome_of,
    paired,
)
from penstock.lab.simulate import simulate
from penstock.lab.trial import Finishes, deployment
from penstock.traffic import TraceMeta

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISTRIBUTIONS = {  # prompt and output tokens, uniform
    "Dist1": ((32, 4096), (2048, 4096)),
    "Dist2": ((3072, 5120), (3072, 5120)),
    "Dist3": ((2048, 4096), (32, 4096)),
}
POOL_TOKENS, BLOCK = 120_000, 16
FREE = 1 << 24  # tokens a step: no budget
VARIANTS: dict[str, dict[str, object]] = {
    "full-fit": {"preset": "vllm-v1", "batch": {"max_tokens": FREE, "max_jobs": 4096}},
    "watermark-5%": {
        "preset": "vllm-v1",
        "batch": {"max_tokens": FREE, "max_jobs": 4096},
        "admit": {"name": "watermark", "fraction": 0.05},
    },
    "sglang": {
        "preset": "sglang",
        "batch": {"chunk_tokens": None, "max_prefill_tokens": FREE, "max_jobs": 4096},
    },
}
FEWER, SLOWER = 0.2, 1.08  # evictions and steps of the ratio against full fit
# Steps and evictions per 100 requests, of an independent memory-only simulation of both rules.
KNOWN = {"Dist1": ("1.061", "9 / 128"), "Dist2": ("1.042", "14 / 94"), "Dist3": ("1.076", "0 / 55")}


@dataclass(kw_only=True)
class Queue:
    """`num` requests of a distribution, all there at 0 s."""

    distribution: str
    num: int
    seed: int
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(self.distribution, "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        (low, high), (short, long) = DISTRIBUTIONS[self.distribution]
        chance = stream(self.seed, "experiments", self.distribution)
        for place in range(self.num):
            prompt, output = chance.randint(low, high), chance.randint(short, long)
            yield (
                0.0,
                Request(
                    id=RequestId(f"{self.distribution}-{place}"),
                    model="default",
                    prompt=TracedPrompt(prompt),
                    sampling=Sampling(max_tokens=long),
                    true_output=output,
                ),
            )


class Decoding:
    """Counts the steps in which somebody decodes."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._decodes: set[int | None] = set()

    def emit(self, event: Event) -> None:
        if isinstance(event, Stepped) and any(tokens == 1 for _, tokens in event.chunks):
            self._decodes.add(event.plan)
        elif isinstance(event, Completed) and event.plan in self._decodes:
            self._decodes.discard(event.plan)
            self.num_steps += event.steps_run


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    return [
        {
            "variant": variant,
            "distribution": name,
            "num": 1000 if scale.is_full else 150,
            "seed": seed,
        }
        for name in DISTRIBUTIONS
        for variant in VARIANTS
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    config = deployment(
        VARIANTS[str(settings["variant"])],
        cache__num_blocks=POOL_TOKENS // BLOCK,
        cache__prefix=False,
    )
    queue = Queue(
        distribution=str(settings["distribution"]),
        num=int(number(settings, "num")),
        seed=int(number(settings, "seed")),
    )
    finishes, decoding = Finishes(), Decoding()
    found = simulate(config, queue, has_gaps=False, listeners=(finishes, decoding))
    figures = found.figures.all
    return {
        "steps": decoding.num_steps,
        "evictions": 100 * figures.num_preemptions / max(1, figures.num_finished),
        "num_finished": figures.num_finished,
        "makespan_s": found.figures.duration_s,
        "finished": finishes.digest(),
    }


def judge(rows: Sequence[Row]) -> Verdict:
    ratios: list[Ratio] = []
    told, fewer, fast = [], 0, 0
    for name in DISTRIBUTIONS:
        ratio = {"variant": "sglang", "distribution": name}
        fit = {"variant": "full-fit", "distribution": name}
        mark = {"variant": "watermark-5%", "distribution": name}
        steps = paired(rows, "steps", ratio, fit)
        evictions = paired(rows, "evictions", ratio, fit)
        known_steps, known_evictions = KNOWN[name]
        ratios.append(
            Ratio(name=f"{name}: steps, ratio / full fit", values=steps, published=known_steps)
        )
        ratios.append(Ratio(name=f"{name}: evictions, ratio / full fit", values=evictions))
        thrown = [
            mean(by_seed(rows, "evictions", **where).values()) for where in (ratio, fit, mark)
        ]
        told.append(
            f"{name} {thrown[0]:.0f} against {thrown[1]:.0f} evictions per 100 (known: {known_evictions}), "
            f"a 5 % watermark {thrown[2]:.0f}"
        )
        fewer += mean(evictions) <= FEWER
        fast += mean(steps) <= SLOWER
    num = len(DISTRIBUTIONS)
    why = f"evictions hold on {fewer} of {num} distributions and steps on {fast}: {'; '.join(told)}"
    if fast < num:
        why += (
            ". SGLang, and so this policy, marks the batch full after a refusal until somebody leaves, so that a ratio "
            "that decays meanwhile admits nobody; the known figures ask again at every step"
        )
    return Verdict(outcome=outcome_of(fewer + fast, 2 * num), why=why, ratios=tuple(ratios))


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, len(DISTRIBUTIONS))
    for ax, name in zip(axes, DISTRIBUTIONS, strict=True):
        for variant in ("sglang", "full-fit", "watermark-5%"):
            where = {"variant": variant, "distribution": name}
            steps = list(by_seed(rows, "steps", **where).values())
            ax.scatter(steps, list(by_seed(rows, "evictions", **where).values()), label=variant)
        ax.set_title(name)
        ax.set_xlabel("steps in which somebody decodes")
        ax.set_ylabel("evictions per 100 requests")
        ax.set_ylim(bottom=-1)
        ax.grid(alpha=0.3)
    axes[0].legend()


EXPERIMENT = Experiment(
    name="sglang-ratio",
    system="SGLang: decaying new-token ratio against full fit",
    source="SGLang 0.5.23 schedule_policy; distributions of Past-Future (LightLLM)",
    claim="Admitting by a decaying share of what running jobs may still write evicts far fewer jobs than admitting "
    "whatever fits, at the price of a few per cent more steps.",
    criterion=f"On each distribution: at most {FEWER:g} times the evictions of full fit, in at most {SLOWER:g} "
    "times its steps.",
    workload="1,000 requests at once, memory only: 120,000 tokens of KV, prefill free, max_tokens = the longest "
    "output.",
    constants=(
        ("KV memory", f"{POOL_TOKENS:,} tokens in blocks of {BLOCK}, no prefix cache"),
        ("ratio", "initial 0.7, least 0.098, 600 steps from one to the other (SGLang's)"),
    ),
    compares_schedulers=False,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
