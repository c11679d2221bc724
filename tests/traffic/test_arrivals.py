"""Arrival processes against their closed forms and against scipy's distributions."""

from __future__ import annotations

import hashlib
import itertools
import math
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import BadConfig
from penstock.traffic.arrivals import (
    KINDS,
    Diurnal,
    Gamma,
    Law,
    NegativeBinomial,
    OnOff,
    Poisson,
    Renewal,
    Replay,
    Scaled,
    Weibull,
    Window,
    Windows,
    arrivals_of,
    at_rate,
    mean_rate_of,
    table_of_arrivals,
)
from penstock.traffic.process import generator
from penstock.traffic.renewal import cv_of_shape, first_wait, in_window, shape_of_cv
from penstock.traffic.statistics import counts_in_bins, dispersion, gap_cv

SEEDS = range(5)
BURSTY = Law(rate_per_s=4.0, shape=0.2)
CALM = Law(rate_per_s=1.0, shape=0.5, family="weibull")
ALL = (
    Replay(at_s=(0.0, 0.25, 0.25, 7.0)),
    Poisson(rate_per_s=5.0),
    Gamma(rate_per_s=5.0, cv=3.0),
    Weibull(rate_per_s=5.0, cv=3.0),
    Renewal(window_s=60.0, laws=(BURSTY, CALM), is_repeated=True),
    Renewal(window_s=60.0, laws=(BURSTY, CALM), rest=CALM),
    NegativeBinomial(rate_per_s=5.0, dispersion=20.0),
    OnOff(on_rate_per_s=10.0, mean_on_s=5.0, mean_off_s=10.0),
    Diurnal(inner=Gamma(rate_per_s=5.0), period_s=600.0, peak_at_s=100.0),
    Windows(
        windows=(
            Window(duration_s=60.0, arrivals=Poisson(rate_per_s=4.0)),
            Window(duration_s=30.0, arrivals=Scaled(inner=Gamma(rate_per_s=1.0), speed=3.0)),
        ),
        is_repeated=True,
    ),
    Scaled(inner=Poisson(rate_per_s=5.0), speed=2.0),
)


def mean_over_seeds(process, of, end_s=20_000.0):
    return float(np.mean([of(process.until(end_s, seed)) for seed in SEEDS]))


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.kind)
def test_same_seed_same_instants_and_they_never_fall(process):
    first = list(itertools.islice(process.instants(3), 40_000))
    assert first == list(itertools.islice(process.instants(3), 40_000))
    assert first == sorted(first) and first[0] >= 0
    if not isinstance(process, Replay):
        assert len(first) == 40_000
        assert first != list(itertools.islice(process.instants(4), 40_000))
        early = [at_s for at_s in first if at_s < 500]
        assert process.until(500.0, 3).tolist() == early


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.kind)
def test_tables_read_back_to_an_equal_process(process):
    table = table_of_arrivals(process)
    assert table["kind"] == process.kind
    assert arrivals_of(table) == process


@pytest.mark.parametrize(
    "process",
    [each for each in ALL[1:] if getattr(each, "rest", None) is None],
    ids=lambda each: each.kind,
)
def test_mean_rate_is_the_stated_one(process):
    found = mean_over_seeds(process, len, 18_000.0) / 18_000.0
    # The count varies by its index of dispersion; four standard errors of the mean of the seeds.
    spread = dispersion(process.until(18_000.0, 0), 90.0) / (found * 18_000.0 * len(SEEDS))
    assert found == pytest.approx(process.mean_rate_per_s, rel=4 * math.sqrt(spread) + 0.001)


def test_all_kinds_are_tried_here():
    assert {type(process) for process in ALL} == set(KINDS.values())


def test_poisson_counts_have_dispersion_one_at_every_width():
    for width_s in (0.5, 5.0, 60.0):
        found = mean_over_seeds(Poisson(rate_per_s=5.0), lambda at, w=width_s: dispersion(at, w))
        assert found == pytest.approx(1.0, abs=0.07), width_s


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", [Gamma, Weibull])
def test_gaps_have_the_asked_coefficient_of_variation(kind, cv):
    found = mean_over_seeds(kind(rate_per_s=5.0, cv=cv), gap_cv)
    assert found == pytest.approx(cv, rel=0.05)


def test_gaps_follow_scipys_laws():
    from scipy import stats

    for process, law in (
        (Poisson(rate_per_s=2.0), stats.expon(scale=0.5)),
        (Gamma(rate_per_s=2.0, cv=2.0), stats.gamma(0.25, scale=2.0)),
        (
            Weibull(rate_per_s=2.0, cv=2.0),
            stats.weibull_min(
                shape_of_cv("weibull", 2.0), scale=Law.of_cv("weibull", 2.0, 2.0).scale
            ),
        ),
    ):
        gaps = np.diff(process.until(2_000.0, 1))
        gaps = gaps[
            gaps > 1e-6
        ]  # instants are whole nanoseconds: the smallest gaps are not continuous
        assert (
            stats.kstest(
                gaps, lambda x, law=law: (law.cdf(x) - law.cdf(1e-6)) / law.sf(1e-6)
            ).pvalue
            > 0.001
        )


@pytest.mark.parametrize("law", [BURSTY, Law(rate_per_s=4.0, shape=0.35, family="weibull"), CALM])
def test_a_window_begins_in_equilibrium(law):
    """Begun with a whole gap, a bursty window would hold (cv^2 - 1)/2 arrivals too many."""
    rng = generator(0, "test")
    counts = [len(in_window(rng, law, 5.0, "renewal")) for _ in range(8_000)]
    error = np.std(counts) / math.sqrt(len(counts))
    assert abs(np.mean(counts) - law.rate_per_s * 5.0) < 4 * error
    waits = [first_wait(rng, law.family, law.shape) for _ in range(8_000)]
    mean = (1 + law.cv**2) / 2  # of the residual of a gap of mean 1
    assert np.mean(waits) == pytest.approx(mean, abs=4 * np.std(waits) / math.sqrt(len(waits)))


def test_exact_windows_hold_their_counts_and_fractions_on_average():
    laws = (
        Law(rate_per_s=0.5, shape=0.2),
        Law(rate_per_s=0.0),
        Law(rate_per_s=0.02, family="weibull"),
    )
    process = Renewal(window_s=60.0, laws=laws, counts="exact")
    counts = np.array(
        [counts_in_bins(process.until(1e9, s), 60.0, end_s=180.0) for s in range(400)]
    )
    assert (counts[:, 0] == 30).all() and (counts[:, 1] == 0).all()
    assert set(counts[:, 2].tolist()) == {1, 2}
    assert counts[:, 2].mean() == pytest.approx(1.2, abs=0.08)


def test_negative_binomial_reaches_its_dispersion_and_law():
    from scipy import stats

    process = NegativeBinomial(rate_per_s=4.0, dispersion=8.0, bin_s=2.0)
    for width_s in (2.0, 10.0):
        found = mean_over_seeds(process, lambda at, w=width_s: dispersion(at, w))
        assert found == pytest.approx(8.0, rel=0.05), width_s
    counts = counts_in_bins(process.until(20_000.0, 0), 2.0, end_s=20_000.0)
    law = stats.nbinom(8.0 / 7.0, 1 / 8.0)
    seen = np.bincount(np.minimum(counts, 30), minlength=31)
    wanted = len(counts) * np.append(law.pmf(np.arange(30)), law.sf(29))
    assert stats.chisquare(seen, wanted).pvalue > 0.001


def test_on_off_has_its_closed_dispersion():
    process = OnOff(on_rate_per_s=10.0, off_rate_per_s=1.0, mean_on_s=4.0, mean_off_s=8.0)
    assert process.mean_rate_per_s == pytest.approx(4.0)
    for width_s in (1.0, 10.0, 60.0):
        found = mean_over_seeds(process, lambda at, w=width_s: dispersion(at, w))
        assert found == pytest.approx(process.dispersion_at(width_s), rel=0.08), width_s
    # Interrupted Poisson in the limit of long bins, by the textbook's other form.
    limit = 1 + 2 * (10 - 1) ** 2 * (1 / 4) * (1 / 8) / ((3 / 8) ** 3 * 4.0)
    assert process.dispersion_at(1e9) == pytest.approx(limit)


def test_diurnal_is_its_inner_process_on_another_clock():
    from scipy import stats

    process = Diurnal(
        inner=Poisson(rate_per_s=2.0), peak_to_mean=1.9, period_s=1_000.0, peak_at_s=250.0
    )
    at = process.until(10_000.0, 1)
    gaps = np.diff(process.elapsed(at))
    assert stats.kstest(gaps, stats.expon(scale=0.5).cdf).pvalue > 0.001
    by_phase = counts_in_bins(at % 1_000.0, 100.0, end_s=1_000.0) / 1_000.0
    assert by_phase.argmax() in (1, 2, 3) and by_phase.max() > 3.4
    assert by_phase[7] < 0.5  # half a period from the peak: 2 x (1 - 0.9) at its lowest
    plain = Diurnal(inner=Poisson(rate_per_s=2.0), peak_to_mean=1.0, period_s=1_000.0)
    assert plain.until(500.0, 1) == pytest.approx(Poisson(rate_per_s=2.0).until(500.0, 1), abs=1e-6)


def test_after_its_windows_a_renewal_process_goes_on_with_the_rest():
    process = Renewal(window_s=60.0, laws=(BURSTY,), rest=CALM, counts="exact")
    assert counts_in_bins(process.until(180.0, 0), 60.0, end_s=180.0).tolist() == [240, 60, 60]
    assert process.mean_rate_per_s == 1.0
    once = Renewal(window_s=60.0, laws=(BURSTY,), counts="exact")
    assert len(list(once.instants(0))) == 240


def test_windows_follow_each_other_and_are_cut():
    process = Windows(
        windows=(
            Window(duration_s=10.0, arrivals=Poisson(rate_per_s=50.0)),
            Window(duration_s=5.0, arrivals=Replay(at_s=(0.0, 4.0, 6.0))),
        )
    )
    at = list(process.instants(0))
    assert at[-2:] == [10.0, 14.0]
    assert sum(at_s < 10 for at_s in at) == pytest.approx(500, abs=90)
    assert len(at) == sum(at_s < 10 for at_s in at) + 2


def test_replay_is_exact():
    at = (0.1, 0.1 + 1e-12, 1 / 3, 1e9)
    assert tuple(Replay(at_s=at).instants(7)) == at
    assert Replay(at_s=(0.0, 1.0, 4.0)).mean_rate_per_s == 0.5


def test_scaling_divides_instants_and_at_rate_reaches_the_rate():
    slow, fast = Poisson(rate_per_s=3.0), Scaled(inner=Poisson(rate_per_s=3.0), speed=4.0)
    assert fast.until(25.0, 1) == pytest.approx(slow.until(100.0, 1) / 4.0, abs=1e-8)
    for process in ALL[1:]:
        assert mean_rate_of(at_rate(process, 7.0)) == pytest.approx(7.0)


def test_modelled_scaling_keeps_the_windows():
    process = Renewal(
        window_s=60.0, laws=(Law(rate_per_s=1.0), Law(rate_per_s=0.0)), counts="exact"
    )
    doubled = process.times(2.0)
    assert counts_in_bins(doubled.until(1e9, 0), 60.0, end_s=120.0).tolist() == [120, 0]


def test_laws_agree_with_scipy():
    from scipy import stats

    for shape in (0.15, 0.5, 1.0, 3.0):
        weibull = stats.weibull_min(shape, scale=2.0)
        law = Law.of_scale("weibull", shape, 2.0)
        assert 1 / law.rate_per_s == pytest.approx(weibull.mean())
        assert law.cv == pytest.approx(weibull.std() / weibull.mean())
        assert law.scale == pytest.approx(2.0)
        gamma = stats.gamma(shape, scale=2.0)
        law = Law.of_scale("gamma", shape, 2.0)
        assert 1 / law.rate_per_s == pytest.approx(gamma.mean())
        assert law.cv == pytest.approx(gamma.std() / gamma.mean())
        assert law.scale == pytest.approx(2.0)


@settings(deadline=None)
@given(cv=st.floats(0.05, 20.0), family=st.sampled_from(["gamma", "weibull"]))
def test_shape_of_cv_inverts_cv_of_shape(cv, family):
    assert cv_of_shape(family, shape_of_cv(family, cv)) == pytest.approx(cv, rel=1e-6)


def test_instants_are_the_same_on_every_machine():
    """Pinned: a change of numpy or of the streams that moves arrivals must be seen."""
    told = ",".join(
        f"{at_s:.9f}"
        for process in (
            Poisson(rate_per_s=5.0),
            Gamma(rate_per_s=5.0, cv=3.0),
            Weibull(rate_per_s=5.0),
        )
        for at_s in itertools.islice(process.instants(0), 1_000)
    )
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "ec53c93ba4d1ae26"


def test_a_file_says_it():
    table = tomllib.loads(
        """
        [arrivals]
        kind = "diurnal"
        peak_to_mean = 1.5
        inner = { kind = "windows", windows = [
            { duration_s = 60, arrivals = { kind = "poisson", rate_per_s = 2 } },
            { duration_s = 60, arrivals = { kind = "renewal", window_s = 60, laws = [{ rate_per_s = 1 }] } },
        ], is_repeated = true }
        """
    )["arrivals"]
    process = arrivals_of(table)
    assert isinstance(process, Diurnal) and process.mean_rate_per_s == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "poison", "rate_per_s": 1.0}, "'poison'"),
        ({"rate_per_s": 1.0}, "arrivals.kind is None"),
        ({"kind": "poisson"}, "rate_per_s"),
        ({"kind": "poisson", "rate_per_s": -1.0}, "must be positive"),
        ({"kind": "gamma", "rate_per_s": 1.0, "cvs": 2.0}, "'cv'"),
        ({"kind": "weibull", "rate_per_s": 1.0, "cv": 1e9}, "no Weibull shape"),
        ({"kind": "negative_binomial", "rate_per_s": 1.0, "dispersion": 1.0}, "above 1"),
        ({"kind": "replay", "at_s": [2.0, 1.0]}, "must not fall"),
        ({"kind": "diurnal", "inner": {"kind": "gamma"}}, "arrivals.inner"),
        ({"kind": "diurnal", "inner": "poisson"}, "arrivals.inner"),
        (
            {"kind": "windows", "windows": [{"duration_s": 1, "arrivals": {"kind": "x"}}]},
            "windows[0].arrivals",
        ),
        ({"kind": "renewal", "window_s": 60, "laws": [{"rate_per_s": 0}]}, "a window with a rate"),
    ],
)
def test_what_is_wrong_is_named(table, said):
    with pytest.raises(BadConfig) as error:
        arrivals_of(table)
    assert said in str(error.value)
