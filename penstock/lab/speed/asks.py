"""What engines are asked, and the samples that come of it.

    decode N     a prompt of N tokens, then `steps` tokens: the prompt is sample `prefill N`, the tokens `decode`
    prefill N    a prompt of N tokens, one token
    many         requests all at once, 64..512 tokens in, 64..128 out: tokens in and out a second
    prefix       requests all at once that begin alike: mean time to first token when the prefix was seen before
                 (`warm`), when it is new (`new`), and when each has a prefix of its own (`cold`: nothing is shared)
    start        a process, its imports, loading, one token

Prompts are random token ids, other ones in every repeat, so that no engine remembers them. Engines get the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.clock import now
from penstock.core.rng import stream
from penstock.lab.neighbours import Watch
from penstock.lab.speed.peer import Mark, Peer

FIRST_ID, IDS = 4, 4000
EVERY = 8
SHORT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Prompts and answer lengths, all at once. `every`: marks between the first token and the last."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    every: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) + sum(self.tokens)

    @property
    def longest(self) -> int:
        pairs = zip(self.prompts, self.tokens, strict=True)
        return max(len(prompt) + count for prompt, count in pairs)

    def question(self) -> dict[str, object]:
        return {
            "do": "generate",
            "prompts": [list(prompt) for prompt in self.prompts],
            "tokens": list(self.tokens),
            "every": self.every,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is asked."""

    context: int = 512
    steps: int = 64
    prefills: tuple[int, ...] = (2048,)
    requests: int = 32
    prompt: tuple[int, int] = (64, 512)
    answer: tuple[int, int] = (64, 128)
    prefix: int = 1024
    tail: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One engine, one measure, once. `work`: tokens, or 1 of what is timed whole. `units_s`: seconds a unit of work.

    `others`: the share of the machine that others took meanwhile.
    """

    engine: str
    weights: str
    threads: int
    measure: str
    repeat: int
    work: float
    wall_s: float
    cpu_s: float
    units_s: tuple[float, ...] = ()
    others: float | None = None
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """From the question to the last mark."""

    asked: Mark
    marks: list[Mark]
    others: float | None

    def first(self, request: int) -> Mark:
        return next(mark for mark in self.marks if mark.request == request)


def random_ids(count: int, seed: int, *names: object) -> tuple[int, ...]:
    draw = stream(seed, "speed", *map(str, names))
    return tuple(FIRST_ID + draw.randrange(IDS) for _ in range(count))


def many_of(sizes: Sizes, seed: int) -> Ask:
    draw = stream(seed, "speed", "many")
    lengths = [
        (draw.randint(*sizes.prompt), draw.randint(*sizes.answer)) for _ in range(sizes.requests)
    ]
    prompts = tuple(random_ids(size, seed, "many", at) for at, (size, _) in enumerate(lengths))
    return Ask(prompts=prompts, tokens=tuple(count for _, count in lengths))


def prefixed(sizes: Sizes, seed: int, *, is_shared: bool) -> Ask:
    prompts = tuple(
        random_ids(sizes.prefix, seed, "prefix", "all" if is_shared else at)
        + random_ids(sizes.tail, seed, "tail", at)
        for at in range(sizes.requests)
    )
    return Ask(prompts=prompts, tokens=(1,) * sizes.requests)


def alone(size: int, tokens: int, seed: int, name: str) -> Ask:
    every = EVERY if tokens > 1 else None
    return Ask(prompts=(random_ids(size, seed, name, size),), tokens=(tokens,), every=every)


async def answered(peer: Peer, ask: Ask) -> Span:
    """Raises PeerFailed."""
    watch, marks = Watch(peer.pids), list[Mark]()
    asked = Mark(now(), peer.cpu_s(), 0, 0)
    await peer.ask(ask.question(), marks.append)
    return Span(asked, marks, watch.share())


@dataclass(frozen=True, slots=True, kw_only=True)
class Taker:
    """Takes samples of one engine."""

    peer: Peer
    weights: str
    threads: int
    sizes: Sizes

    def sample(
        self, measure: str, repeat: int, work: float, begin: Mark, end: Mark, **more: object
    ) -> Sample:
        return Sample(
            engine=self.peer.spec.name,
            weights=self.weights,
            threads=self.threads,
            measure=measure,
            repeat=repeat,
            work=work,
            wall_s=end.at - begin.at,
            cpu_s=end.cpu_s - begin.cpu_s,
            **more,  # type: ignore[arg-type]
        )

    async def warm_up(self) -> None:
        await answered(self.peer, alone(4 * SHORT, 4, 0, "warm-up"))

    async def decode(self, repeat: int) -> list[Sample]:
        context, steps = self.sizes.context, self.sizes.steps
        span = await answered(self.peer, alone(context, 1 + steps, repeat, "decode"))
        first, last = span.first(0), span.marks[-1]
        # The first token shares its step with the prompt, so the gaps begin with the second mark.
        pairs = zip(span.marks[1:], span.marks[2:], strict=False)
        gaps = tuple((b.at - a.at) / (b.tokens - a.tokens) for a, b in pairs)
        share = span.others
        return [
            self.sample(f"prefill {context}", repeat, context, span.asked, first, others=share),
            self.sample("decode", repeat, steps, first, last, units_s=gaps, others=share),
        ]

    async def prefill(self, size: int, repeat: int) -> list[Sample]:
        span = await answered(self.peer, alone(size, 1, repeat, "prefill"))
        end = span.first(0)
        return [self.sample(f"prefill {size}", repeat, size, span.asked, end, others=span.others)]

    async def many(self, repeat: int) -> list[Sample]:
        ask = many_of(self.sizes, repeat)
        span = await answered(self.peer, ask)
        out = {"out": float(sum(ask.tokens))}
        end = span.marks[-1]
        return [
            self.sample(
                "many", repeat, ask.num_tokens, span.asked, end, others=span.others, more=out
            )
        ]

    async def prefix(self, repeat: int) -> list[Sample]:
        """Cold, new and warm, in this order: what is warm was new before."""
        cold = prefixed(self.sizes, 1000 + repeat, is_shared=False)
        shared = prefixed(self.sizes, repeat, is_shared=True)
        again = Ask(
            prompts=tuple(
                prompt[: self.sizes.prefix] + random_ids(self.sizes.tail, repeat, "again", at)
                for at, prompt in enumerate(shared.prompts)
            ),
            tokens=shared.tokens,
        )
        found = []
        for name, ask in (("cold", cold), ("new", shared), ("warm", again)):
            span = await answered(self.peer, ask)
            waits = [span.first(at).at - span.asked.at for at in range(len(ask.prompts))]
            mean = Mark(span.asked.at + sum(waits) / len(waits), span.marks[-1].cpu_s, 0, 0)
            found.append(
                self.sample(f"prefix {name}", repeat, 1, span.asked, mean, others=span.others)
            )
        return found


async def started(peer: Peer, question: dict[str, object], sizes: Sizes, repeat: int) -> Sample:
    """A fresh process to its first token. The peer is left running. Raises PeerFailed."""
    await peer.start()
    await peer.load(question)
    loaded_at = now()
    ask = alone(SHORT, 1, repeat, "start")
    begin = Mark(peer.began_at, 0.0, 0, 0)
    span = await answered(peer, ask)
    taker = Taker(
        peer=peer,
        weights=str(question["weights"]),
        threads=int(str(question["threads"])),
        sizes=sizes,
    )
    more = {"imports_s": peer.hello_at - peer.began_at, "loading_s": loaded_at - peer.hello_at}
    return taker.sample("start", repeat, 1, begin, span.first(0), others=span.others, more=more)
