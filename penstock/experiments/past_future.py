"""Past-Future: admission by the memory to come, against aggressive and conservative admission and SGLang's ratio.

Source: Past-Future scheduler (LightLLM; Gong et al., ASPLOS 2025; artifact WuSiYu/lightllm-ae, commit d93ff69). Length
distributions, 120,000 tokens of KV memory and the promise (first token within 10 s, no gap above 1.5 s) are theirs.
ShareGPT-o1's rows come without a licence: "o1" is drawn with their published means (381 and 2,160 tokens); its shapes
(lognormal prompts, gamma answers) are ours. They served Llama-2-7B on an A100; that shape is modelled here, with a
longer context, since its own 4,096 tokens hold no such answers.

Two parts. `memory`: all requests wait from the start and prefill costs nothing, so admission is the one question: steps
to drain the queue and evictions. `clients`: a closed loop (lab.clients) with all costs charged, in three settings:

    mixed     vLLM v1's batches (2,048 tokens, decodes beside prompts), callers wait however late an answer is
    spaced    their server: prompts first, up to 18,000 tokens a step, two decode steps between two such steps; an
              answer that breaks the promise is cancelled at once, and asked for again at the end of the queue
    prompts   as spaced, but prompt steps follow each other as long as anybody may start (vLLM of 2023)

Load is the number of clients as a share of the requests that fit in memory half way through their answers.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.experiments.sglang_ratio import FREE, Decoding
from penstock.lab.clients import Promise, serve_clients
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
from penstock.lab.trial import SCHEDULERS, Finishes, deployment
from penstock.traffic import TraceMeta

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIFORM = {  # prompt and output tokens
    "Dist1": ((32, 4096), (2048, 4096)),
    "Dist2": ((3072, 5120), (3072, 5120)),
    "Dist3": ((2048, 4096), (32, 4096)),
}
MOST = {"Dist1": 4096, "Dist2": 5120, "Dist3": 4096, "o1": 8192}  # max_tokens of all requests
SLOTS = {
    "Dist1": 33,
    "Dist2": 20,
    "Dist3": 29,
    "o1": 82,
}  # memory / (prompt + answer / 2), in means
POOL_TOKENS, BLOCK = 120_000, 16
PROMISE = Promise(ttft_s=10.0, gap_s=1.5)
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "torch_dtype": "float16",
}
ADMITS: dict[str, object] = {
    "aggressive-99": {"name": "watermark", "fraction": 0.01},
    "aggressive-95": {"name": "watermark", "fraction": 0.05},
    "conservative": "conservative",
    "past-future": {"name": "past-future", "every_steps": 10},
    "past-future-cold": {"name": "past-future", "every_steps": 10},
}
WARM = 500  # lengths of an earlier run that past-future begins with
BATCHES: dict[str, dict[str, object]] = {
    "mixed": {"name": "vllm-v1"},
    "spaced": {"name": "prefill-first", "max_tokens": 18_000, "decodes_between": 2},
    "prompts": {"name": "prefill-first", "max_tokens": 18_000},
}
LOADS = {"mixed": (1.0, 1.3), "spaced": (2.0,), "prompts": (2.0,)}
FEWER, AS_MANY, CALM, BETTER = 0.2, 0.98, 0.95, 2.0  # what the criterion asks
NEAR_ORACLE, LEAN = 1.025, 0.3


@dataclass(kw_only=True)
class Lot:
    """`num` requests of a distribution, all there at 0 s. `is_told`: their callers ask for just what they will get."""

    distribution: str
    num: int
    seed: int
    is_told: bool = False
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(self.distribution, "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for request in self.requests():
            yield 0.0, request

    def requests(self) -> Iterator[Request]:
        chance = stream(self.seed, "experiments", "past-future", self.distribution)
        most = MOST[self.distribution]
        for place in range(self.num):
            if self.distribution == "o1":
                prompt = min(8192, max(8, round(chance.lognormvariate(log(124), 1.5))))
                output = min(most, max(16, round(chance.gammavariate(2.0, 1080.0))))
            else:
                prompts, outputs = UNIFORM[self.distribution]
                prompt, output = chance.randint(*prompts), chance.randint(*outputs)
            yield Request(
                id=RequestId(f"{self.distribution}-{place}"),
                model="default",
                prompt=TracedPrompt(prompt),
                sampling=Sampling(max_tokens=output if self.is_told else most),
                true_output=output,
            )


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    names = tuple(MOST) if scale.is_full else ("Dist1", "o1")
    points: list[dict[str, object]] = []
    for name in names:
        for variant in (*ADMITS, "sglang", "true lengths"):
            points.append({"part": "memory", "distribution": name, "variant": variant})
        for setting, loads in LOADS.items():
            for load in loads if scale.is_full else loads[-1:]:
                here = {"part": setting, "distribution": name, "load": load}
                variants = [*ADMITS] if setting == "mixed" else [*ADMITS][:-1]
                if setting == "mixed":
                    variants += [*SCHEDULERS] if load == loads[-1] else ["vllm-2048", "sglang"]
                points += [{**here, "variant": variant} for variant in variants]
    return [
        {**point, "num": _num(point, scale), "seed": seed}
        for point in points
        for seed in scale.seeds
    ]


def _num(point: Mapping[str, object], scale: Scale) -> int:
    if point["part"] == "memory":
        return 300 if scale.is_full else 80
    return (6 if scale.is_full else 2) * SLOTS[str(point["distribution"])]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    variant, part = str(settings["variant"]), str(settings["part"])
    lot = Lot(
        distribution=str(settings["distribution"]),
        num=int(number(settings, "num")),
        seed=int(number(settings, "seed")),
        is_told=variant == "true lengths",
    )
    if part == "memory":
        return drained(variant, lot)
    num_clients = round(number(settings, "load") * SLOTS[lot.distribution])
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "llama-2-7b-16k"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
        executor = {"kind": "modelled", "gpu": "a100-80g"}
        if part == "mixed":
            executor["scheduler"] = "stored"
        config = deployment(
            policy_of(variant, part),
            model=str(folder),
            cache__num_blocks=POOL_TOKENS // BLOCK,
            cache__prefix=False,
            executor=executor,
            lengths=learned(variant, lot),
        )
        return serve_clients(
            config,
            list(lot.requests()),
            num_clients=num_clients,
            promise=PROMISE,
            is_strict=part != "mixed",
        )


def policy_of(variant: str, part: str) -> dict[str, object]:
    if variant in ADMITS:
        return {"admit": ADMITS[variant], "batch": BATCHES[part]}
    return dict(SCHEDULERS[variant])


def learned(variant: str, lot: Lot) -> dict[str, object]:
    """The history that a deployment begins with: answers to other requests of the same distribution."""
    if variant != "past-future":
        return {}
    before = dataclasses.replace(lot, num=WARM, seed=lot.seed + 1000)
    return {"begin": [request.true_output for request in before.requests()]}


def drained(variant: str, lot: Lot) -> dict[str, object]:
    """Memory only: no token budget, so that prompts cost a step and nothing more."""
    limits: dict[str, object] = {"max_jobs": 4096}
    if variant == "sglang":
        batch = {"name": "sglang", "chunk_tokens": None, "max_prefill_tokens": FREE, **limits}
        policy: dict[str, object] = {"preset": "sglang", "batch": batch}
    else:
        admit = ADMITS["conservative" if lot.is_told else variant]
        policy = {"admit": admit, "batch": {"name": "vllm-v1", "max_tokens": FREE, **limits}}
    config = deployment(
        policy,
        cache__num_blocks=POOL_TOKENS // BLOCK,
        cache__prefix=False,
        lengths=learned(variant, lot),
    )
    finishes, decoding = Finishes(), Decoding()
    found = simulate(config, lot, has_gaps=False, listeners=(finishes, decoding)).figures.all
    return {
        "steps": decoding.num_steps,
        "evictions": 100 * found.num_preemptions / max(1, found.num_finished),
        "num_finished": found.num_finished,
        "finished": finishes.digest(),
    }


# ---------------------------------------------------------------------------- judging


class Judged:
    """Collects what was asked and what held."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.ratios: list[Ratio] = []
        self.held: dict[str, list[bool]] = {}

    def figure(self, name: str, where: Mapping[str, object]) -> float:
        return mean(by_seed(self.rows, name, **where).values())

    def ask(self, about: str, is_held: bool) -> None:
        self.held.setdefault(about, []).append(is_held)

    def compare(
        self, figure: str, where: Mapping[str, object], other: str, published: str = ""
    ) -> float:
        """Mean ratio of Past-Future to another variant, seed by seed; nan where that had none at all."""
        here = " ".join(f"{value}" for value in where.values())
        values = paired(
            self.rows,
            figure,
            {**where, "variant": "past-future"},
            {**where, "variant": other},
        )
        name = f"{here}: {figure}, past-future / {other}"
        self.ratios.append(Ratio(name=name, values=values, published=published))
        return mean(values)


def judge(rows: Sequence[Row]) -> Verdict:
    judged = Judged(rows)
    names = [name for name in MOST if any(row.get("distribution") == name for row in rows)]
    for name in names:
        _judge_memory(judged, {"part": "memory", "distribution": name})
        for setting, loads in LOADS.items():
            for load in loads:
                where = {"part": setting, "distribution": name, "load": load}
                if any(row.fits(where) for row in rows):
                    _judge_clients(judged, where)
    num_held = sum(sum(each) for each in judged.held.values())
    num_all = sum(len(each) for each in judged.held.values())
    told = [f"{about} at {sum(each)} of {len(each)}" for about, each in judged.held.items()]
    why = f"{'; '.join(told)}. {_goodputs(judged, names)}"
    return Verdict(outcome=outcome_of(num_held, num_all), why=why, ratios=tuple(judged.ratios))


def _judge_memory(judged: Judged, where: dict[str, object]) -> None:
    oracle = judged.compare("steps", where, "true lengths")
    lean = judged.compare("evictions", where, "aggressive-99", "0.13-0.26")
    judged.compare("steps", where, "conservative")
    judged.compare("steps", where, "sglang")
    judged.compare("steps", where, "past-future-cold")
    judged.ask("within 2.5 % of the steps with true lengths", oracle <= NEAR_ORACLE)
    judged.ask("memory only, at most 0.3 of the evictions of aggressive", lean <= LEAN)


def _judge_clients(judged: Judged, where: dict[str, object]) -> None:
    goodput = judged.compare("goodput_tokens_per_s", where, "aggressive-99", "up to 2-3")
    judged.compare("goodput_tokens_per_s", where, "conservative", "up to 2-3")
    part = where["part"]
    judged.ask(f"goodput twice that of aggressive ({part})", goodput >= BETTER)
    if part != "mixed":
        return
    judged.compare("goodput_tokens_per_s", where, "sglang")
    judged.compare("goodput_tokens_per_s", where, "past-future-cold")
    fewer = judged.compare("evictions", where, "vllm-2048")
    as_many = judged.compare("tokens_per_s", where, "vllm-2048")
    ours = {**where, "variant": "past-future"}
    judged.ask("evictions at most a fifth of full fit", fewer <= FEWER)
    judged.ask("tokens/s within 2 %", as_many >= AS_MANY)
    judged.ask("gaps kept for 95 %", judged.figure("gaps_in_time", ours) >= CALM)


def _goodputs(judged: Judged, names: Sequence[str]) -> str:
    """Good tokens a second on the first distribution, where everything is told."""
    told = []
    for setting, loads in LOADS.items():
        where = {"part": setting, "distribution": names[0], "load": loads[-1]}
        rates = [
            f"{variant} {judged.figure('goodput_tokens_per_s', {**where, 'variant': variant}):.0f}"
            for variant in [*ADMITS][:-1]
        ]
        told.append(f"{setting} {', '.join(rates)}")
    return f"Good tokens/s on {names[0]} at the highest load: {'; '.join(told)}"


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, len(LOADS))
    for ax, (setting, loads) in zip(axes, LOADS.items(), strict=True):
        here = [row for row in rows if row.fits({"part": setting, "load": loads[-1]})]
        names = sorted({str(row.get("distribution")) for row in here})
        for place, variant in enumerate([*ADMITS][:-1]):
            values = [
                [
                    row.number("goodput_tokens_per_s")
                    for row in here
                    if row.fits({"distribution": name, "variant": variant})
                ]
                for name in names
            ]
            at = [number + 0.2 * place - 0.3 for number in range(len(names))]
            ax.bar(at, [mean(each) for each in values], width=0.18, label=variant)
            ax.vlines(at, [min(v) for v in values], [max(v) for v in values], color="black")
        ax.set_xticks(range(len(names)), names)
        ax.set_title(f"{setting}, load {loads[-1]:g}")
        ax.set_ylabel("good tokens/s")
    axes[0].legend()


EXPERIMENT = Experiment(
    name="past-future",
    system="Past-Future: admission by the memory to come",
    source="Past-Future scheduler, LightLLM (ASPLOS 2025) and its artifact",
    claim="Admitting by the peak of sampled future memory evicts far fewer requests than aggressive admission and "
    "idles less than conservative admission, for up to 2-3 times the goodput of either.",
    criterion=f"On each distribution. Memory only: at most {NEAR_ORACLE:g} times the steps with true lengths and "
    f"{LEAN:g} times the evictions of aggressive admission (99 %). Mixed batches: at most {FEWER:g} times full fit's "
    f"evictions, at least {AS_MANY:g} times its tokens/s, gaps kept for {CALM:.0%}. In every setting: goodput at least "
    f"{BETTER:g} times that of aggressive admission.",
    workload="Dist1-3 of the source and one like ShareGPT-o1; memory only, 300 requests at once; closed loop, six "
    "requests for each that fits in memory, clients for 1.0 to 2.0 times what fits; 10 s to the first token, "
    "no gap above 1.5 s.",
    constants=(
        ("KV memory", f"{POOL_TOKENS:,} tokens in blocks of {BLOCK}, no prefix cache"),
        ("past-future", f"reserve 3 %, window 1,000, {WARM} lengths of an earlier run, 10 steps"),
        ("past-future-cold", "the same without that run: max_tokens until 32 answers ended"),
        ("SIMULATED", "Llama-2-7B with 16,384 positions, float16, on a modelled A100-80G"),
        (
            "scheduler time",
            "stored table in mixed; not charged in spaced and prompts (none is stored)",
        ),
    ),
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
