"""How many tokens an answer will have: the distribution of recent answers, conditioned on what is known already.

Keeps the lengths of the last `window` answers that ended by themselves or at their cap (cancelled ones say nothing
about length). What is kept of a job that has produced d tokens is H = the n kept lengths above d, in order. The next
answer is as likely to fall into any of the n + 1 gaps of

    d, H[1], ..., H[n], cap            cap = the job's max_tokens; no estimate is above it

for n answers and one more, all of one kind, have no order of their own. So

    sample(u)    the point u of the way along these gaps, linear within one, at least d + 1
    quantile(q)  the first H[k] with k >= q * (n + 1), the cap when there is none: it is exceeded with a probability of
                 at most 1 - q whatever the distribution is, also where few answers were as long as d

Past-Future samples in this way; the conditional P95 is the length bound that JITServe falls back on.

Until `enough` answers were seen every estimate is the cap: cautious, and what engines without predictions assume.
`seeds` answers more are taken to have reached their cap, until real ones push them out of the window (Past-Future
begins with window / 2 of them): those that end first are the short ones, and a window of nothing else is too brave.
`begin` are lengths known from an earlier run: with them nothing has to be learned first.

`trained_on` names a trace: the lengths are then those of a forest learned from it (penstock.cost.forest), which minds
how long a prompt is and learns nothing more; nothing else said here holds.

`by` keeps a window for each tenant, priority, promise (slo) or size of prompt (doublings) besides the one of all
answers, which speaks for those with less than `enough` answers of their own.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from penstock.core.events import Event, Finished
from penstock.core.views import JobView, RequestView

Trait = Literal["tenant", "priority", "slo", "prompt"]
TRAITS: dict[str, Callable[[RequestView | Finished, int], Hashable]] = {
    "tenant": lambda of, num_prompt: of.tenant,
    "priority": lambda of, num_prompt: of.priority,
    "slo": lambda of, num_prompt: of.slo,
    "prompt": lambda of, num_prompt: num_prompt.bit_length(),
}
MAX_GROUPS = 256  # windows kept besides that of all answers; the one longest without an answer goes


@dataclass(frozen=True, kw_only=True)
class History:
    """Which answers teach, and when they are believed; the table `lengths` of a fleet."""

    window: int = 1000
    enough: int = 32
    seeds: int = 0
    by: tuple[Trait, ...] = ()
    begin: tuple[int, ...] = ()
    trained_on: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.enough <= self.window:
            raise ValueError(
                f"enough must be from 1 to the window's {self.window}, got {self.enough}"
            )
        if not 0 <= self.seeds <= self.window:
            raise ValueError(
                f"seeds must be from 0 to the window's {self.window}, got {self.seeds}"
            )
        if len(set(self.by)) < len(self.by):
            raise ValueError(f"by names a trait twice: {', '.join(self.by)}")
        if self.trained_on is not None and replace(self, trained_on=None) != History():
            raise ValueError("trained_on takes the place of the other settings: leave them out")
        if any(length < 1 for length in self.begin):
            raise ValueError(f"begin must hold lengths of 1 or more, got {min(self.begin)}")


class Window:
    """The last lengths, also in order of size."""

    __slots__ = ("most", "seeds", "ordered", "_recent")

    def __init__(self, most: int, seeds: int) -> None:
        self.most, self.seeds = most, seeds
        self.ordered: list[int] = []
        self._recent: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, length: int) -> None:
        self._recent.append(length)
        insort(self.ordered, length)
        if len(self._recent) > self.most:
            del self.ordered[bisect_left(self.ordered, self._recent.popleft())]
        self.seeds = min(self.seeds, self.most - len(self._recent))

    def quantile(self, num_output: int, q: float) -> int | None:
        """The length exceeded with a probability of at most 1 - q by who has written so much; None: the cap."""
        ordered = self.ordered
        first = bisect_right(ordered, num_output)
        gaps = len(ordered) - first + self.seeds + 1
        place = first + max(1, math.ceil(q * gaps)) - 1
        return ordered[place] if place < len(ordered) else None


class RecentLengths:
    """Implements core.views.Lengths; learns by `observe`, which its replica calls with every event that it hears."""

    hears = (Finished,)

    def __init__(self, history: History | None = None) -> None:
        self._history = history = history or History()
        self._all = Window(history.window, history.seeds)
        self._groups: dict[Hashable, Window] = {}
        self._traits = [TRAITS[name] for name in history.by]
        for length in history.begin:
            self.add(length)

    def observe(self, event: Event) -> None:
        if not isinstance(event, Finished) or event.reason not in ("stop", "length"):
            return
        self.add(event.num_output)
        if self._traits:
            self._group(tuple(trait(event, event.num_prompt) for trait in self._traits)).add(
                event.num_output
            )

    def add(self, num_output: int) -> None:
        """Note the length of an answer of nobody in particular, say one of an earlier run."""
        self._all.add(num_output)

    def _group(self, key: Hashable) -> Window:
        """The window of a group, from now on the one that heard last."""
        found = self._groups.pop(key, None)
        if found is None:
            found = Window(self._history.window, self._history.seeds)
        self._groups[key] = found
        if len(self._groups) > MAX_GROUPS:
            del self._groups[next(iter(self._groups))]
        return found

    def _window_of(self, job: JobView) -> Window | None:
        """Whose answers speak for the job's; None = too few were seen."""
        enough = self._history.enough
        if self._traits:
            key = tuple(trait(job.request, job.num_prompt) for trait in self._traits)
            found = self._groups.get(key)
            if found is not None and len(found) >= enough:
                return found
        return self._all if len(self._all) >= enough else None

    def quantile(self, job: JobView, q: float) -> int:
        """The total length that the answer exceeds with a probability of at most 1 - q, given what it has."""
        window, cap = self._window_of(job), job.max_tokens
        if window is None:
            return cap
        found = window.quantile(job.num_output, q)
        return cap if found is None or found > cap else found

    def quantiles(self, jobs: Sequence[JobView], q: float) -> list[int]:
        """`quantile` of each, looked up once for all that have written as much and share their window."""
        if self._traits or len(self._all) < self._history.enough:
            return [self.quantile(job, q) for job in jobs]
        written = [job.num_output for job in jobs]
        known = {done: self._all.quantile(done, q) for done in set(written)}
        return [
            cap if (found := known[done]) is None or found > cap else found
            for cap, done in zip([job.max_tokens for job in jobs], written, strict=True)
        ]

    def sample(self, job: JobView, u: float) -> int:
        """The total length at the uniform draw u of [0, 1), given what it has."""
        window, cap, done = self._window_of(job), job.max_tokens, job.num_output
        if window is None:
            return cap
        ordered = window.ordered
        first, last = bisect_right(ordered, done), len(ordered)
        along = u * (last - first + window.seeds + 1)
        step = int(along)
        place = first + step  # of the upper end of the gap
        upper = ordered[place] if place < last else cap
        if upper > cap:
            upper = cap
        lower = ordered[place - 1] if step and place <= last else cap if step else done
        if lower >= upper:
            return upper
        found = int(lower + (upper - lower) * (along - step) + 0.5)
        return found if found > done else done + 1
