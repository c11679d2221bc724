"""Finds the pipeline of a layer: NanoFlow's auto-search, in two phases and a polish.

    for each shape (how many nano-batches, how many front pieces in each):
        phase 1   split and order without interference (lab.nano_structure), and again with every nano-operation as
                  long as it gets at a start's shares
        phase 2   shares with interference (lab.nano_shares), from several starts
    polish the best ones (lab.nano_polish)

    template = find_template(times, load, sharing_of("paper"), model="llama-2-70b", card="a100-80g")

Shapes are tried from coarse to fine, as more pieces cost more than they can hide once the products have no gaps left.
Starts are shares for all memory- and for all network-bound kernels alike: small ones cost products little and make the
way of a nano-batch through its layer long, large ones the other way round.

A found template is kept in a folder, by the digest of all that the search depends on, so a search is made once. Its
programs end after a number of nodes, not of seconds, so that equal searches find equal pipelines on any machine.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.core.cache_folder import cache_folder
from penstock.core.errors import BadConfig, PenstockError
from penstock.cost.nano_layer import (
    Resource,
    Split,
    busy_s,
    nano_ops,
    seconds_of,
    sequential_s,
    waits_of,
)
from penstock.cost.nano_play import Schedule
from penstock.cost.nano_template import Template, key_of, read_template
from penstock.lab.nano_polish import GRAIN, Pipeline, Task, polish
from penstock.lab.nano_shares import best_shares, fluid_bound, nominal_shares
from penstock.lab.nano_structure import Structure, best_structure
from penstock.lab.scheduling import processor_s

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]  # front pieces of each nano-batch
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How hard a search tries. `nodes`: of each program that it solves; `polished`: how many of the best."""

    name: str
    shapes: tuple[Shape, ...]
    nodes: int
    polished: int
    rounds: int


EFFORTS = {
    "quick": Effort(name="quick", shapes=((1,), (1, 1), (2, 2)), nodes=500, polished=1, rounds=2),
    "full": Effort(
        name="full",
        shapes=((1,), (1, 1), (1, 2), (2, 2), (1, 1, 1), (2, 1, 1)),
        nodes=4000,
        polished=3,
        rounds=6,
    ),
}
LEAST_UNITS = {
    1: 1,
    2: 4,
    3: 4,
    4: 3,
}  # of a nano-batch, in sixteenths of the batch, by their number
STARTS = ((0.1, 0.1), (0.2, 0.2), (0.4, 0.3))  # shares of memory and network to begin with


def splits_of(shape: Shape, tokens: int) -> list[Split]:
    """All of a shape whose nano-batches are sixteenths of the batch, in whole grains, and fronts cut evenly."""
    found = []
    for units in _compositions(16, len(shape), LEAST_UNITS.get(len(shape), 2)):
        borders = [0]
        for unit in units:
            borders.append(borders[-1] + unit)
        cuts = [round(tokens * border / 16 / GRAIN) * GRAIN for border in borders[:-1]] + [tokens]
        sizes = [after - before for before, after in zip(cuts, cuts[1:], strict=False)]
        if min(sizes) >= GRAIN:
            pieces = tuple(_even(size, num) for size, num in zip(sizes, shape, strict=True))
            if all(min(each) > 0 for each in pieces):
                found.append(Split(pieces))
    return list(dict.fromkeys(found))


def _compositions(total: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(least, total - least * (parts - 1) + 1):
        for rest in _compositions(total - first, parts - 1, least):
            yield (first, *rest)


def _even(size: int, parts: int) -> tuple[int, ...]:
    each = max(1, size // parts // GRAIN) * GRAIN
    return (*[each] * (parts - 1), size - each * (parts - 1))


class Search:
    """One search. `pipelines` holds what was found, with its pace."""

    def __init__(self, task: Task, effort: Effort) -> None:
        self.task, self.effort = task, effort
        self.uncut_s = sequential_s(task.load, task.times)
        whole = nano_ops(Split(((task.load.tokens,),)), task.times.tp)
        self.busy_s = busy_s(whole, seconds_of(whole, task.load, task.times))
        self.bound_s = fluid_bound(self.busy_s, task.sharing)
        self.free: Structure | None = None
        self.pipelines: list[tuple[float, Pipeline]] = []
        self.starts = self._starts()

    def _starts(self) -> list[dict[Resource, float]]:
        sharing = self.task.sharing
        nominal = nominal_shares(self.busy_s, sharing)
        found = [nominal]
        for memory, network in STARTS:
            if memory in sharing.levels and network in sharing.levels:
                start: dict[Resource, float] = {"memory": memory, "network": network}
                found.append({"compute": 0.0, **start})
        return [each for place, each in enumerate(found) if each not in found[:place]]

    def run(self, on_progress: OnProgress | None = None) -> tuple[Pipeline, float]:
        """The best pipeline and its seconds a layer."""
        num = len(self.effort.shapes) * (1 + len(self.starts)) + self.effort.polished
        done = 0
        for shape in self.effort.shapes:
            for _ in self._of_shape(shape):
                done += 1
                if on_progress is not None:
                    on_progress(done, num, "shape " + "+".join(map(str, shape)))
        self.pipelines.sort(key=lambda each: each[0])
        for pace_s, pipeline in self.pipelines[: self.effort.polished]:
            self.pipelines.append(self._polished(pipeline, pace_s))
            done += 1
            if on_progress is not None:
                on_progress(done, num, "polish")
        pace_s, best = min(self.pipelines, key=lambda each: each[0])
        return best, pace_s

    def _of_shape(self, shape: Shape) -> Iterator[None]:
        task = self.task
        splits = splits_of(shape, task.load.tokens)
        if not splits:
            return
        ops = [nano_ops(split, task.times.tp) for split in splits]
        alone = [seconds_of(each, task.load, task.times) for each in ops]
        for stretched in (None, *self.starts):
            factors = self._factors(stretched)
            seconds = [
                [each * factors[op.resource] for op, each in zip(ops[0], row, strict=True)]
                for row in alone
            ]
            found = best_structure(ops[0], seconds, waits_of(ops[0]), nodes=self.effort.nodes)
            if stretched is None and (self.free is None or found.period_s < self.free.period_s):
                self.free = found
            self._share(splits[found.choice], found, stretched)
            yield

    def _factors(self, start: dict[Resource, float] | None) -> dict[Resource, float]:
        """How much longer everything takes at a start's shares when the device is never idle."""
        if start is None:
            return {"compute": 1.0, "memory": 1.0, "network": 1.0}
        speed = self.task.sharing.speed
        memory, network = start["memory"], start["network"]
        factors: dict[Resource, float] = {
            "memory": 1 / speed("memory", memory),
            "network": 1 / speed("network", network),
        }
        taken = memory * self.busy_s["memory"] * factors["memory"]
        taken += network * self.busy_s["network"] * factors["network"]
        return {**factors, "compute": 1 + taken / self.busy_s["compute"]}

    def _share(self, split: Split, found: Structure, start: dict[Resource, float] | None) -> None:
        """Phase 2 on a structure, from the start it was made for or from all of them."""
        task = self.task
        ops = tuple(nano_ops(split, task.times.tp))
        for each in self.starts if start is None else [start]:
            shares = tuple(each[op.resource] for op in ops)
            pipeline = Pipeline(split, Schedule(ops, shares, found.places))
            self._keep(pipeline)

    def _keep(self, pipeline: Pipeline) -> None:
        task = self.task
        try:
            schedule, pace_s = best_shares(
                pipeline.schedule,
                task.sharing,
                task.seconds(pipeline),
                nodes=self.effort.nodes,
            )
        except PenstockError:
            return  # streams that block each other, or no solution in time: other starts have one
        self.pipelines.append((pace_s, Pipeline(pipeline.split, schedule)))

    def _polished(self, pipeline: Pipeline, pace_s: float) -> tuple[float, Pipeline]:
        """Changes and programs by turns, until neither helps."""
        best, best_s = pipeline, pace_s
        for _ in range(self.effort.rounds):
            changed, _ = polish(best, self.task, rounds=self.effort.rounds)
            schedule, changed_s = best_shares(
                changed.schedule,
                self.task.sharing,
                self.task.seconds(changed),
                nodes=self.effort.nodes,
            )
            if changed_s >= best_s:
                break
            best, best_s = Pipeline(changed.split, schedule), changed_s
        return best_s, best


def search(
    task: Task,
    *,
    model: str,
    card: str,
    effort: str = "full",
    on_progress: OnProgress | None = None,
) -> Template:
    """Search without looking into the cache. Raises MissingExtra without scipy."""
    began_s = processor_s()
    found = Search(task, effort_of(effort))
    pipeline, pace_s = found.run(on_progress)
    assert found.free is not None
    tokens, tp = task.load.tokens, task.times.tp
    key = key_of(task.times, task.load, task.sharing, repr(found.effort))
    return Template(
        name=f"{model}-{card}-tp{tp}-{tokens}-{key}",
        model=model,
        card=card,
        tp=tp,
        tokens=tokens,
        sharing=task.sharing.name,
        digest=task.times.digest,
        pieces=pipeline.split.pieces,
        places=pipeline.schedule.places,
        shares=pipeline.schedule.shares,
        period_s=pace_s,
        uncut_s=found.uncut_s,
        bound_s=found.bound_s,
        free_period_s=found.free.period_s,
        free_bound_s=found.free.bound_s,
        search_s=processor_s() - began_s,
    )


def effort_of(name: str) -> Effort:
    if name not in EFFORTS:
        raise BadConfig(f"no search effort is named {name!r}; known: {', '.join(EFFORTS)}")
    return EFFORTS[name]


def find_template(
    task: Task,
    *,
    model: str,
    card: str,
    effort: str = "full",
    cache: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Template:
    """The template for this task from the cache, searched and put there when it is not in it."""
    folder = cache_folder("nano") if cache is None else cache
    key = key_of(task.times, task.load, task.sharing, repr(effort_of(effort)))
    path = folder / f"{model}-{card}-tp{task.times.tp}-{task.load.tokens}-{key}.json"
    if path.is_file():
        return read_template(path)
    template = search(task, model=model, card=card, effort=effort, on_progress=on_progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            file.write(template.to_json())
        Path(file.name).replace(path)
    except OSError as error:  # found is found
        logger.warning("the template cannot be kept in %s: %s", folder, error.strerror or error)
    return template
