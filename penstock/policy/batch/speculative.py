"""Whatever another batch policy plans, with room for guesses behind the last tokens of jobs that decode.

Source: speculative decoding (Leviathan, Kalman, Matias 2023; Chen et al. 2023). How many guesses pay is an own rule in
the spirit of the adaptive lengths of SmartSpec / TurboSpec (Liu et al. 2024).

Idea: the executor guesses the next tokens of a job and verifies them in the step that computes its last one. Each
guess costs a row of the step, right or wrong; each right one saves a step. A step on few jobs is bound by reading
weights, and rows come nearly free; a full one is bound by arithmetic, and a wrong guess takes somebody else's time.

    p      chance that a guess of this job is right: its right ones among those looked at, forgotten with `memory`,
           and so many trials at everybody's rate besides as `weight` says; a guess behind a wrong one is not looked at
    G(m)   tokens expected of the m best guesses of all jobs: the j-th of a job is worth p^j
    m      that which makes (tokens planned + G(m)) / seconds(m) greatest, of 1 to 8, 12, 16, 24 ...; 0 if none gains

Prompt tokens count as tokens planned, so beside a long prompt a guess has to be as good as the work that it delays.
seconds(m) is the cost model's, times how much dearer steps with guesses turned out than those without: of each kind of
decode step the ratio of measured to foretold seconds is kept. That takes in what no model of steps knows, such as the
time of whoever guesses. Where every step has guesses, one goes without after a while, to have something to compare.

Parameters
    max_drafts    guesses for one job in a step, default 4
    prior         the rate before anybody has been seen, default 0.5
    weight        trials that everybody's rate counts for in a job's, default 4
    memory        trials after which what was seen is half forgotten, default 32
    probe_every   a job without guesses gets one after so many tokens, to see whether its text has changed, default 32
    inner         the table of the policy that plans, default vllm-v1

Guesses never take memory from anybody: in steps that evict there are none, and while somebody waits they must fit into
the blocks that their jobs hold. They are not for steps of several lanes, layer ranges or templates.

Where we differ: acceptance is measured for each job; the step's time is foretold for this very step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, get_args

from msgspec import structs

from penstock.core.config import Table
from penstock.core.events import Completed, Drafted, Event
from penstock.core.views import Batch, Chunk, JobView, LedgerFork, Singles
from penstock.policy.batch import Decision, Policy, View
from penstock.policy.batch.vllm_v1 import VllmV1

FEW = (
    8  # guesses up to which every number of them is tried; measured steps that are enough to go by
)
PACE = 16  # steps over which measured times are smoothed
MOST_DEARER = 4.0
MANY = 64  # jobs that are remembered beside those that run


@dataclass(slots=True)
class Seen:
    """Guesses of one job that were looked at, and the right ones among them, both fading. `at`: its tokens then."""

    trials: float = 0.0
    right: float = 0.0
    at: int | None = None


@dataclass(slots=True)
class Pace:
    """Measured over foretold seconds of one kind of step."""

    ratio: float = 0.0
    num: int = 0

    def add(self, ratio: float) -> None:
        self.num += 1
        self.ratio += (ratio - self.ratio) / min(self.num, PACE)


class Asked(NamedTuple):
    """A step of decodes: when it was planned, its foretold seconds without guesses and with all that have room."""

    at: float
    plain_s: float
    roomy_s: float
    room: int


@dataclass(slots=True)
class Speculative:
    max_drafts: int = 4
    prior: float = 0.5
    weight: float = 4.0
    memory: float = 32.0
    probe_every: int = 32
    inner: Table = field(default_factory=lambda: Table(name="vllm-v1"))
    _inner: Policy = field(init=False, default_factory=VllmV1, repr=False)
    _seen: dict[int, Seen] = field(init=False, default_factory=dict, repr=False)
    _all: Seen = field(init=False, default_factory=Seen, repr=False)
    _plain: Pace = field(init=False, default_factory=Pace, repr=False)
    _guessed: Pace = field(init=False, default_factory=Pace, repr=False)
    _asked: Asked | None = field(init=False, default=None, repr=False)
    _made: int = field(init=False, default=0, repr=False)  # guesses of the step that ends now

    def __post_init__(self) -> None:
        if self.max_drafts < 1 or self.probe_every < 1:
            raise ValueError("max_drafts and probe_every must be at least 1")
        if not 0 <= self.prior <= 1:
            raise ValueError(f"prior is a probability, got {self.prior}")
        if not (self.weight > 0 and self.memory > 0):
            raise ValueError("weight and memory count trials: both must be positive")

    def wrap(self, inner: Policy) -> None:
        """Set who plans. Raises ValueError where guesses have no place in its plans."""
        if getattr(inner, "num_lanes", 1) > 1 or hasattr(inner, "wrap"):
            raise ValueError(
                "guesses need a policy of one lane, and one that does not guess itself"
            )
        self._inner = inner

    @property
    def interrupts(self) -> bool:
        return bool(getattr(self._inner, "interrupts", False))

    @property
    def hears(self) -> tuple[type, ...]:
        return (Drafted, *dict.fromkeys((Completed, *self._inner_hears())))

    def _inner_hears(self) -> tuple[type, ...]:
        if not hasattr(self._inner, "observe"):
            return ()
        kinds: Iterable[type] = getattr(self._inner, "hears", get_args(Event))
        return tuple([kind for kind in kinds if kind is not Drafted])

    def observe(self, event: Event) -> None:
        if isinstance(event, Completed):
            self._measure(event)
        if not isinstance(event, Drafted):
            if type(event) in self._inner_hears():
                self._inner.observe(event)  # type: ignore[attr-defined]
            return
        self._made = sum([drafted for _, drafted, _ in event.guesses])
        for seq, drafted, right in event.guesses:
            trials = min(right + 1, drafted)
            for seen in (self._seen.get(seq), self._all):
                if seen is not None:
                    kept = 0.5 ** (trials / self.memory)
                    seen.trials = seen.trials * kept + trials
                    seen.right = seen.right * kept + right

    def _measure(self, event: Completed) -> None:
        asked, made = self._asked, self._made
        self._asked, self._made = None, 0
        if asked is None or event.steps_run > 1 or event.error is not None:
            return
        used = min(1.0, made / asked.room) if asked.room else 0.0
        foretold_s = asked.plain_s + used * (asked.roomy_s - asked.plain_s)
        if foretold_s > 0:
            pace = self._guessed if made else self._plain
            pace.add((event.ends[-1] - asked.at) / foretold_s)

    @property
    def _dearer(self) -> float:
        """How much more steps with guesses take than was foretold, beside those without."""
        if self._plain.num < FEW or self._guessed.num < FEW or not self._plain.ratio > 0:
            return 1.0
        return min(max(self._guessed.ratio / self._plain.ratio, 1 / MOST_DEARER), MOST_DEARER)

    def decide(self, view: View) -> Decision:
        said = self._inner.decide(view)
        self._asked = None
        lanes = said.batch.lanes
        if not lanes or _is_special(view, said):
            said.outlasts = False  # once it is an ordinary step, guesses are to be thought of
            return said
        jobs = _decodes(lanes[0].chunks, {job.seq for job in said.admitted})
        grants = self._grants(view, said, jobs) if jobs else {}
        self._note(view, jobs, grants)
        if jobs and len(jobs) == len(lanes[0].chunks):
            self._ask(view, lanes[0].chunks, grants)
        if not grants:
            left = min([self._until_probe(job) for job in jobs], default=said.stable_for)
            return structs.replace(
                said, stable_for=max(1, min(said.stable_for, left)), outlasts=False
            )
        lane = lanes[0]._replace(chunks=_granted(lanes[0].chunks, grants))
        return structs.replace(said, batch=Batch((lane,)), stable_for=1, outlasts=False)

    def _ask(self, view: View, chunks: tuple[Chunk, ...] | Singles, grants: dict[int, int]) -> None:
        plain_s = view.cost.predict(chunks)
        roomy_s = view.cost.predict(_granted(chunks, grants)) if grants else plain_s
        self._asked = Asked(view.now, plain_s, roomy_s, sum(grants.values()))

    # ------------------------------------------------------------------ how many

    def _grants(self, view: View, said: Decision, jobs: Sequence[JobView]) -> dict[int, int]:
        """How many guesses each job may verify, by seq; only those with any."""
        chunks = said.batch.lanes[0].chunks
        if self._plain.num < FEW and self._guessed.num > PACE * (1 + self._plain.num):
            return {}
        room = view.caps.max_batch_tokens - sum([chunk.tokens for chunk in chunks])
        fork = view.ledger.fork()
        _book(fork, said, {job.seq for job in view.waiting})
        is_tight = len(view.waiting) > len(said.admitted)
        ranked: list[tuple[float, int, int, JobView]] = []
        probing = []
        for place, job in enumerate(jobs):
            most = min(self.max_drafts, job.max_tokens - job.num_output - 1)
            most = _that_fit(fork, job, most, is_tight)
            rate = self._rate(job)
            ranked += [(-(rate**depth), depth, place, job) for depth in range(1, most + 1)]
            if most and self._until_probe(job) < 1:
                probing.append(job)
        ranked.sort(key=lambda one: one[:3])
        best = self._best(view, chunks, ranked[: max(0, room)])
        grants: dict[int, int] = {}
        for _, depth, _, job in ranked[:best]:
            grants[job.seq] = depth
        for job in probing[: max(0, room - best)]:
            grants.setdefault(job.seq, 1)
        return grants

    def _best(
        self,
        view: View,
        chunks: tuple[Chunk, ...] | Singles,
        ranked: Sequence[tuple[float, int, int, JobView]],
    ) -> int:
        """How many of the ranked guesses make the step's tokens a second most."""
        planned = float(sum([chunk.tokens for chunk in chunks]))
        gains = list(accumulate([-worth for worth, _, _, _ in ranked], initial=planned))
        best, speed, dearer = 0, planned / max(view.cost.predict(chunks), 1e-12), self._dearer
        for num in _sizes(len(ranked)):
            grants = {job.seq: depth for _, depth, _, job in ranked[:num]}
            seconds = view.cost.predict(_granted(chunks, grants)) * dearer
            if gains[num] > speed * seconds:
                best, speed = num, gains[num] / seconds
        return best

    # ------------------------------------------------------------------ what was seen

    def _rate(self, job: JobView) -> float:
        everybody = self._all
        total = (everybody.right + self.prior * self.weight) / (everybody.trials + self.weight)
        seen = self._seen.get(job.seq)
        if seen is None:
            return total
        return (seen.right + total * self.weight) / (seen.trials + self.weight)

    def _until_probe(self, job: JobView) -> int:
        """Tokens after which the job is to get a guess again; one it had none of gets its first soon."""
        seen = self._seen.get(job.seq)
        at = 0 if seen is None or seen.at is None else seen.at
        return at + self.probe_every - job.num_output

    def _note(self, view: View, jobs: Sequence[JobView], grants: dict[int, int]) -> None:
        for job in jobs:
            if job.seq in grants:
                self._seen.setdefault(job.seq, Seen()).at = job.num_output
        if len(self._seen) > MANY + 2 * len(view.running):
            here = {job.seq for job in (*view.running, *view.waiting)}
            self._seen = {seq: seen for seq, seen in self._seen.items() if seq in here}


def _is_special(view: View, said: Decision) -> bool:
    """Whether this is no step for guesses: somebody leaves, or plans stop, or layers and lanes are apart."""
    batch = said.batch
    if said.evicted or said.interrupt or said.resume or view.flying or view.suspended:
        return True
    if len(batch.lanes) > 1 or batch.nano is not None:
        return True
    chunks = batch.lanes[0].chunks
    some = chunks.others if isinstance(chunks, Singles) else chunks
    return any([layers is not None or phase != "extend" for _, _, layers, phase in some])


def _decodes(chunks: tuple[Chunk, ...] | Singles, admitted: set[int]) -> list[JobView]:
    """The jobs that compute their last token and nothing else, and have written before."""
    if isinstance(chunks, Singles):
        found, chunks = [job for job in chunks.jobs if job.num_output], chunks.others
    else:
        found = []
    found += [
        job
        for job, tokens, _, _ in chunks
        if tokens == 1 and job.num_output and job.seq not in admitted and job.todo == 1
    ]
    return found


def _book(fork: LedgerFork, said: Decision, waiting: set[int]) -> None:
    """What was planned takes its blocks first."""
    for job, tokens, _, _ in said.batch.lanes[0].chunks:
        start = fork.cached(job) if job.seq in waiting else job.computed + job.in_flight
        fork.reserve(job, start + tokens)


def _that_fit(fork: LedgerFork, job: JobView, most: int, is_tight: bool) -> int:
    """Up to `most` positions behind the job's last one, booked. `is_tight`: in the blocks that it holds."""
    start = job.computed + 1
    inside = max(0, min(most, fork.held(job) * fork.block_size - start))
    if most <= inside or is_tight or not fork.reserve(job, start + most):
        return inside
    return most


def _sizes(most: int) -> Iterator[int]:
    """1 to 8, then 12, 16, 24, 32 ... and `most` itself."""
    yield from range(1, min(most, FEW) + 1)
    size = FEW
    while size < most:
        yield from (tried for tried in (size + size // 2, 2 * size) if tried < most)
        size *= 2
    if most > FEW:
        yield most


def _granted(
    chunks: tuple[Chunk, ...] | Singles, grants: dict[int, int]
) -> tuple[Chunk, ...] | Singles:
    """The same chunks, with room for guesses. Who has none stays among the decodes by columns."""

    def roomy(chunk: Chunk) -> Chunk:
        drafts = grants.get(chunk.job.seq)
        if drafts is None:
            return chunk
        return Chunk(chunk.job, 1 + drafts, None, "verify")

    if not isinstance(chunks, Singles):
        return tuple([roomy(chunk) for chunk in chunks])
    plain = tuple([job for job in chunks.jobs if job.seq not in grants])
    guessed = [roomy(Chunk(job, 1)) for job in chunks.jobs if job.seq in grants]
    others = (*guessed, *[roomy(chunk) for chunk in chunks.others])
    return Singles(plain, others) if plain else others
