"""Fits against scipy and known truths, and what is drawn from a fit against the trace, within the promised bounds.

Always: a slice of Azure's trace that is kept here, and traces drawn from known processes. With the published data: the
whole Azure conversation trace and ServeGen's clients.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import BadConfig, BadTrace, MissingExtra
from penstock.traffic import open_trace
from penstock.traffic.arrivals import Gamma, Law, OnOff, Poisson, Renewal, Replay
from penstock.traffic.burst_model import fit_burstgpt
from penstock.traffic.fidelity import compare, fidelity
from penstock.traffic.fit import Gaps, fit_arrivals, gamma_shapes, spread_seconds, weibull_shapes
from penstock.traffic.lengths import Lognormal
from penstock.traffic.rows import Row
from penstock.traffic.sample import Sample
from penstock.traffic.servegen import ServeGen
from penstock.traffic.statistics import counts_in_bins, dispersion, ks_distance

AZURE = Path(__file__).parents[2] / "data" / "azure_2023_conv_200.csv"
LENGTHS = Lognormal(prompt_median=800.0, output_median=120.0, correlation=0.3)


def drawn(process, end_s, seed=0) -> Sample:
    at = process.until(end_s, seed)
    pairs = LENGTHS.first(len(at), seed).tolist()
    rows = (Row(at_s, *pair) for at_s, pair in zip(at.tolist(), pairs, strict=True))
    return Sample.of_rows(rows, end_s=end_s)


def gaps_of(*windows) -> Gaps:
    nums = np.array([len(window) for window in windows])
    starts = np.concatenate(([0], np.cumsum(nums)[:-1]))
    return Gaps(np.concatenate(windows), starts, nums)


def test_shapes_are_scipys_most_likely_ones():
    from scipy import stats

    rng = np.random.default_rng(1)
    windows = [rng.gamma(0.3, 2.0, 400), rng.weibull(0.6, 50) * 7, rng.gamma(5.0, 0.1, 30)]
    gaps = gaps_of(*windows)
    gamma = [stats.gamma.fit(window, floc=0)[0] for window in windows]
    weibull = [stats.weibull_min.fit(window, floc=0)[0] for window in windows]
    assert gamma_shapes(gaps) == pytest.approx(gamma, rel=1e-3)
    assert weibull_shapes(gaps) == pytest.approx(weibull, rel=1e-3)


@pytest.mark.parametrize("method", ["mle", "moments"])
@pytest.mark.parametrize("family", ["gamma", "weibull"])
def test_a_fit_finds_the_law_of_each_window(family, method):
    laws = tuple(
        Law(rate_per_s=r, shape=k, family=family) for r, k in ((20.0, 0.4), (40.0, 1.5), (0.0, 1.0))
    )
    at = Renewal(window_s=600.0, laws=laws, counts="exact").until(1_800.0, 3)
    found = fit_arrivals(at, window_s=600.0, family=family, method=method)
    assert len(found.laws) == 2  # nothing tells that the third is there
    for law, wanted in zip(found.laws, laws, strict=False):
        assert law.rate_per_s == pytest.approx(wanted.rate_per_s, rel=1e-3)
        assert law.shape == pytest.approx(wanted.shape, rel=0.1), method


def test_the_likelier_family_is_taken_window_by_window():
    laws = (
        Law(rate_per_s=20.0, shape=0.3, family="gamma"),
        Law(rate_per_s=20.0, shape=0.3, family="weibull"),
    )
    at = Renewal(window_s=600.0, laws=laws, counts="exact").until(1_200.0, 3)
    found = fit_arrivals(at, window_s=600.0, family="best")
    assert [law.family for law in found.laws] == ["gamma", "weibull"]


def test_windows_with_few_gaps_take_the_median_shape():
    busy = [
        at_s + 60 * i for i in range(3) for at_s in Gamma(rate_per_s=4.0, cv=3.0).until(60.0, i)
    ]
    found = fit_arrivals([*busy, 185.0, 186.0, 187.0], family="gamma")
    shapes = [law.shape for law in found.laws]
    assert shapes[3] == pytest.approx(np.median(shapes[:3]))
    assert [law.shape for law in fit_arrivals([1.0, 2.5]).laws] == [1.0]


def test_a_cut_last_window_has_the_rate_of_what_was_seen():
    at = [*np.arange(0.5, 60.0, 0.5), *np.arange(60.0, 105.5, 0.25)]
    rates = [law.rate_per_s for law in fit_arrivals(at, counts="exact").laws]
    assert rates == pytest.approx([119 / 60, 182 / 45.25])
    rates = [law.rate_per_s for law in fit_arrivals([*at[:119], 60.5, 61.0], counts="exact").laws]
    assert rates == pytest.approx([119 / 60, 121 / 61])


def test_chance_is_not_counted_twice():
    """Equal rates in all windows: what varies between windows is chance alone, and drawing must not add to it."""
    for process, least, most in (
        (Poisson(rate_per_s=2.0), 0.0, 0.5),
        (Gamma(rate_per_s=2.0, cv=3.0), 0.0, 0.5),
        (OnOff(on_rate_per_s=20.0, mean_on_s=600.0, mean_off_s=600.0), 0.95, 1.01),
    ):
        at = process.until(9_000.0, 0)
        rates = [law.rate_per_s for law in fit_arrivals(at).laws]
        share = np.std(rates) / np.std(counts_in_bins(at, 60.0) / 60.0)
        assert least <= share <= most, process.kind


def test_whole_seconds_are_spread_and_their_counts_kept():
    stamps = np.floor(Poisson(rate_per_s=6.0).until(3_000.0, 1))
    spread = spread_seconds(stamps)
    assert (counts_in_bins(spread, 1.0) == counts_in_bins(stamps, 1.0)).all()
    found = fit_arrivals(stamps, family="gamma")
    assert np.median([law.cv for law in found.laws]) == pytest.approx(1.0, abs=0.05)
    fine = np.array([0.5, 0.5, 2.0])
    assert spread_seconds(fine).tolist() == fine.tolist()


def test_batches_are_fitted_by_moments():
    """Ten at one instant every three seconds, as Mooncake stamps them: a gap of zero has no likelihood."""
    at = np.repeat(np.arange(0.0, 600.0, 3.0) + 0.25, 10)
    law = fit_arrivals(at, window_s=600.0).laws[0]
    assert law.family == "gamma" and law.cv == pytest.approx(3.0, rel=0.02)


def test_counts_too_regular_for_chance_are_kept():
    """Ten every three seconds is 200 a minute, always; drawn with these gaps it would be 200 +- 42."""
    at = np.repeat(np.arange(0.0, 600.0, 3.0) + 0.25, 10)
    assert fit_arrivals(at).counts == "exact"
    assert fit_arrivals(at, counts="renewal").counts == "renewal"
    for seed in range(5):
        assert fit_arrivals(Gamma(rate_per_s=5.0).until(3_000.0, seed)).counts == "renewal"


def test_bad_asks_are_refused(monkeypatch):
    with pytest.raises(BadTrace, match="no arrivals"):
        fit_arrivals([])
    with pytest.raises(BadConfig, match="'pareto'"):
        fit_arrivals([1.0], family="pareto")  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "scipy.special", None)
    at = Poisson(rate_per_s=5.0).until(60.0, 0)
    with pytest.raises(MissingExtra, match="scipy"):
        fit_arrivals(at, family="gamma")
    assert fit_arrivals(at, family="gamma", method="moments").laws


def test_replay_is_exact():
    trace = [at_s for at_s, _ in open_trace(AZURE)]
    assert list(Replay(at_s=tuple(trace)).instants(0)) == trace


def test_the_slice_of_azure():
    """200 requests in a minute: windows of 15 s, and what is drawn is taken together, for one draw is as short."""
    traced = Sample.of_trace(open_trace(AZURE))
    model = fit_burstgpt(traced, window_s=15.0)
    rows = [list(Sample.of_rows(model.rows(s), end_s=traced.end_s).pairs) for s in range(40)]
    pairs = np.array([pair for each in rows for pair in each])
    for side in (0, 1):
        assert ks_distance(traced.pairs[:, side], pairs[:, side]) <= 0.05
    rate, dispersion_1_s, dispersion_60_s, *_ = fidelity(traced, model, seeds=range(40)).figures
    assert rate.is_met and dispersion_1_s.is_met
    assert dispersion_60_s.bound is None  # one bin tells no dispersion


MINUTES = Renewal(
    window_s=60.0,
    laws=tuple(Law(rate_per_s=4.0 + 3 * (i % 3), shape=0.5) for i in range(60)),
    counts="exact",
)
SWINGS = OnOff(on_rate_per_s=12.0, off_rate_per_s=2.0, mean_on_s=150.0, mean_off_s=150.0)


@pytest.mark.parametrize(
    ("process", "family"),
    [(MINUTES, "gamma"), (MINUTES, "best"), (SWINGS, "weibull"), (SWINGS, "best")],
)
def test_known_processes_are_met_within_the_bounds(process, family):
    traced = drawn(process, 3_600.0)
    found = fidelity(traced, fit_burstgpt(traced, family=family))
    assert found.is_met, str(found)
    assert [figure.name for figure in found.figures if figure.bound is not None] == [
        "rate (1/s)",
        "dispersion at 1 s",
        "dispersion at 60 s",
        "KS of prompt lengths",
        "KS of output lengths",
    ]


def test_a_poisson_stand_in_misses_what_bursts_do():
    """The table can fail: equal rate and lengths, other arrivals."""
    traced = drawn(OnOff(on_rate_per_s=12.0, mean_on_s=10.0, mean_off_s=20.0), 3_600.0)
    plain = [drawn(Poisson(rate_per_s=traced.mean_rate_per_s), 3_600.0, seed) for seed in range(3)]
    found = compare(traced, plain)
    missed = [figure.name for figure in found.figures if not figure.is_met]
    assert missed == ["dispersion at 1 s", "dispersion at 60 s"]
    assert "MISSED" in str(found) and not found.is_met
    assert all(isinstance(line["name"], str) for line in found.table())


def test_samples_need_instants():
    with pytest.raises(BadTrace, match="without arrival times"):
        Sample.of_rows([Row(None, 1, 1)])
    with pytest.raises(BadTrace, match="no requests"):
        Sample.of_rows([])
    with pytest.raises(BadTrace, match="wait for answers"):
        Sample.of_trace([(0.0, object())])


@pytest.mark.parametrize("family", ["gamma", "weibull", "best"])
def test_the_whole_azure_trace(penstock_data, family):
    path = penstock_data / "traces" / "azure_2023_conv.csv"
    traced = Sample.of_trace(open_trace(path))
    assert dispersion(traced.at_s, 60.0) == pytest.approx(16.4, abs=0.1)
    found = fidelity(traced, fit_burstgpt(traced, family=family))
    assert found.is_met, str(found)
    assert list(Replay(at_s=tuple(traced.at_s.tolist())).instants(0)) == traced.at_s.tolist()


def test_the_whole_mooncake_trace(penstock_data):
    """Stamped in batches every three seconds: counts are kept."""
    traced = Sample.of_trace(open_trace(penstock_data / "traces" / "mooncake_conversation.jsonl"))
    found = fidelity(traced, fit_burstgpt(traced))
    assert found.is_met, str(found)


@pytest.mark.parametrize("model", ["language_m-large", "reason_deepseek-r1"])
def test_six_hours_of_servegen(penstock_data, model):
    folder = penstock_data / "traces" / "servegen" / model
    end_s = 6 * 3600.0
    rows = ServeGen(folder=folder, start_hour=9.0, duration_s=end_s).open().rows(0)
    traced = Sample.of_rows(rows, end_s=end_s)
    found = fidelity(traced, fit_burstgpt(traced), seeds=(0, 1, 2))
    assert found.is_met, str(found)
