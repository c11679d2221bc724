"""The split between a prefill and a decode lane that promises like best: semi-PD's controller.

Source: semi-PD (Hong et al., 2025; infinigence/Semi-PD). That it watches TTFT and TPOT against their promises and moves
the split is published; the released code has the static part only, so the rule below is a reconstruction.

Idea: at the end of each window, fit how long either lane takes by its share, foresee first tokens and gaps for every
split of a grid, and go one step towards the best one.

    S(n, x) = a + b n / (1000 x)     seconds of a prefill step of n tokens with the share x
    T_d(y)  = a' + b' / y            seconds of a decode step; flat above FLAT where one share only was seen
    W(x)    = r E[S^2] / (2 (1 - r E[S]))   the wait of an M/G/1 queue of the prompts that arrived, r of them a second
    G       = u T_d(y) + (1 - u) T_d(1), u = r E[S] where idle lanes lend their share, else T_d(y)       gaps
    slack   = min( (ttft - W(x) - E[S]) / ttft, (tpot - G) / tpot )         larger is better; no queue where r E[S] >= 1

over x + y = 1 and, where the supply allows, (1, 1), at which both lanes fight for all cores: each is taken to have what
its part of the sum is. A step is taken when the slack grows by more than `least_gain` and `windows_to_agree` windows in
a row want the same direction; (1, 1) is next to the even split.

Parameters
    window_s, window_finished   a window ends after so many seconds, or answers; defaults 10 s, 50
    grid, lowest                step of the splits and the smallest share, defaults 0.1, 0.2
    least_gain                  of slack, default 0.05
    windows_to_agree            default 2
    ttft_s, tpot_s              promises to keep, default None: the tightest of those who arrived in the window
    may_overlap                 whether (1, 1) is a choice, default True

What a call takes: at the end of a window, so once in `window_s` or `window_finished` answers, it grows with the prompts
that arrived in it (all choices look at each of them); otherwise some microseconds.

Where we differ: everything above is our reading. What prefill steps took counts half as much with every window that
passes; decode steps, whose batch changes, are forgotten after MEMORY windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.core.events import Arrived, Event, Finished
from penstock.core.limits import Holder
from penstock.policy.limit import Decision, View

PREFILL, DECODE = "prefill", "decode"
FLAT = 0.4  # of the cores: with so many memory is the limit of a decode step
MEMORY = 6  # windows
HOPELESS = -1e6  # slack of a split whose queue grows without bound; the larger share is then better
Split = tuple[float, float]
Sums = tuple[float, ...]  # of 1, u, u^2, seconds, u * seconds, over steps with u = n / (1000 x)
Line = tuple[float, float]


@dataclass(slots=True)
class Window:
    """What happened since `began_at`."""

    began_at: float
    prompts: list[int] = field(default_factory=list)
    num_finished: int = 0
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    prefill: list[tuple[float, float, int]] = field(default_factory=list)  # n / (1000 x), seconds
    decode: dict[float, list[float]] = field(default_factory=dict)  # by share: seconds, steps


@dataclass(slots=True)
class SemiPd:
    window_s: float = 10.0
    window_finished: int = 50
    grid: float = 0.1
    lowest: float = 0.2
    least_gain: float = 0.05
    windows_to_agree: int = 2
    ttft_s: float | None = None
    tpot_s: float | None = None
    may_overlap: bool = True
    _split: Split | None = field(init=False, default=None, repr=False)
    _window: Window = field(init=False, repr=False)
    _number: int = field(init=False, default=0, repr=False)
    _sums: Sums = field(init=False, default=(0.0,) * 5, repr=False)  # of prefill steps
    # (seconds of a decode step, number of the window) by share
    _decode_s: dict[float, tuple[float, int]] = field(init=False, default_factory=dict, repr=False)
    _wished: Split | None = field(init=False, default=None, repr=False)
    _agreed: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        for name in ("window_s", "grid", "lowest"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("window_finished", "windows_to_agree"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lowest > 0.5 or self.grid > 0.5:
            raise ValueError("lowest and grid must be at most 0.5: two lanes share one device")
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self._window = Window(0.0)

    def observe(self, event: Event) -> None:
        window = self._window
        if isinstance(event, Arrived):
            window.prompts += [event.num_prompt] * event.n
            window.ttft_s = min(window.ttft_s, event.slo.ttft_s or math.inf)
            window.tpot_s = min(window.tpot_s, event.slo.tpot_s or math.inf)
        elif isinstance(event, Finished):
            window.num_finished += 1

    def decide(self, view: View) -> Decision:
        holders = {holder.name: holder for holder in view.holders}
        assert set(holders) == {PREFILL, DECODE}, "this policy splits a device between two lanes"
        self._hear(holders)
        here = fitted(self._split or (holders[PREFILL].cap, holders[DECODE].cap), view.supply)
        why = ""
        window = self._window
        is_over = view.now - window.began_at >= self.window_s
        if is_over or window.num_finished >= self.window_finished:
            there = self._review(view, here, holders)
            if there != here:
                why = f"split {here[0]:.0%}/{here[1]:.0%} -> {there[0]:.0%}/{there[1]:.0%}"
            here, self._split = there, there
            self._window = Window(view.now)
        return Decision({PREFILL: here[0], DECODE: here[1]}, why)

    def _hear(self, holders: Mapping[str, Holder]) -> None:
        window = self._window
        for cap, amount, seconds, times in holders[PREFILL].uses:
            window.prefill.append((amount / (1000 * cap), seconds, times))
        for cap, _, seconds, times in holders[DECODE].uses:
            of_share = window.decode.setdefault(round(cap, 3), [0.0, 0.0])
            of_share[0] += seconds * times
            of_share[1] += times

    def _review(self, view: View, here: Split, holders: Mapping[str, Holder]) -> Split:
        """Where to go at the end of a window."""
        self._learn()
        window = self._window
        ttft_s = self.ttft_s or window.ttft_s
        tpot_s = self.tpot_s or window.tpot_s
        is_promised = math.isfinite(ttft_s) or math.isfinite(tpot_s)
        if not (window.prompts and self._sums[0] and self._decode_s and is_promised):
            return self._wish(None, here)
        outlook = Outlook(
            prefill_line_of(self._sums),
            decode_line_of(self._decode_s),
            window.prompts,
            max(view.now - window.began_at, 1e-9),
            (ttft_s, tpot_s),
            any(share > here[1] + 1e-6 for share in window.decode),
        )
        choices = self._choices(view, holders)
        best = max(choices, key=outlook.slack)
        if best == here or outlook.slack(best) - outlook.slack(here) <= self.least_gain:
            return self._wish(None, here)
        return self._wish(self._towards(here, best, choices), here)

    def _learn(self) -> None:
        """Take in what the window measured, and let go of what is old."""
        window, self._number = self._window, self._number + 1
        sums = [each / 2 for each in self._sums]
        for u, seconds, times in window.prefill:
            for place, value in enumerate((1.0, u, u * u, seconds, u * seconds)):
                sums[place] += times * value
        self._sums = tuple(sums)
        for share, (seconds, steps) in window.decode.items():
            self._decode_s[share] = (seconds / steps, self._number)
        for share in [s for s, (_, n) in self._decode_s.items() if n <= self._number - MEMORY]:
            del self._decode_s[share]

    def _wish(self, there: Split | None, here: Split) -> Split:
        """`there` once enough windows in a row wanted it, else `here`."""
        self._agreed = self._agreed + 1 if there is not None and there == self._wished else 1
        self._wished = there
        if there is None or self._agreed < self.windows_to_agree:
            return here
        self._wished, self._agreed = None, 0
        return there

    def _choices(self, view: View, holders: Mapping[str, Holder]) -> list[Split]:
        least_x = max(self.lowest, holders[PREFILL].floor)
        least_y = max(self.lowest, holders[DECODE].floor)
        total = min(1.0, view.supply)
        steps = int((total - least_x - least_y) / self.grid + 1e-6)
        found = [
            (round(least_x + self.grid * step, 6), round(total - least_x - self.grid * step, 6))
            for step in range(steps + 1)
        ]
        if self.may_overlap and view.supply >= 2:
            found.append((1.0, 1.0))
        return found

    def _towards(self, here: Split, best: Split, choices: Sequence[Split]) -> Split:
        """The choice nearest to `best` that is at most one step away."""
        at, goal = part(here), part(best)
        near = [c for c in choices if c != here and abs(part(c) - at) <= self.grid + 1e-6]
        if best in near:
            return best
        return min(near, key=lambda choice: abs(part(choice) - goal), default=here)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a window lets expect of every split. `promised`: TTFT and TPOT, infinite where there is none.

    `lends`: decode steps have all cores while no prompt is there.
    """

    prefill: Line
    decode: Line
    prompts: Sequence[int]
    seconds: float
    promised: tuple[float, float]
    lends: bool

    def slack(self, split: Split) -> float:
        x, y = part(split), 1.0 - part(split) if split == (1.0, 1.0) else split[1]
        ttft_s, tpot_s = self.promised
        each = [self.prefill[0] + self.prefill[1] * tokens / (1000 * x) for tokens in self.prompts]
        rate = len(each) / self.seconds
        mean_s = sum(each) / len(each)
        load = rate * mean_s
        first = later = math.inf
        if math.isfinite(ttft_s):
            if load >= 1:
                return HOPELESS * load
            square = sum(seconds * seconds for seconds in each) / len(each)
            first = (ttft_s - rate * square / (2 * (1 - load)) - mean_s) / ttft_s
        if math.isfinite(tpot_s):
            busy = min(1.0, load) if self.lends else 1.0
            gap_s = busy * self._step_s(y) + (1 - busy) * self._step_s(1.0)
            later = (tpot_s - gap_s) / tpot_s
        return min(first, later)

    def _step_s(self, share: float) -> float:
        return self.decode[0] + self.decode[1] / share


def part(split: Split) -> float:
    """The prefill lane's part of the cores when both lanes run."""
    return split[0] / max(1.0, split[0] + split[1])


def fitted(split: Split, supply: float) -> Split:
    """The same split, cut where it is too much."""
    scale = min(1.0, supply / sum(split))
    return split[0] * scale, split[1] * scale


def prefill_line_of(sums: Sums) -> Line:
    """(a, b) of seconds = a + b u, neither negative, by least squares."""
    num, u, square, seconds, product = sums
    spread = square - u * u / num
    if spread < 1e-9 * square:
        return 0.0, seconds / u
    slope = (product - u * seconds / num) / spread
    slope = min(max(slope, 0.0), seconds / u)
    return (seconds - slope * u) / num, slope


def line_of(known: Mapping[float, tuple[float, int]]) -> Line:
    """(a, b) of a + b / x, neither negative, by least squares; all of it b where one share was seen."""
    points = [(1 / share, seconds) for share, (seconds, _) in known.items()]
    mean_u = sum(u for u, _ in points) / len(points)
    mean_s = sum(s for _, s in points) / len(points)
    spread = sum((u - mean_u) ** 2 for u, _ in points)
    if spread < 1e-9:
        return 0.0, mean_s / mean_u
    slope = sum((u - mean_u) * (s - mean_s) for u, s in points) / spread
    slope = min(max(slope, 0.0), mean_s / mean_u)
    return mean_s - slope * mean_u, slope


def decode_line_of(known: Mapping[float, tuple[float, int]]) -> Line:
    """`line_of`, but with one share at hand a decode step is as long with any other."""
    if len(known) > 1:
        return line_of(known)
    ((share, (seconds, _)),) = known.items()
    return (seconds, 0.0) if share >= FLAT else (seconds * share / FLAT, 0.0)
