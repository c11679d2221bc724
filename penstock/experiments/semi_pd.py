"""semi-PD: prefill and decode in two lanes of one device, against both in one step and against prompts first.

Source: semi-PD (Hong et al., 2025; infinigence/Semi-PD). As its readers report: 1.55 to 1.72 times the requests within
their promises on Llama models (1.55 vs vLLM, 1.62 vs DistServe, 1.72 vs disaggregation), 1.11 times for moving the
split against no partition (100 %, 100 %); with ShareGPT, TTFT 0.3 s and TPOT 0.15 s.

What stands in for the original: Llama-3.1-8B on one modelled A100-80G, one executor for all, so that only the schedule
differs. How lanes slow each other down is a model that nobody measured (penstock.cost.sharing): cores in proportion,
memory max-min fair, the full bandwidth with 40 % of the cores, prefill as fast as its share. `pessimistic` needs 70 %
and lets both lanes lose a tenth; in `optimistic` decode steps lose nothing to having few cores until arithmetic is
their limit. The publication's controller is not in its code; ours is a reconstruction.

One figure decides: the highest rate at which 90 % of the answers keep both promises, found on a grid of rates 6 % apart
and drawn straight between the two that enclose it. All schedulers but s-edf and the controller decide without looking
at promises, so one run of theirs is judged by all five pairs of them. Each scheduler takes its best setting: chunks of
512, 1,024 or 2,048, prefill shares of 40 to 70 %. Differences under 6 % are noise.

The second workload changes halfway from chat (ShareGPT) to summaries (arXiv), and only answers to the latter count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.core.types import Slo
from penstock.cost.hardware import card_of, num_blocks
from penstock.cost.shapes import PRESETS
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
)
from penstock.lab.highest_rate import Kept, Numbered, highest_rate
from penstock.lab.simulate import simulate
from penstock.lab.trial import SCHEDULERS, Finishes, deployment
from penstock.traffic.lengths import Empirical

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL, CARD = "llama-3.1-8b", "a100-80g"
PROMISES = {  # TTFT and TPOT, s; the first is the publication's for ShareGPT
    "0.3/0.15": (0.3, 0.15),
    "0.5/0.03": (0.5, 0.03),
    "1.0/0.06": (1.0, 0.06),
    "1.0/0.03": (1.0, 0.03),
    "2.0/0.025": (2.0, 0.025),
}
CHAT, SUMMARY = "sharegpt_lengths.csv", "arxiv_summarization_lengths.csv"
SAMPLE = "azure_2023_conv_200.csv"
LONGEST = 8192  # tokens of a prompt
WANTED = 0.9  # of the answers
STEP = 1.06  # between rates
SPLITS = (40, 50, 60, 70)
PLACES = {"chat": (6, 62), "shift": (-13, 38)}  # of the grid: 1.4 to 37, and 0.5 to 9.2 a second
WON, DYNAMIC_LOSS = 1.3, 0.97  # what the criterion asks


def split_of(percent: int, **batch: object) -> dict[str, object]:
    shares = {"prefill_share": percent / 100, "decode_share": (100 - percent) / 100}
    return {"preset": "semi-pd", "batch": {**shares, **batch}}


CHUNKED: dict[str, dict[str, object]] = {
    "vllm-512": SCHEDULERS["vllm-512"],
    "vllm-1024": {"preset": "vllm-v1", "batch": {"max_tokens": 1024}},
    "vllm-2048": SCHEDULERS["vllm-2048"],
}
STATIC = {f"static-{part}": split_of(part, is_elastic=False) for part in SPLITS[1:]}
ELASTIC = {f"elastic-{part}": split_of(part) for part in SPLITS}
OVERLAPPED: dict[str, dict[str, object]] = {
    "100-100": {"preset": "semi-pd", "batch": {"prefill_share": 1.0, "decode_share": 1.0}}
}
DYNAMIC: dict[str, dict[str, object]] = {
    "dynamic": {**split_of(60), "limit": {"name": "semi-pd"}},
}
PESSIMISTIC = {"elastic-50, pessimistic": split_of(50)}
OPTIMISTIC = {f"elastic-{part}, optimistic": split_of(part) for part in (60, 70)}
OTHERWISE = PESSIMISTIC | OPTIMISTIC  # shared in other ways
BLIND = CHUNKED | {"sglang": SCHEDULERS["sglang"]} | STATIC | ELASTIC | OVERLAPPED | OTHERWISE
SEEING = {"s-edf": SCHEDULERS["s-edf"]} | DYNAMIC  # decide by promises
LANED = STATIC | ELASTIC | OVERLAPPED | DYNAMIC | OTHERWISE


def lengths_of(workload: str, scale: Scale) -> list[Empirical]:
    chat = Empirical(path=scale.trace(CHAT, SAMPLE))
    if workload == "chat":
        return [chat]
    if scale.data is None:  # longer prompts out of what the repository holds
        longer = [(min(3 * prompt, LONGEST), output) for prompt, output in chat.table().tolist()]
        return [chat, Empirical.of(longer)]
    return [chat, Empirical(path=scale.trace(SUMMARY))]


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    """A run for each scheduler; those that look at promises, one for each pair of them."""
    promises = list(PROMISES) if scale.is_full else ["1.0/0.03", "2.0/0.025"]
    num = {"chat": 500, "shift": 250} if scale.is_full else {"chat": 60, "shift": 40}
    found: list[Settings] = []
    for workload in ("chat", "shift"):
        for seed in scale.seeds:
            here = {"workload": workload, "num": num[workload], "seed": seed}
            for name in BLIND:
                if workload == "shift" and name not in ELASTIC | OVERLAPPED:
                    continue
                if scale.is_full or name not in OTHERWISE:
                    found.append({**here, "variant": name, "promises": promises})
            for name in SEEING:
                if workload == "shift" and name not in DYNAMIC:
                    continue
                found += [{**here, "variant": name, "promises": [each]} for each in promises]
    return found


@dataclass
class Search:
    """The highest rates of one scheduler; simulated rates are remembered for all promises."""

    settings: Settings
    scale: Scale
    digest: str = ""
    cost_model: str = ""
    _known: dict[int, Kept] = field(default_factory=dict)

    def kept(self, place: int, slo: Slo) -> Kept:
        found = self._known.get(place)
        if found is not None:
            return found
        name, workload = str(self.settings["variant"]), str(self.settings["workload"])
        lengths = lengths_of(workload, self.scale)
        arrivals = Numbered(
            lengths=lengths,
            num=int(number(self.settings, "num")),
            rate_per_s=STEP**place,
            seed=int(number(self.settings, "seed")),
            slo=slo,
            longest=LONGEST,
        )
        finishes, kept = Finishes(), Kept(first=(len(lengths) - 1) * arrivals.num)
        config = deployment(
            (BLIND | SEEING)[name],
            model=MODEL,
            gpu=CARD,
            cache__prefix=False,
            executor__lanes=2 if name in LANED else 1,
            executor__sharing=name.partition(", ")[2] or "fair",
        )
        simulated = simulate(config, arrivals, has_gaps=False, listeners=(finishes, kept))
        self.digest, self.cost_model = finishes.digest(), simulated.sources[0].cost_model
        self._known[place] = kept
        return kept

    def highest(self, promise: tuple[float, float]) -> float:
        """Requests a second; 0 where not even the lowest rate will do."""
        slo = Slo(ttft_s=promise[0], tpot_s=promise[1])
        low, high = PLACES[str(self.settings["workload"])]
        return highest_rate(
            lambda place: self.kept(place, slo).attainment(*promise),
            low=low, high=high, step=STEP, wanted=WANTED,
        )  # fmt: skip


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    search = Search(settings, scale)
    promises = settings["promises"]
    assert isinstance(promises, list)
    rates = {f"rate {name}": search.highest(PROMISES[name]) for name in promises}
    return {**rates, "finished": search.digest, "cost_model": search.cost_model}


def rates(rows: Sequence[Row], workload: str, name: str, promise: str) -> dict[object, float]:
    """Highest rates of one scheduler by seed."""
    return by_seed(rows, f"rate {promise}", variant=name, workload=workload)


def best_of(
    rows: Sequence[Row], workload: str, names: Mapping[str, object], promise: str
) -> tuple[str, dict[object, float]]:
    """The setting with the highest mean rate, and its rates by seed."""
    found = {name: rates(rows, workload, name, promise) for name in names}
    known = {name: each for name, each in found.items() if each}
    best = max(known, key=lambda name: mean(known[name].values()))
    return best, known[best]


def over(above: Mapping[object, float], below: Mapping[object, float]) -> tuple[float, ...]:
    seeds = sorted(above.keys() & below.keys(), key=str)
    return tuple(above[seed] / below[seed] for seed in seeds if below[seed] > 0)


@dataclass(frozen=True)
class Compared:
    """What one pair of promises gave."""

    promise: str
    told: str
    ratios: tuple[Ratio, ...]
    over_first: float
    over_chunked: float


def compare(rows: Sequence[Row], promise: str) -> Compared:
    chunk, chunked = best_of(rows, "chat", CHUNKED, promise)
    first = rates(rows, "chat", "sglang", promise)
    split, static = best_of(rows, "chat", STATIC, promise)
    lending, elastic = best_of(rows, "chat", ELASTIC, promise)
    dynamic = rates(rows, "chat", "dynamic", promise)
    both = rates(rows, "chat", "100-100", promise)
    pairs = {
        f"{lending} / {chunk}": (
            elastic,
            chunked,
            "1.55 (vs vLLM)" if promise == "0.3/0.15" else "",
        ),
        f"{lending} / prefill-first": (elastic, first, ""),
        f"{split} / {chunk}": (static, chunked, ""),
        f"dynamic / {lending}": (dynamic, elastic, ""),
        "dynamic / (100,100)": (dynamic, both, "1.11" if promise == "0.3/0.15" else ""),
    }
    for names in (PESSIMISTIC, OPTIMISTIC):
        if not any(row.get("variant") in names for row in rows):
            continue
        lent, sour = best_of(rows, "chat", names, promise)
        pairs[f"{lent} / {chunk}"] = (sour, chunked, "")
    told = ", ".join(
        f"{name} {mean(each.values()):.1f}"
        for name, each in (
            (chunk, chunked),
            ("prefill-first", first),
            ("s-edf", rates(rows, "chat", "s-edf", promise)),
            (split, static),
            (lending, elastic),
            ("dynamic", dynamic),
            ("(100,100)", both),
        )
    )
    ratios = tuple(
        Ratio(name=f"{promise}: {name}", values=over(above, below), published=published)
        for name, (above, below, published) in pairs.items()
    )
    return Compared(
        promise,
        f"{promise}: {told}",
        ratios,
        mean(over(elastic, first)),
        mean(over(elastic, chunked)),
    )


def shifted(rows: Sequence[Row], promise: str) -> tuple[Ratio, Ratio] | None:
    """After the shift: the controller over the split that was best before, and over that which is best now."""
    before, _ = best_of(rows, "chat", ELASTIC, promise)
    old = rates(rows, "shift", before, promise)
    now, best = best_of(rows, "shift", ELASTIC, promise)
    dynamic = rates(rows, "shift", "dynamic", promise)
    if not any(best.values()):
        return None
    return (
        Ratio(
            name=f"{promise}, after the shift: dynamic / {before}, best before",
            values=over(dynamic, old),
        ),
        Ratio(
            name=f"{promise}, after the shift: dynamic / {now}, best after",
            values=over(dynamic, best),
        ),
    )


def memory() -> tuple[Ratio, Ratio]:
    """KV memory of two cards: one replica over both, or one that prefills and one that decodes. Arithmetic only."""
    card = card_of(CARD)
    unified = num_blocks(card, PRESETS[MODEL], tp=2)
    apart = num_blocks(card, PRESETS[MODEL], tp=1)
    stranded = 1 - LONGEST / (16 * apart)
    return (
        Ratio(
            name="KV for decodes on two cards: unified / 1P+1D (arithmetic)",
            values=(unified / apart,),
        ),
        Ratio(
            name="KV pool of the prefilling card that one chunk of 8,192 leaves idle (arithmetic)",
            values=(100 * stranded,),
            published="up to 89 %",
            unit="%",
        ),
    )


def judge(rows: Sequence[Row]) -> Verdict:
    known = [name for name in PROMISES if rates(rows, "chat", "sglang", name)]
    found = [compare(rows, promise) for promise in known]
    ratios = [ratio for each in found for ratio in each.ratios]
    kept: list[bool] = []
    for promise in known:
        pair = shifted(rows, promise)
        if pair is not None:
            ratios += pair
            kept.append(not pair[0].values or mean(pair[0].values) >= DYNAMIC_LOSS)
    ratios += memory()
    tight = [each for each in found if each.promise == "2.0/0.025"]
    parts = {
        f"elastic at least {WON:g}x prefill-first at TTFT 2 s, TPOT 25 ms": all(
            each.over_first >= WON for each in tight
        ),
        "more than the best chunk there": all(each.over_chunked > 1 for each in tight),
        "the controller is no worse than the split it started near, after the shift": all(kept),
        "more than the best chunk at the published promises": any(
            each.promise == "0.3/0.15" and each.over_chunked > 1 for each in found
        ),
    }
    if "0.3/0.15" not in known:
        parts.popitem()
    why = "; ".join(f"{part}: {'yes' if holds else 'no'}" for part, holds in parts.items())
    why += ". Highest rates: " + "; ".join(each.told for each in found)
    return Verdict(
        outcome=outcome_of(sum(parts.values()), len(parts)), why=why, ratios=tuple(ratios)
    )


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Highest rate by promises, of each family at its best setting."""
    known = [name for name in PROMISES if rates(rows, "chat", "sglang", name)]
    families: dict[str, Mapping[str, object]] = {
        "chunked": CHUNKED, "prefill-first": {"sglang": {}}, "static": STATIC, "elastic": ELASTIC,
        "dynamic": DYNAMIC, "(100,100)": OVERLAPPED,
    }  # fmt: skip
    ax = figure.subplots()
    for place, (label, names) in enumerate(families.items()):
        best = [list(best_of(rows, "chat", names, name)[1].values()) for name in known]
        middle = [mean(each) for each in best]
        spans = [[m - min(e), max(e) - m] for m, e in zip(middle, best, strict=True)]
        spots = [at + 0.13 * place for at in range(len(known))]
        ax.bar(spots, middle, width=0.12, label=label, yerr=list(zip(*spans, strict=True)))
    ax.set_xticks([at + 0.33 for at in range(len(known))], known)
    ax.set_xlabel("TTFT / TPOT promised, s")
    ax.set_ylabel("highest rate with 90 % kept, requests/s")
    ax.legend()


EXPERIMENT = Experiment(
    name="semi-pd",
    system="semi-PD: prefill and decode in two lanes of one device",
    source="semi-PD (2025), infinigence/Semi-PD",
    claim="Splitting a device's cores between prefill and decode over one memory, by a controller that watches "
    "promises, serves more requests within them than both phases in one step.",
    criterion=f"At TTFT 2 s and TPOT 25 ms, elastic lanes serve at least {WON:g} times prefill-first and more than the "
    "best chunk; at the published promises (0.3 s, 0.15 s) more than the best chunk; after the shift, at every pair of "
    f"promises that can be kept at all, the controller serves at least {DYNAMIC_LOSS:g} times the split that was best "
    "before.",
    workload="ShareGPT lengths, Poisson, 500 requests a run; shift: 250, then 250 with lengths of arXiv summaries, and "
    "the attainment is of these. Highest rate with 90 % of the answers within TTFT and TPOT.",
    constants=(
        ("model", "Llama-3.1-8B, bf16"),
        ("card", "A100-80G, modelled"),
        ("sharing", "fair: cores in proportion, memory max-min, full bandwidth with 40 % of the cores; pessimistic: "
         "70 %, both lanes lose 10 %; optimistic: decode steps keep their efficiency on few cores; none was measured"),
        ("elastic", "a lane launched while the other is idle has all cores until its step ends"),
        ("controller", "windows of 10 s or 50 answers, steps of 10 %, two windows agree; a reconstruction"),
    ),
    traces=(CHAT, SUMMARY),
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)  # fmt: skip
