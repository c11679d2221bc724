"""Fitting: instants in, a renewal process with a law per window out; pairs of lengths in, a law of lengths out.

Theory. In each window the rate is the count over the window. The shape is found from the gaps inside the window:
- "mle" (scipy): Gamma: log k - digamma(k) = log mean - mean log. Weibull: sum x^k log x / sum x^k - 1/k = mean log x.
  Both have one root; Newton on all windows at once.
- "moments": the shape whose coefficient of variation is the gaps' own. Needs numpy only.
- family="best" takes, window by window, the family of the higher likelihood (as ServeGen does).
Windows with fewer than MIN_GAPS gaps tell no shape: they take the median of those that do (1, Poisson, if none does).

Counts seen in windows vary twice: with the rate, and by chance at a given rate. A process that draws its counts again
(counts="renewal") would add the chance a second time. So its rates are drawn towards their mean by the factor
sqrt(1 - chance/total), both variances of counts per window, the first found by drawing; then what is generated varies
as the trace does. With chance well above total (arrivals more regular from window to window than inside one, as where
they are stamped in batches) no such process fits, and the counts are kept ("exact") unless the caller says otherwise.

Rules. Times stamped in whole seconds are first spread evenly over their second (a call stamped 17 came somewhere in
[17, 18)): that leaves the counts per second as they are and gives gaps a density. Gaps of zero that remain have no
likelihood under a shape below 1: they count as half the smallest positive gap, and a window with more than MANY_TIES of
them (arrivals stamped in batches) takes its shape from moments instead, of Gamma when there is a choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from penstock.core.errors import BadConfig, BadTrace, missing_extra
from penstock.traffic.arrivals import Renewal
from penstock.traffic.process import Floats, generator
from penstock.traffic.renewal import Counts, Family, Law, shape_of_cv
from penstock.traffic.statistics import counts_in_bins

Method = Literal["mle", "moments"]
Choice = Literal["gamma", "weibull", "best"]
MIN_GAPS = 8
MANY_TIES = 0.1
SHAPES = (0.02, 50.0)  # fits are kept within
NEWTON_STEPS = 60
TOO_REGULAR = 3.0  # chance over total; 1 for windows of one rate, up to 2 where shapes of short windows are noisy
DRAWS, MOST_DRAWS = 4, 200  # of the process, to see how counts vary by chance


@dataclass(frozen=True, slots=True)
class Gaps:
    """The gaps of many windows in one array. `starts` are their first places in `values`, empty windows left out."""

    values: Floats
    starts: NDArray[np.int64]
    nums: NDArray[np.int64]

    def means(self, values: Floats) -> Floats:
        """Mean per window of an array as long as `values`."""
        return np.asarray(np.add.reduceat(values, self.starts) / self.nums)

    def are_tied(self) -> NDArray[np.bool_]:
        """Per window, whether too many gaps are zero for a likelihood to mean anything."""
        return self.means((self.values == 0).astype(np.float64)) > MANY_TIES

    def positive(self) -> Gaps:
        """Gaps of zero made half the smallest other one."""
        least = self.values[self.values > 0]
        floor = least.min() / 2 if len(least) else 1.0
        return Gaps(np.maximum(self.values, floor), self.starts, self.nums)


def spread_seconds(instants: ArrayLike, seed: int = 0) -> Floats:
    """Sorted instants; spread over their second when all are whole seconds."""
    at = np.sort(np.asarray(instants, np.float64))
    if len(at) and (at == np.floor(at)).all():
        at = np.sort(at + generator(seed, "spread").random(len(at)))
    return at


def gaps_by_window(at: Floats, numbers: NDArray[np.int64]) -> tuple[Gaps, NDArray[np.int64]]:
    """The gaps between arrivals of one window, of windows with MIN_GAPS of them, and those windows' numbers."""
    is_inside = numbers[1:] == numbers[:-1]
    values, owners = np.diff(at)[is_inside], numbers[1:][is_inside]
    nums = np.bincount(owners) if len(owners) else np.empty(0, np.int64)
    fitted = np.flatnonzero(nums >= MIN_GAPS)
    values = values[np.isin(owners, fitted)]
    starts = np.concatenate(([0], np.cumsum(nums[fitted])[:-1])).astype(np.int64)
    return Gaps(values, starts if len(fitted) else np.empty(0, np.int64), nums[fitted]), fitted


def gamma_shapes(gaps: Gaps) -> Floats:
    """Maximum-likelihood Gamma shapes."""
    try:
        from scipy.special import digamma, polygamma  # type: ignore[import-untyped]
    except ImportError:
        raise missing_extra("scipy", "lab") from None
    spread = np.log(gaps.means(gaps.values)) - gaps.means(np.log(gaps.values))
    spread = np.maximum(spread, 1e-9)
    shape = (3 - spread + np.sqrt((spread - 3) ** 2 + 24 * spread)) / (12 * spread)
    for _ in range(NEWTON_STEPS):
        value = np.log(shape) - digamma(shape) - spread
        step = value / (1 / shape - polygamma(1, shape))
        shape = np.maximum(shape - step, shape / 2)
    return np.asarray(np.clip(shape, *SHAPES))


def weibull_shapes(gaps: Gaps) -> Floats:
    """Maximum-likelihood Weibull shapes."""
    unit = gaps.values / np.repeat(gaps.means(gaps.values), gaps.nums)
    logs = np.log(unit)
    mean_log = gaps.means(logs)
    shape = np.ones(len(gaps.nums))
    for _ in range(NEWTON_STEPS):
        power = unit ** np.repeat(shape, gaps.nums)
        total, first = gaps.means(power), gaps.means(power * logs)
        second = gaps.means(power * logs**2)
        value = first / total - 1 / shape - mean_log
        slope = second / total - (first / total) ** 2 + 1 / shape**2
        shape = np.clip(shape - value / slope, np.maximum(shape / 2, SHAPES[0]), shape * 2)
    return np.asarray(np.clip(shape, *SHAPES))


def shapes_of_moments(gaps: Gaps, family: Family) -> Floats:
    """Shapes whose coefficient of variation is that of the gaps."""
    mean = gaps.means(gaps.values)
    spread = gaps.values - np.repeat(mean, gaps.nums)
    variance = gaps.means(spread**2) * gaps.nums / (gaps.nums - 1)
    cv = np.sqrt(variance) / np.where(mean > 0, mean, 1.0)
    if family == "gamma":
        return np.asarray(np.clip(1 / np.maximum(cv, 1e-6) ** 2, *SHAPES))
    found = [shape_of_cv("weibull", min(max(each, 0.03), 40.0)) for each in cv.tolist()]
    return np.asarray(np.clip(np.array(found), *SHAPES))


def log_likelihoods(gaps: Gaps, family: Family, shapes: Floats) -> Floats:
    """Mean log density per window, with the scale that is the most likely for the shape."""
    logs = gaps.means(np.log(gaps.values))
    if family == "gamma":
        log_scale = np.log(gaps.means(gaps.values) / shapes)
        log_norm = np.array([math.lgamma(shape) for shape in shapes.tolist()])
        return np.asarray((shapes - 1) * logs - shapes - shapes * log_scale - log_norm)
    mean = gaps.means(gaps.values)
    unit = gaps.values / np.repeat(mean, gaps.nums)
    log_power = shapes * np.log(mean) + np.log(gaps.means(unit ** np.repeat(shapes, gaps.nums)))
    return np.asarray(np.log(shapes) - log_power + (shapes - 1) * logs - 1)


def _shapes(gaps: Gaps, family: Family, method: Method) -> Floats:
    if not len(gaps.nums):
        return np.empty(0)
    is_tied = gaps.are_tied()
    if method == "moments" or is_tied.all():
        return shapes_of_moments(gaps, family)
    likely = gaps.positive()
    shapes = gamma_shapes(likely) if family == "gamma" else weibull_shapes(likely)
    return np.where(is_tied, shapes_of_moments(gaps, family), shapes) if is_tied.any() else shapes


def _families(gaps: Gaps, shapes: dict[Family, Floats]) -> list[Family]:
    """The likeliest of the families tried, window by window; the first where likelihood means nothing."""
    tried = list(shapes)
    if len(tried) == 1 or not len(gaps.nums):
        return tried[:1] * len(gaps.nums)
    likely = [log_likelihoods(gaps.positive(), each, shapes[each]) for each in tried]
    places = np.where(gaps.are_tied(), 0, np.argmax(likely, axis=0))
    return [tried[place] for place in places.tolist()]


def _laws(
    rates: Floats, fitted: NDArray[np.int64], shapes: Floats, families: list[Family]
) -> tuple[Law, ...]:
    """A law for every window, those without a shape of their own taking the median one."""
    is_common = families.count("gamma") * 2 >= len(families)
    family: Family = "gamma" if is_common else "weibull"
    own = [shape for shape, each in zip(shapes.tolist(), families, strict=True) if each == family]
    usual = float(np.median(own)) if own else 1.0
    laws = [Law(rate_per_s=rate, shape=usual, family=family) for rate in rates.tolist()]
    for window, shape, each in zip(fitted.tolist(), shapes.tolist(), families, strict=True):
        laws[window] = Law(rate_per_s=float(rates[window]), shape=shape, family=each)
    return tuple(laws)


def window_rates(at: Floats, numbers: NDArray[np.int64], window_s: float) -> Floats:
    """Arrivals a second in each window, the last one by the part of it that was seen."""
    counts = np.bincount(numbers)
    rates = counts / window_s
    seen_s = float(at[-1]) - float(numbers[-1]) * window_s
    if seen_s >= window_s / 2:
        rates[-1] = counts[-1] / seen_s
    elif len(counts) > 1:
        rates[-1] = counts[-2:].sum() / (window_s + seen_s)
    return rates


def fit_arrivals(
    instants: ArrayLike,
    *,
    window_s: float = 60.0,
    family: Choice = "best",
    method: Method = "mle",
    counts: Counts | None = None,
) -> Renewal:
    """A law per window of `window_s`, windows counted from 0.

    The last window is taken to end with the last arrival; cut to less than half, it has the rate of the last two.
    Raises BadTrace without arrivals, BadConfig for an unknown family or method, MissingExtra without scipy ("mle").
    """
    if family not in get_args(Choice) or method not in get_args(Method):
        raise BadConfig(f"no fit is named {family!r}, {method!r}", hint="see traffic/fit.py")
    at = spread_seconds(instants)
    if not len(at):
        raise BadTrace("there are no arrivals to fit")
    numbers = np.floor(at / window_s).astype(np.int64)
    gaps, fitted = gaps_by_window(at, numbers)
    tried: tuple[Family, ...] = ("gamma", "weibull") if family == "best" else (family,)
    shapes = {each: _shapes(gaps, each, method) for each in tried}
    families = _families(gaps, shapes)
    chosen = np.array([shapes[each][place] for place, each in enumerate(families)])
    rates = window_rates(at, numbers, window_s)
    laws = _laws(rates, fitted, chosen, families)
    if counts == "exact":
        return Renewal(window_s=window_s, laws=laws, counts=counts)
    return steadied(Renewal(window_s=window_s, laws=laws), may_keep_counts=counts is None)


def steadied(found: Renewal, *, may_keep_counts: bool, seed: int = 0) -> Renewal:
    """The process with its rates drawn towards their mean, so that chance is not counted twice; or its counts kept."""
    num = len(found.laws)
    rates = np.array([law.rate_per_s for law in found.laws])
    if num < 3 or not rates.any():
        return found
    repeats = max(DRAWS, MOST_DRAWS // num)
    end_s = num * found.window_s
    counts = [
        counts_in_bins(found.until(end_s, seed + i), found.window_s, end_s=end_s)
        for i in range(repeats)
    ]
    chance = float(np.var(counts, axis=0, ddof=1).mean())
    total = float((rates * found.window_s).var(ddof=1))
    if may_keep_counts and chance > TOO_REGULAR * total:
        return replace(found, counts="exact")
    factor = math.sqrt(max(0.0, 1 - chance / total)) if total > 0 else 1.0
    steady = (rates.mean() + factor * (rates - rates.mean())).tolist()
    laws = (replace(law, rate_per_s=rate) for law, rate in zip(found.laws, steady, strict=True))
    return replace(found, laws=tuple(laws))
