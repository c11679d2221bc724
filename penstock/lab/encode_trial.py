"""Requests with images on replicas that do everything, and on replicas that share the stages between them.

    inline    all do everything; images are encoded in the step that begins their prompt (batch "vllm-v1")
    staged    all do everything; answers, then prompts, then images, in steps that keep the pace (batch "epd")
    EP-D      images and prompts on some replicas, answers on the others
    ED-P      images and answers, prompts
    E-P-D     images, prompts, answers
    xllm      E-P-D with roles that follow the load (scale "xllm")

The numbers of replicas stand behind the name, as in "E-P-D 3:3:2". All go by least requests. The highest mean rate is
sought at which enough answers keep both promises. Qwen2-VL-7B on A100s: the language model by the card's roofline, the
tower by cost.vision, embeddings and keys and values over modelled wires.

Traffic is drawn: `captions` one image of the sizes that photographs of 1024 x 768 have, a short question, an answer of
about 40 tokens; `talk` 1.5 images in the mean and answers of about 250; `text` no image, prompts of about 1,000 tokens,
answers of about 150. Nobody published lengths of such traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from penstock.assemble import Config
from penstock.assemble.vision import vision_of
from penstock.cluster.spec import ExecutorSpec
from penstock.core.config import Table
from penstock.core.images import images_of, parts_of
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.lab.encode_budgets import ALONE_IMAGES, ALONE_TOKENS, Budgets, Usual, budgets
from penstock.lab.rate_search import RateSearch, fleet_of
from penstock.lab.stage_work import stage_work
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Poisson
from penstock.traffic.images import Images, Shown
from penstock.traffic.lengths import Lognormal

REPLICAS = 8
MODEL, CARD, TOWER = "qwen2-7b", "a100-80g", "qwen2-vl"
LOW, HIGH = 20, 52  # places on the grid of rates: 6.7 to 142 a second
SIZES = Table(kind="choice", values=[999, 888, 729])  # tokens: 37 x 27, 37 x 24, 27 x 27
MEAN_TOKENS = (999 + 888 + 729) / 3
TRAFFIC: dict[str, tuple[Images, Lognormal]] = {
    "captions": (
        Images(tokens=SIZES),
        Lognormal(prompt_median=30, output_median=40, prompt_sigma=0.5, output_sigma=0.5, most=512),
    ),
    "text": (
        Images(tokens=SIZES, share=0.0),
        Lognormal(
            prompt_median=1000, output_median=150, prompt_sigma=0.5, output_sigma=0.5, most=4096
        ),
    ),
    "talk": (
        Images(tokens=SIZES, number=Table(kind="geometric", mean=1.5, most=6)),
        Lognormal(
            prompt_median=60, output_median=250, prompt_sigma=0.8, output_sigma=0.6, most=1500
        ),
    ),
}
ROLES = {
    "EP-D": ("prefill", "decode"),
    "ED-P": ("encode-decode", "prefill"),
    "E-P-D": ("encode", "prefill", "decode"),
}


def bounds_of(traffic: str, promise: Slo) -> Budgets:
    """What a profile of this traffic says."""
    executor = ExecutorSpec(kind="modelled", gpu=CARD, vision=TOWER)
    images, lengths = TRAFFIC[traffic]
    number = 1.5 if images.number != 1.0 else 1.0
    context = int(number * MEAN_TOKENS + lengths.prompt_median + lengths.output_median / 2)
    assert promise.tpot_s is not None
    return budgets(
        Roofline(shape_of(MODEL), card_of(CARD)),
        vision_of(executor),
        Usual(context=context, image_tokens=round(MEAN_TOKENS)),
        promise.tpot_s,
    )


def roles_of(variant: str) -> dict[str, int] | None:
    """None: all do everything."""
    kind, _, numbers = variant.partition(" ")
    if kind in ("inline", "staged"):
        return None
    if kind == "xllm":
        kind, numbers = "E-P-D", numbers or "3:3:2"
    return dict(zip(ROLES[kind], map(int, numbers.split(":")), strict=True))


def config_of(variant: str, bounds: Budgets, tpot_s: float) -> Config:
    policy: dict[str, object] = {"preset": "vllm-v1", "route": "least", "route_decode": "least"}
    policy["batch"] = (
        {"name": "vllm-v1", "max_tokens": 2048} if variant == "inline" else bounds.batch()
    )
    if variant.startswith("xllm"):
        policy["scale"] = {"name": "xllm", "tpot_s": tpot_s}
    return fleet_of(
        policy,
        model=MODEL,
        executor={"gpu": CARD, "vision": TOWER},
        replicas=REPLICAS,
        roles=roles_of(variant),
    )


@dataclass(kw_only=True)
class Pictures:
    """`num` requests of each kind in `kinds`, one kind after the other, Poisson at one rate; named by their numbers."""

    kinds: tuple[str, ...]
    num: int
    rate_per_s: float
    seed: int
    slo: Slo
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        total = self.num * len(self.kinds)
        self.meta = TraceMeta(", then ".join(self.kinds), "drawn", total, total)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        instants = Poisson(rate_per_s=self.rate_per_s).instants(self.seed)
        place = 0
        for kind in self.kinds:
            images, lengths = TRAFFIC[kind]
            shown = Shown(images, seed=self.seed, owner=kind, where=kind)
            for text, output in lengths.first(self.num, self.seed).tolist():
                yield next(instants), self._request(place, text, output, shown.draw())
                place += 1

    def _request(self, place: int, text: int, output: int, images: tuple[int, ...]) -> Request:
        num_prompt = text + sum(images)
        return Request(
            id=RequestId(str(place)),
            model="default",
            prompt=TracedPrompt(num_prompt),
            sampling=Sampling(max_tokens=output),
            slo=self.slo,
            parts=parts_of(images, num_prompt),
            true_output=output,
        )


def stages(variant: str, offered: Pictures) -> RateSearch:
    """The search of one variant on one traffic, at whatever rate; the profile is of what comes last."""
    slo = offered.slo
    assert slo.tpot_s is not None
    return RateSearch(
        config=config_of(variant, bounds_of(offered.kinds[-1], slo), slo.tpot_s),
        at_rate=lambda rate: replace(offered, rate_per_s=rate),
        slo=slo,
        low=LOW,
        high=HIGH,
    )


def most_of(offered: Pictures) -> float:
    """Requests a second that the replicas would serve if they were busy all the time and nothing held up anything:
    images and prompts in the largest steps that a profile allows where nobody answers.
    """
    executor, slo = ExecutorSpec(kind="modelled", gpu=CARD, vision=TOWER), offered.slo
    assert slo.tpot_s is not None
    model, vision = Roofline(shape_of(MODEL), card_of(CARD)), vision_of(executor)
    requests = [request for _, request in offered]
    pairs = [(each.prompt.num_tokens, each.true_output or 1) for each in requests]
    images = [tokens for each in requests for tokens in images_of(each)]
    groups = [images[at : at + ALONE_IMAGES] for at in range(0, len(images), ALONE_IMAGES)]
    images_s = sum([vision.seconds(group) for group in groups]) / len(requests)
    work = stage_work(pairs, model, slo.tpot_s, step_tokens=ALONE_TOKENS)
    return REPLICAS / (images_s + sum(work))
