"""Worlds of jobs in every legal state, and the views of each kind upon them, drawn from one stream of chance.

Jobs are handed to policies behind a glass: reading works, writing raises.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from penstock.core.images import ImageJob
from penstock.core.limits import Holder, Use
from penstock.core.messages import BlockNews, Changes
from penstock.core.prompt import HashedPrompt
from penstock.core.types import (
    BlockHash,
    Caps,
    Job,
    JobReport,
    Report,
    Request,
    RequestId,
    Sampling,
    Slo,
)
from penstock.core.views import Chunk
from penstock.cost.phases import Phases
from penstock.policy import (
    TABLE,
    admit,
    batch,
    evict,
    fetch,
    find,
    limit,
    move,
    order,
    place,
    route,
    scale,
)
from penstock.policy.loads import Sent
from penstock.policy.tier_index import TierIndex
from tests.laws.model_ledger import ModelLedger

SIZE = 4  # positions in a block: small, so that borders are crossed often


class Glass:
    """A job as a policy may have it."""

    __slots__ = ("_job",)

    def __init__(self, job: Job) -> None:
        object.__setattr__(self, "_job", job)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_job"), name)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a policy tried to set {name} of a job")

    def __deepcopy__(self, memo: object) -> Glass:
        return self


class LinearCost:
    """Seconds grow with tokens and with context; enough for policies that compare."""

    def predict(self, chunks: Sequence[Chunk], share: float = 1.0) -> float:
        return 0.01 + sum(
            1e-3 * chunk.tokens + 1e-6 * chunk.tokens * chunk.job.computed for chunk in chunks
        )


class HalfLengths:
    """Half of what may still come, will."""

    def quantile(self, job: Job, q: float) -> int:
        return job.num_output + max(1, int(q * (job.max_tokens - job.num_output)))

    def quantiles(self, jobs: Sequence[Job], q: float) -> list[int]:
        return [self.quantile(job, q) for job in jobs]

    def sample(self, job: Job, u: float) -> int:
        return self.quantile(job, u)


class Columns:
    def __init__(self, jobs: Sequence[Any]) -> None:
        self.jobs = jobs

    def __getitem__(self, name: str) -> Any:
        return np.array([column_of(job, name) for job in self.jobs], dtype=float)

    def __len__(self) -> int:
        return len(self.jobs)


def column_of(job: Any, name: str) -> float:
    if name == "deadline_at":
        return order.deadline_at(job)
    if name == "last_at":
        bound = job.request.slo.deadline_s
        return float("inf") if bound is None else job.arrived_at + bound
    if name == "tenant":
        return float(zlib.crc32(job.request.tenant.encode()))
    return float(getattr(job, name))


@dataclass
class World:
    now: float
    ledger: ModelLedger
    running: list[Any]
    waiting: list[Any]


def maybe(rng: random.Random, low: float, high: float) -> float | None:
    return rng.uniform(low, high) if rng.random() < 0.5 else None


def make_request(rng: random.Random, seq: int, num_prompt: int, max_tokens: int) -> Request:
    family, num_shared = rng.randrange(3), rng.randrange(8)
    hashes = tuple(
        BlockHash(bytes((family if place < num_shared else 100 + seq % 100, place)))
        for place in range(num_prompt // SIZE)
    )
    return Request(
        id=RequestId(f"r{seq}"),
        model="m",
        prompt=HashedPrompt(num_prompt, hashes if rng.random() < 0.8 else (), SIZE),
        sampling=Sampling(max_tokens=max_tokens),
        slo=Slo(
            ttft_s=maybe(rng, 0.01, 9), tpot_s=maybe(rng, 0.01, 1), deadline_s=maybe(rng, 1, 30)
        ),
        priority=rng.randrange(3),
    )


def make_job(rng: random.Random, seq: int, now: float) -> Job:
    num_prompt, max_tokens = rng.randrange(1, 60), rng.randrange(1, 40)
    request = make_request(rng, seq, num_prompt, max_tokens)
    job = Job(
        seq=seq,
        request=request,
        answer=0,
        arrived_at=now * rng.random(),
        hashes=list(request.prompt.blocks(SIZE)),
        num_prompt=num_prompt,
        max_tokens=max_tokens,
        priority=request.priority,
    )
    if rng.random() < 0.6 and max_tokens > 1:
        job.num_output = rng.randrange(1, max_tokens)
        job.first_token_at = job.last_token_at = job.arrived_at + 0.1
    return job


def make_world(rng: random.Random, num_jobs: int | None = None) -> World:
    """Each job either runs, with what it computed in memory, or waits; some memory holds cached prefixes."""
    now = rng.uniform(0, 50)
    ledger = ModelLedger(rng.choice((16, 40, 120)), SIZE)
    world = World(now, ledger, [], [])
    for seq in range(rng.randrange(14) if num_jobs is None else num_jobs):
        job = make_job(rng, seq, now)
        is_decode = rng.random() < 0.6
        done = job.known - 1 if is_decode else rng.randrange(job.known)
        kind = rng.random()
        if kind < 0.2:
            job.computed = job.known  # for the moment: an ended job leaves its prefix behind
            if ledger.reserve(job, job.known):
                ledger.release(job)
            continue
        if kind < 0.65 and done > 0 and ledger.reserve(job, done):
            job.computed, job.status, job.admitted_at = done, "running", now
            world.running.append(Glass(job))
        else:
            job.num_preemptions = int(job.num_output > 0)
            world.waiting.append(Glass(job))
    if world.running and rng.random() < 0.4:  # hardly any room left
        ledger.total += rng.randrange(3) - ledger.free
        while ledger.num_in_pool() > ledger.total:
            ledger.forget(ledger.idle[0])
    return world


def make_policy(kind: str, name: str) -> Any:
    return find(kind, name)()


def order_view(rng: random.Random) -> order.View:
    world = make_world(rng, rng.choice((0, 1, 5, 20, 90)))
    return order.View(
        now=world.now,
        rng=rng,
        waiting=world.waiting,
        running=world.running,
        cost=LinearCost(),
        lengths=HalfLengths(),
        columns=lambda: Columns(world.waiting),
        ledger=world.ledger,
    )


def admit_view(rng: random.Random) -> admit.View | None:
    world = make_world(rng)
    if not world.waiting:
        return None
    job, fork = rng.choice(world.waiting), world.ledger.fork()
    for other in rng.sample(world.running, rng.randrange(len(world.running) + 1)):
        fork.reserve(other, other.known)
    tokens = rng.randrange(1, job.known - fork.cached(job) + 1)
    return admit.View(
        now=world.now,
        rng=rng,
        job=job,
        tokens=tokens,
        ledger=fork,
        running=world.running,
        lengths=HalfLengths(),
    )


def evict_view(rng: random.Random) -> evict.View | None:
    """About running jobs, or about cached blocks."""
    world = make_world(rng)
    if rng.random() < 0.3:
        blocks = [SimpleNamespace(num_blocks=1) for _ in range(rng.randrange(9))]
        need = rng.randrange(len(blocks) + 1)
        return evict.View(world.now, rng, need, None, blocks, lambda item: 1)
    if not world.running:
        return None
    asker, fork = rng.choice(world.running), world.ledger.fork()
    freed: Callable[[Any], int] = fork.freeable
    return evict.View(world.now, rng, rng.randrange(1, 20), asker, world.running, freed, fork)


def bind(world: World, rng: random.Random, admit_name: str, evict_name: str) -> tuple[Any, Any]:
    """`admit` and `victims` of a batch view, answered by real policies whose laws are checked on the way."""
    admitting, evicting = make_policy("admit", admit_name), make_policy("evict", evict_name)

    def ask(job: Any, tokens: int, fork: ModelLedger) -> str:
        view = admit.View(world.now, rng, job, tokens, fork, world.running, HalfLengths())
        decision = admitting.decide(view)
        admit.law(view, decision)
        return str(decision.answer)

    def victims(job: Any, need: int, among: Sequence[Any], fork: ModelLedger) -> Any:
        assert need > 0 and any(job is other for other in (*world.running, *among))
        view = evict.View(world.now, rng, need, job, among, fork.freeable, fork)
        decision = evicting.decide(view)
        evict.law(view, decision)
        return decision.evictions

    return ask, victims


def showing(rng: random.Random, glass: Any) -> Any:
    """The same job, perhaps with images, of which some are encoded."""
    job = glass._job
    if rng.random() < 0.7 or job.num_prompt < 4:
        return glass
    images = (1,) * rng.randrange(1, 4)
    facts = {name: getattr(job, name) for name in type(job).__slots__}
    encoded = rng.randrange(len(images) + 1)
    return Glass(ImageJob(images=images, encoded=encoded, **facts))


def batch_view(rng: random.Random) -> batch.View:
    world = make_world(rng)
    caps = Caps(
        num_layers=2,
        max_context=1000,
        max_batch_tokens=rng.choice((1, 3, 16, 50, 1000)),
        max_jobs=rng.choice((1, 4, 100)),
    )
    ask, victims = bind(
        world, rng, rng.choice(list(TABLE["admit"])), rng.choice(list(TABLE["evict"]))
    )
    rng.shuffle(world.waiting)
    world.waiting = [showing(rng, job) for job in world.waiting]
    return batch.View(
        now=world.now,
        rng=rng,
        running=world.running,
        waiting=world.waiting,
        caps=caps,
        ledger=world.ledger,
        cost=LinearCost(),
        lengths=HalfLengths(),
        admit=ask,
        victims=victims,
        columns=lambda: Columns(world.running),
    )


def route_view(rng: random.Random) -> route.View:
    reports = [
        Report(
            replica=f"replica-{place}",
            at=0.0,
            role=rng.choice(("any", "any", "prefill", "decode", "encode", "encode-decode")),
            is_alive=rng.random() < 0.8,
            is_draining=rng.random() < 0.2,
            num_running=rng.randrange(9),
            num_waiting=rng.randrange(9),
            waiting_tokens=rng.choice((0, 50, 5000)),
            decode_tokens=rng.choice((0, 300)),
            total_blocks=rng.choice((0, 40)),
            block_size=SIZE,
        )
        for place in range(rng.randrange(6))
    ]
    rng.shuffle(reports)
    known = [report.replica for report in reports if rng.random() < 0.9]
    index = TierIndex(has_tiers=rng.random() < 0.3)
    for report in reports:
        held = tuple(make_request(rng, 90, rng.randrange(1, 60), 9).prompt.blocks(SIZE))
        here = len(held) // 2 if index.has_tiers else len(held)
        index.tell(report.replica, BlockNews(held[:here], host=Changes(held[here:])))
    queued = {}
    for name in known:
        ids = [f"{name}-{place}" for place in range(rng.randrange(4))]
        waits = [make_request(rng, 91, rng.randrange(1, 60), 9) for _ in ids]
        pairs = zip(ids, waits, strict=True)
        queued[name] = {each: route.Queued(one, name, 40, 8, 0.0) for each, one in pairs}
    has_all = rng.random() < 0.8
    return route.View(
        now=rng.uniform(0, 50),
        rng=rng,
        request=make_request(rng, rng.randrange(50), rng.randrange(1, 60), 9),
        stage=rng.choice(("prefill", "decode", "encode")),
        reports=reports,
        outstanding={name: rng.choice((0, 3, 200)) for name in known},
        sent={name: Sent(2, rng.choice((0, 900)), 9) for name in known if has_all},
        blocks=index if has_all else None,
        cost=Phases(prefill=(0.1, rng.choice((1e-4, 1.0)), 0.0), decode=(0.1, 0.0, 0.0))
        if has_all
        else None,
        token_s=rng.choice((0.0, 0.01)),
        queued=queued,
    )


def fetch_view(rng: random.Random) -> fetch.View:
    return fetch.View(
        now=rng.uniform(0, 1000),
        rng=rng,
        place=rng.choice(("host", "disk", "peer")),
        tokens=rng.randint(1, 4000),
        cached=rng.choice((0, rng.randint(0, 4000))),
        copy_s=rng.choice((None, rng.uniform(0, 2))),
        compute_s=rng.uniform(0, 2),
    )


def limit_view(rng: random.Random) -> limit.View:
    """Two lanes of one device, which may overlap or not, with what they did."""
    uses = {
        "prefill": [
            Use(rng.choice((0.2, 0.5, 0.8, 1.0)), rng.randrange(1, 5000), rng.uniform(0.01, 1))
            for _ in range(rng.randrange(4))
        ],
        "decode": [
            Use(rng.choice((0.2, 0.5, 1.0)), rng.randrange(1, 50), rng.uniform(0.001, 0.1), 3)
            for _ in range(rng.randrange(4))
        ],
    }
    holders = [Holder(name, 0.1, rng.randrange(2, 11) / 10, uses[name]) for name in uses]
    return limit.View(rng.uniform(0, 1000), rng, holders, rng.choice((1.0, 2.0)))


def move_view(rng: random.Random) -> move.View:
    """A fleet in trouble or, one time in three, the experts of a layer."""
    if rng.random() < 1 / 3:
        count, devices = rng.randrange(2, 20), rng.randrange(1, 5)
        order = rng.sample(range(count), count)
        now = tuple(tuple(order[device::devices]) for device in range(devices))
        experts = move.Experts(
            [rng.choice((0.0, rng.uniform(0, 9))) for _ in range(count)],
            now,
            rng.choice((devices, rng.randrange(1, 5))),
            rng.randrange(1, count + 1),
        )
        return move.View(1.0, rng, [], {}, {}, experts=experts)
    reports = list(route_view(rng).reports)
    for report in reports:
        report.total_blocks, report.free_blocks = 100, rng.randrange(60)
        report.head_blocks = rng.choice((0, 0, 30))
        if rng.random() < 0.8:
            report.lent_blocks, report.away_blocks = rng.choice(((0, 0), (9, 0), (0, 12)))
            report.waiting_blocks, report.num_decoding = 30, report.num_running
        report.jobs = tuple(
            JobReport(
                f"{report.replica}/{place}", 0, rng.choice(("running", "waiting")), rng.choice((-1, 0, 1)),
                1.0, 20, rng.randrange(9), 50, rng.randrange(30), rng.randrange(1, 20),
            )
            for place in range(report.num_running)
        )  # fmt: skip
    held = [(job.request, report.replica) for report in reports for job in report.jobs]  # type: ignore[union-attr]
    moving = dict(rng.sample(held, min(len(held), rng.randrange(3))))
    names = {report.replica: 1 for report in reports}
    lent = {
        request: ((rng.choice(reports).replica, 5),) for request, _ in held if rng.random() < 0.2
    }
    cost = Phases(prefill=(0.1, 1e-4, 0.0), decode=(0.1, rng.choice((0.0, 1e-5)), 1e-3))
    return move.View(
        1.0, rng, reports, names, moving, lent=lent, cost=cost if rng.random() < 0.9 else None
    )


def scale_view(rng: random.Random) -> scale.View:
    """What a fleet of up to seven saw in the last minute; its size may be out of bounds, as after losses."""
    reports = list(route_view(rng).reports)
    most = rng.randrange(1, 8)
    ends = sorted(rng.uniform(0, 60) for _ in range(rng.randrange(9)))
    return scale.View(
        now=60.0,
        rng=rng,
        reports=reports,
        outstanding={report.replica: rng.choice((0, 3, 200)) for report in reports},
        bounds=scale.Bounds(least=rng.randrange(1, most + 1), most=most),
        starting={} if rng.random() < 0.5 else {"any": rng.randrange(1, 3)},
        served=[
            scale.Served(
                at, at / 2, rng.choice((None, at / 4)), rng.randrange(1, 99), rng.randrange(9)
            )
            for at in ends
        ],
        arrived=rng.randrange(40),
    )


def place_view(rng: random.Random) -> place.View:
    """A judge who has a limit for every unit, a second and device."""
    model = place.Model(
        name="m",
        heads=rng.choice((8, 12, 40)),
        layers=rng.choice((12, 32, 40)),
        weight_bytes=rng.uniform(1e9, 200e9),
        kv_bytes=rng.uniform(1e5, 3e6),
        device_bytes=rng.uniform(15e9, 80e9),
        degrees=rng.choice((None, (1, 2, 4))),
    )
    site = place.Site(
        nodes=rng.randrange(1, 3),
        devices_per_node=rng.randrange(1, 6),
        has_fast_links=rng.random() < 0.5,
    )
    seed = rng.randrange(1 << 30)

    def attains(unit: place.Unit, rate_per_s: float) -> bool:
        limit = zlib.crc32(f"{seed} {unit}".encode()) % 400 / 100
        return rate_per_s <= limit * unit.devices

    return place.View(
        site=site, model=model, attains=attains, most=5.0, demand_per_s=maybe(rng, 0.1, 60)
    )


VIEWS: dict[str, Callable[[random.Random], Any]] = {
    "order": order_view,
    "admit": admit_view,
    "batch": batch_view,
    "evict": evict_view,
    "route": route_view,
    "limit": limit_view,
    "fetch": fetch_view,
    "scale": scale_view,
    "place": place_view,
    "move": move_view,
}
