"""What a routing decision takes, for every router of the table: thread time of each of many decisions.

    python -m benchmarks.routing [--replicas 64] [--prefixes 10000] [--decisions 3000] [--repeats 1] [ROUTER ...]

A fleet of `--replicas` holds `--prefixes` beginnings of 64 blocks (16 tokens each), every one of them at two replicas
and a system prompt of eight blocks at all; requests continue a beginning by 16 blocks of their own. What is timed is
the router's `choose` (the view, the policy, the event, the ledger, the guess of what will be there), by thread time,
since other work on the machine is not the router's. `policy` is the policy's share alone. With `--repeats 5` the very
same decisions are taken five times over and the least of the five times counts: what a decision takes when nobody else
empties the caches of the processor.

Four requests wait at each replica for their first token and sixteen more are being answered; reports come between.
`pressed`: the queues that are reported are so long that no promise can be kept, so that routers which move what waits
look for moves at each decision. `long`: prompts of 8,192 blocks. What was made before the first decision is frozen for
the collector of garbage, as a server does when it has loaded.

`decided`: a digest of all that was chosen, so that a router which was made faster can be seen to choose as before. With
`--tiers` replicas have memory behind the device's: of every other beginning one of the two has the first half on the
device, a quarter in host memory and the last on disk.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections import deque
from hashlib import blake2b
from typing import Any, NamedTuple

from penstock.cluster.router import Router
from penstock.cluster.sight import Sight
from penstock.core.messages import BlockNews, Changes
from penstock.core.prompt import HashedPrompt
from penstock.core.types import BlockHash, Report, Request, RequestId, Sampling
from penstock.cost.phases import Phases
from penstock.policy import TABLE, find

SYSTEM, PREFIX, OWN, LONG, SIZE = 8, 64, 16, 8192, 16
WHOLE = (
    PREFIX - SYSTEM,
    PREFIX - SYSTEM,
    PREFIX - SYSTEM,
)  # where what is on the device, in host memory, on disk ends
PARTED = (PREFIX - SYSTEM) // 2, 3 * (PREFIX - SYSTEM) // 4, PREFIX - SYSTEM
WAITING, ANSWERED = 4, 16  # requests of a replica
USUAL, PRESSED = 9_000, 900_000  # prompt tokens that wait at a replica, at most
COST = Phases(prefill=(0.02, 1e-4, 7e-9), decode=(0.02, 6e-7, 4e-5))


class Taken(NamedTuple):
    """Seconds of decisions, the policy's share of them, and who was chosen."""

    whole: list[float]
    policy: list[float]
    chosen: tuple[str, ...]


class Quiet:
    """A log that keeps nothing."""

    def emit(self, event: object) -> None:
        pass


class Timed:
    """A policy, and what its decisions took."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.seconds = policy, list[float]()

    def decide(self, view: Any) -> Any:
        begun = time.thread_time_ns()
        decision = self.policy.decide(view)
        self.seconds.append((time.thread_time_ns() - begun) / 1e9)
        return decision


def names(prefix: int, start: int, end: int) -> tuple[BlockHash, ...]:
    return tuple(
        BlockHash((0 if place < SYSTEM else prefix).to_bytes(8, "big") + place.to_bytes(8, "big"))
        for place in range(start, end)
    )


def request(number: int, prefix: int, blocks: int) -> Request:
    own = names(10**9 + number, PREFIX, PREFIX + blocks)
    hashes = names(prefix, 0, PREFIX) + own
    prompt = HashedPrompt(len(hashes) * SIZE + 5, hashes, SIZE)
    return Request(
        id=RequestId(f"r{number}"), model="m", prompt=prompt, sampling=Sampling(max_tokens=100)
    )


def report(name: str, chance: random.Random, at: float, absorbed: int, waits: int) -> Report:
    return Report(
        replica=name,
        at=at,
        num_running=chance.randrange(32),
        num_waiting=chance.randrange(8),
        waiting_tokens=waits // 2 + chance.randrange(waits // 2),
        total_blocks=60_000,
        free_blocks=chance.randrange(60_000),
        block_size=SIZE,
        decode_tokens=chance.randrange(90_000),
        absorbed=absorbed,
    )


def fill(
    router: Router, replicas: list[str], args: argparse.Namespace, chance: random.Random
) -> None:
    """Blocks: each beginning at two replicas."""
    held = {
        name: ([*names(0, 0, SYSTEM)], list[BlockHash](), list[BlockHash]()) for name in replicas
    }
    for prefix in range(1, args.prefixes + 1):
        blocks = names(prefix, SYSTEM, PREFIX)
        for place, name in enumerate(chance.sample(replicas, min(2, len(replicas)))):
            is_parted = args.tiers and place and prefix % 2
            begin = 0
            for part, end in zip(held[name], PARTED if is_parted else WHOLE, strict=True):
                part += blocks[begin:end]
                begin = end
    for name in replicas:
        device, host, disk = (tuple(part) for part in held[name])
        router.tell(0.0, name, BlockNews(device, (), Changes(host), Changes(disk)))


class Answers:
    """First tokens and ends of what was sent, so many decisions later."""

    def __init__(self, router: Router, num_replicas: int) -> None:
        self._router, self._num = router, num_replicas
        self._waiting: deque[tuple[RequestId, str]] = deque()
        self._answered: deque[tuple[RequestId, str]] = deque()

    def go_on(self, at: float, sent: RequestId, replica: str) -> None:
        self._waiting.append((sent, replica))
        if len(self._waiting) > WAITING * self._num:
            begun = self._waiting.popleft()
            self._router.begin(at, *begun)
            self._answered.append(begun)
        if len(self._answered) > ANSWERED * self._num:
            self._router.end(at, *self._answered.popleft())


def measure(
    name: str, args: argparse.Namespace, blocks: int, count: int, waits: int = USUAL
) -> Taken:
    chance = random.Random(7)
    policy = find("route", name)()
    timed = Timed(policy)
    sight = Sight((policy,), cost=COST, has_tiers=args.tiers)
    router = Router("fleet", timed, log=Quiet(), sight=sight)  # type: ignore[arg-type]
    replicas = [f"replica-{number}" for number in range(args.replicas)]
    for each in replicas:
        router.hear(0.0, report(each, chance, 0.0, 0, waits))
    fill(router, replicas, args, chance)
    answers, taken, told = Answers(router, len(replicas)), list[float](), list[str]()
    warm = (WAITING + ANSWERED + 1) * len(replicas)  # tables grow, code is read in
    gc.collect()
    gc.freeze()
    for number in range(warm + count):
        asked = request(
            number, chance.randrange(1, args.prefixes + 1), blocks if number >= warm else OWN
        )
        at = number / 100
        begun = time.thread_time_ns()
        chosen = router.choose(at, asked)
        taken.append((time.thread_time_ns() - begun) / 1e9)
        if chosen is None:
            raise SystemExit(f"{name} chose nobody")
        told.append(chosen)
        answers.go_on(at, asked.id, chosen)
        if number % 3 == 0:
            one = replicas[number // 3 % len(replicas)]
            router.hear(at, report(one, chance, at, router.last_seq(one), waits))
    gc.unfreeze()
    return Taken(taken[warm:], timed.seconds[warm:], tuple(told))


def least_of(
    name: str, args: argparse.Namespace, blocks: int, count: int, waits: int = USUAL
) -> Taken:
    """Of each decision the least of the times it took."""
    found = [measure(name, args, blocks, count, waits) for _ in range(args.repeats)]
    whole, policy, (chosen, *others) = zip(*found, strict=True)
    if any(each != chosen for each in others):
        raise SystemExit(f"{name} did not choose the same each time")
    least = [[min(each) for each in zip(*part, strict=True)] for part in (whole, policy)]
    return Taken(*least, chosen)


def at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--prefixes", type=int, default=10_000)
    parser.add_argument("--decisions", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tiers", action="store_true")
    parser.add_argument("routers", nargs="*", default=sorted(TABLE["route"]))
    args = parser.parse_args()
    print(
        f"{args.replicas} replicas, {args.prefixes} beginnings, {args.decisions} decisions; milliseconds of thread time"
    )
    columns = (
        "p50",
        "p99",
        "policy p50",
        "policy p99",
        "pressed p50",
        "pressed p99",
        "long p50",
        "decided",
    )
    print(f"{'router':<16}" + "".join(f"{column:>13}" for column in columns))
    for name in args.routers:
        usual = least_of(name, args, OWN, args.decisions)
        pressed = least_of(name, args, OWN, args.decisions, PRESSED)
        long = least_of(name, args, LONG, max(50, args.decisions // 30))
        parts = (usual.whole, usual.policy, pressed.whole)
        told = [at(values, share) for values in parts for share in (0.5, 0.99)]
        told.append(at(long.whole, 0.5))
        decided = blake2b(repr((usual.chosen, pressed.chosen, long.chosen)).encode(), digest_size=4)
        print(
            f"{name:<16}"
            + "".join(f"{1e3 * one:13.3f}" for one in told)
            + f"{decided.hexdigest():>13}",
            flush=True,
        )


if __name__ == "__main__":
    main()
