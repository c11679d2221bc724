"""Where the phases of a model go: what `penstock plan placement` searches, and the judge it asks.

The judge is lab.phases, queues of two phases: the level of detail of DistServe's own simulator, and what its figures
are to be compared with. The same draws of arrivals and lengths judge every unit, stretched to the rate at hand:

    kept   the P90 of TTFT and the P90 of TPOT each within their promise         (published; not 90 % within both)

`is_published` takes that simulator's own constants: ROOM context positions in a decode step whatever memory there is,
jobs that take turns, KV that moves in no time. Otherwise memory is the card's and KV passes a link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from penstock.cluster.predictors import shape_of_model, step_model
from penstock.cluster.spec import ExecutorSpec
from penstock.core.config import build
from penstock.core.errors import BadConfig
from penstock.cost.hardware import RESERVE_BYTES, card_of
from penstock.cost.linear_five import LINEAR_TABLES, degrees_of
from penstock.cost.links import Link, link_of
from penstock.cost.shapes import ModelShape
from penstock.cost.step import StepModel
from penstock.lab.phases import Instance, Job, Work, serve, serve_decodes
from penstock.policy.place import Decision, Model, Parallel, Policy, Site, Unit, View
from penstock.policy.place.colocated import Colocated
from penstock.policy.place.distserve import DistServe
from penstock.traffic.arrivals import Poisson
from penstock.traffic.lengths import DrawnLengths

ROOM = 50_000  # context positions of one decode step in the published simulator
SHARE = 0.9  # of the requests, for each promise
MEMORY = 0.9  # of a card that weights and KV may take
MOST_DEGREE = 16
CHUNK = 2048  # tokens of a step, where phases share one
MOST = 16.0  # requests a second and device beyond which nobody looks

OnTry = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be kept, of what traffic. `num` requests are drawn for every try."""

    lengths: DrawnLengths
    ttft_s: float
    tpot_s: float
    num: int = 300
    seed: int = 0
    longest: int | None = None  # tokens of a prompt; longer ones are cut


def drawn(asked: Asked) -> tuple[list[float], list[tuple[int, int]]]:
    """Instants at one request a second in the mean, the first at 0, and lengths."""
    instants = list(islice(Poisson(rate_per_s=1.0).instants(asked.seed), asked.num))
    pairs = [
        (int(prompt), int(output)) for prompt, output in asked.lengths.first(asked.num, asked.seed)
    ]
    most = asked.longest
    cut = pairs if most is None else [(min(prompt, most), output) for prompt, output in pairs]
    return [at - instants[0] for at in instants], cut


@dataclass(frozen=True)
class Hardware:
    """A model on a card: facts for the policies, and step times by degree."""

    model: Model
    models: Callable[[int], StepModel]
    source: str


@dataclass
class Judge:
    """Tries units. `transfer`: what KV passes, None = it moves in no time."""

    hardware: Hardware
    asked: Asked
    transfer: Link | None = None
    is_published: bool = False
    on_try: OnTry | None = None
    num_tried: int = 0
    _draws: tuple[list[float], list[tuple[int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        self._draws = drawn(self.asked)

    def attains(self, unit: Unit, rate_per_s: float) -> bool:
        self.num_tried += 1
        if self.on_try is not None:
            self.on_try(str(unit), self.num_tried)
        ttft_s, tpot_s = self.tails(unit, rate_per_s)
        return ttft_s < self.asked.ttft_s and tpot_s < self.asked.tpot_s

    def tails(self, unit: Unit, rate_per_s: float) -> tuple[float, float]:
        """The P90 of TTFT and of TPOT; 0 of a phase that the unit does not do."""
        jobs = self.play(unit, rate_per_s)
        ttft_s = 0.0 if unit.way == "decode" else tail_of([job.ttft_s for job in jobs])
        tpot_s = 0.0 if unit.way == "prefill" else tail_of([job.tpot_s for job in jobs])
        return ttft_s, tpot_s

    def play(self, unit: Unit, rate_per_s: float) -> list[Job]:
        """The jobs with their instants."""
        instants, pairs = self._draws
        is_first_only = unit.way == "prefill"
        jobs = [
            Job(at / rate_per_s, prompt, 0 if is_first_only else self._after(output))
            for at, (prompt, output) in zip(instants, pairs, strict=True)
        ]
        whole = unit.instances()
        if unit.way == "decode":
            for job in jobs:  # as if prompts took no time
                job.first_at = job.ready_at = job.arrived_at
                job.last_at = job.first_at
            serve_decodes(jobs, self._instance(whole[0], "decode"))
        elif unit.decode is None:
            work: Work = "prefill" if is_first_only else "both"
            serve(jobs, self._instance(whole[0], work, unit.chunk))
        else:
            first, second = self._instance(whole[0], "prefill"), self._instance(whole[1], "decode")
            serve(jobs, first, second, self._transfer_s(unit))
        return jobs

    def _after(self, output: int) -> int:
        """Tokens after the first; the published simulator takes as many steps as the answer has tokens."""
        return output if self.is_published else output - 1

    def _transfer_s(self, unit: Unit) -> Callable[[Job], float]:
        link, lanes = self.transfer, min(part.tp for part in unit.instances())
        if link is None:
            return lambda job: 0.0
        return lambda job: link.seconds(job.prompt * self.hardware.model.kv_bytes, lanes=lanes)

    def _instance(self, parallel: Parallel, work: Work, chunk: int | None = None) -> Instance:
        room = (
            ROOM
            if self.is_published and work != "prefill"
            else self.hardware.model.kv_tokens(parallel)
        )
        return Instance(
            model=self.hardware.models(parallel.tp),
            work=work,
            kv_tokens=room,
            pp=parallel.pp,
            chunk=chunk,
            is_published=self.is_published,
        )


def tail_of(values: Sequence[float]) -> float:
    return float(np.quantile(np.asarray(values), SHARE))


# ---------------------------------------------------------------------------- models of steps


def spec_of(gpu: str, tables: str | None) -> ExecutorSpec:
    """Raises BadConfig for tables that nobody knows."""
    told: dict[str, object] = {"kind": "modelled", "gpu": gpu}
    return build(ExecutorSpec, told if tables is None else {**told, "tables": tables}, "--tables")


def placement_link(site: Site) -> Link:
    """What KV passes: the links inside of a node, or those between nodes where these are fast."""
    return link_of("infiniband-ndr" if site.has_fast_links and site.nodes > 1 else "nvlink")


def hardware(model: str, executor: ExecutorSpec) -> Hardware:
    """Raises BadConfig, BadModel. `executor.gpu` is needed; its degree is what is searched."""
    if executor.gpu is None:
        raise BadConfig("a placement needs the card: name it with --gpu", hint="--gpu a100-80g")
    executor = replace(executor, kind="modelled")
    shape = shape_of_model(model, executor)
    card = card_of(str(executor.gpu))
    known: dict[int, StepModel] = {}

    def models(tp: int) -> StepModel:
        if tp not in known:
            known[tp] = step_model(replace(executor, tensor_parallel=tp), shape)
        return known[tp]

    degrees = degrees_known(executor, shape, models)
    facts = Model(
        name=shape.name,
        heads=shape.heads,
        layers=shape.layers,
        weight_bytes=shape.weight_bytes,
        kv_bytes=shape.kv_bytes,
        device_bytes=card.memory_bytes * MEMORY - RESERVE_BYTES,
        degrees=degrees,
    )
    return Hardware(facts, models, models(degrees[0]).name)


def degrees_known(
    executor: ExecutorSpec, shape: ModelShape, models: Callable[[int], StepModel]
) -> tuple[int, ...]:
    """Degrees whose steps somebody can price."""
    engine = LINEAR_TABLES.get(executor.tables or "")
    if engine is not None:
        found = degrees_of(engine, shape.name)
    else:
        found = tuple(
            tp
            for tp in range(1, MOST_DEGREE + 1)
            if shape.heads % tp == 0 and _is_priced(models, tp)
        )
    if not found:
        models(1)  # says why
        raise BadConfig(f"steps of {shape.name} are not known at any degree on {executor.gpu}")
    return found


def _is_priced(models: Callable[[int], StepModel], tp: int) -> bool:
    try:
        models(tp)
    except BadConfig:
        return False
    return True


# ---------------------------------------------------------------------------- the search


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What each way of placing came to, the best first. `num_tried`: simulated runs."""

    ways: tuple[tuple[str, Decision], ...]
    source: str
    asked: Asked
    site: Site
    num_tried: int
    evaluator: str = "queues of two phases (lab.phases)"

    @property
    def best(self) -> tuple[str, Decision] | None:
        name, decision = self.ways[0]
        return None if decision.deployment is None else (name, decision)


def ways_of(chunk: int, tolerance: float) -> dict[str, Policy]:
    return {
        "disaggregated": DistServe(tolerance=tolerance),
        "colocated": Colocated(tolerance=tolerance),
        f"chunked {chunk}": Colocated(chunk=chunk, tolerance=tolerance),
    }


def goodput(decision: Decision) -> float:
    return 0.0 if decision.deployment is None else decision.deployment.per_device


def plan_placement(
    judge: Judge,
    site: Site,
    *,
    demand_per_s: float | None = None,
    chunk: int = CHUNK,
    tolerance: float = 0.05,
    most: float = MOST,
) -> Placed:
    """Search all ways; the best is that with the most goodput a device."""
    view = View(
        site=site,
        model=judge.hardware.model,
        attains=judge.attains,
        most=most,
        demand_per_s=demand_per_s,
    )
    decisions = [(name, policy.decide(view)) for name, policy in ways_of(chunk, tolerance).items()]
    decisions.sort(key=lambda pair: -goodput(pair[1]))
    return Placed(
        ways=tuple(decisions),
        source=judge.hardware.source,
        asked=judge.asked,
        site=site,
        num_tried=judge.num_tried,
    )
