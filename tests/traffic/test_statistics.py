"""Statistics of workloads against scipy and hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.traffic.statistics import counts_in_bins, dispersion, gap_cv, ks_distance, quantiles

samples = st.lists(st.integers(0, 20), min_size=1, max_size=60)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scipy's p-value of equal samples
@settings(deadline=None)
@given(first=samples, second=samples)
def test_ks_distance_is_scipys(first, second):
    from scipy import stats

    assert ks_distance(first, second) == pytest.approx(
        stats.ks_2samp(first, second, method="asymp").statistic
    )


def test_counts_are_of_whole_bins():
    at = [0.0, 0.5, 1.0, 2.999, 3.0, 3.2]
    assert counts_in_bins(at, 1.0).tolist() == [2, 1, 1]
    assert counts_in_bins(at, 1.0, end_s=5.0).tolist() == [2, 1, 1, 2, 0]
    assert counts_in_bins(at, 1.0, start_s=1.0, end_s=3.0).tolist() == [1, 1]
    assert counts_in_bins([], 1.0).tolist() == []
    assert counts_in_bins([0.05], 0.1, end_s=0.3).tolist() == [1, 0, 0]  # 0.3 / 0.1 is below 3


def test_dispersion_by_hand():
    # Counts 4, 0, 2, 2: mean 2, variance 8/3.
    at = [0.1, 0.2, 0.3, 0.4, 2.1, 2.2, 3.1, 3.2]
    assert dispersion(at, 1.0, end_s=4.0) == pytest.approx(8 / 3 / 2)
    assert dispersion(np.arange(100.0), 10.0) == 0.0
    assert math.isnan(dispersion([1.0], 10.0)) and math.isnan(dispersion([], 1.0))


def test_gaps():
    assert gap_cv([0.0, 1.0, 2.0, 3.0]) == 0.0
    assert gap_cv([0.0, 1.0, 4.0]) == pytest.approx(math.sqrt(2) / 2)
    assert math.isnan(gap_cv([0.0, 1.0])) and math.isnan(gap_cv([1.0, 1.0, 1.0]))


def test_quantiles():
    assert quantiles(range(101)) == {0.5: 50.0, 0.9: 90.0, 0.99: 99.0}
    assert quantiles([]) == {}
