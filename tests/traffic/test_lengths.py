"""Laws of lengths against closed forms, scipy and the files they are read from."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import BadConfig, BadTrace
from penstock.traffic.lengths import (
    KINDS,
    Empirical,
    Fixed,
    Histogram,
    Lognormal,
    Zipf,
    lengths_of,
    table_of_lengths,
)
from penstock.traffic.lengths_fit import MOST_PAIRS, fit_lengths, zipf_exponent
from penstock.traffic.statistics import ks_distance

DATA = Path(__file__).parents[2] / "data"
AZURE = DATA / "azure_2023_conv_200.csv"
ALL = (
    Fixed(prompt=300, output=20),
    Lognormal(prompt_median=500.0, output_median=100.0, prompt_sigma=1.2, correlation=0.6),
    Zipf(),
    Histogram.of({10: 0.25, 700: 0.75}, {1: 1.0, 2: 1.0, 40: 2.0}),
    Empirical.of([(10, 1), (700, 40), (700, 41)]),
    Empirical(path=AZURE),
)


@pytest.mark.parametrize("lengths", ALL, ids=lambda lengths: lengths.kind)
def test_same_seed_same_lengths_of_at_least_one(lengths):
    drawn = list(itertools.islice(lengths.draws(1), 20_000))
    assert drawn == list(itertools.islice(lengths.draws(1), 20_000))
    assert drawn == [tuple(pair) for pair in lengths.first(20_000, 1).tolist()]
    assert all(type(prompt) is int and prompt >= 1 and output >= 1 for prompt, output in drawn)
    assert lengths_of(table_of_lengths(lengths)) == lengths


def test_all_kinds_are_tried_here():
    assert {type(lengths) for lengths in ALL} == set(KINDS.values())


def test_lognormal_has_its_medians_sigmas_and_correlation():
    drawn = np.log(ALL[1].first(100_000, 2))
    assert np.exp(np.median(drawn, axis=0)) == pytest.approx([500.0, 100.0], rel=0.02)
    assert drawn.std(axis=0) == pytest.approx([1.2, 1.0], rel=0.02)
    assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(0.6, abs=0.02)
    assert Lognormal(prompt_median=500.0, output_median=9.0, most=600).first(5_000, 1).max() == 600


def test_zipf_is_scipys_cut_law():
    from scipy import stats

    drawn = Zipf().first(50_000, 3)
    law = stats.zipfian(1.1, 1023)
    assert drawn.max() <= 1023
    for side in (0, 1):
        edges = [1, 2, 3, 5, 10, 30, 100, 300, 1024]
        seen = np.histogram(drawn[:, side], edges)[0]
        wanted = np.diff(law.cdf(np.array(edges) - 1)) * len(drawn)
        assert stats.chisquare(seen, wanted).pvalue > 0.001


def test_histograms_are_drawn_by_weight():
    drawn = ALL[3].first(40_000, 1)
    assert set(drawn[:, 0].tolist()) == {10, 700} and set(drawn[:, 1].tolist()) == {1, 2, 40}
    assert (drawn[:, 0] == 700).mean() == pytest.approx(0.75, abs=0.01)
    assert (drawn[:, 1] == 40).mean() == pytest.approx(0.5, abs=0.01)


def test_empirical_draws_pairs_that_exist():
    drawn = {tuple(pair) for pair in ALL[4].first(1_000, 1).tolist()}
    assert drawn == {(10, 1), (700, 40), (700, 41)}
    table = Empirical(path=AZURE).table()
    assert len(table) == 200 and table[1].tolist() == [396, 109]


@pytest.mark.parametrize(
    "header", ["TIMESTAMP,ContextTokens,GeneratedTokens", "x,num_prefill_tokens,num_decode_tokens"]
)
def test_length_files_are_read_by_column_names(tmp_path, header):
    path = tmp_path / "lengths.csv"
    path.write_text(f"{header}\nXXX,42,285\nXXX,0,3\nXXX,63,482\n")
    assert Empirical(path=path).table().tolist() == [[42, 285], [63, 482]]


def test_bad_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(BadTrace, match="no two columns"):
        Empirical(path=path).first(1, 0)
    (tmp_path / "words.csv").write_text("ContextTokens,GeneratedTokens\nmany,few\n")
    with pytest.raises(BadTrace, match="no integers"):
        Empirical(path=tmp_path / "words.csv").first(1, 0)
    (tmp_path / "none.csv").write_text("ContextTokens,GeneratedTokens\n0,0\n")
    with pytest.raises(BadTrace, match="no row"):
        Empirical(path=tmp_path / "none.csv").first(1, 0)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "normal"}, "'normal'"),
        ({"kind": "fixed", "prompt": 0, "output": 1}, "at least 1"),
        (
            {"kind": "lognormal", "prompt_median": 9.0, "output_median": 9.0, "correlation": 2.0},
            "-1 to 1",
        ),
        ({"kind": "empirical"}, "either pairs or a path"),
        ({"kind": "histogram", "prompt": {}, "output": {"1": 1.0}}, "prompt needs weights"),
        ({"kind": "zipf", "prompt_below": 1}, "below must be at least 2"),
    ],
)
def test_what_is_wrong_is_named(table, said):
    with pytest.raises(BadConfig) as error:
        lengths_of(table)
    assert said in str(error.value)


def test_fitted_laws_find_what_was_drawn():
    lognormal = fit_lengths(ALL[1].first(50_000, 1), kind="lognormal")
    assert lognormal.prompt_median == pytest.approx(500.0, rel=0.03)
    assert lognormal.correlation == pytest.approx(0.6, abs=0.02)
    drawn = Zipf(prompt_exponent=1.3, output_exponent=0.7).first(50_000, 1)
    assert zipf_exponent(drawn[:, 0], 1024) == pytest.approx(1.3, abs=0.02)
    assert zipf_exponent(drawn[:, 1], 1024) == pytest.approx(0.7, abs=0.02)
    fitted = fit_lengths(drawn, kind="zipf")
    assert ks_distance(fitted.first(50_000, 2)[:, 0], drawn[:, 0]) < 0.01


def test_large_traces_are_thinned_to_pairs_that_look_alike():
    pairs = ALL[1].first(3 * MOST_PAIRS, 1)
    kept = fit_lengths(pairs)
    assert len(kept.pairs) == MOST_PAIRS
    assert ks_distance(kept.table()[:, 0], pairs[:, 0]) < 0.02
    small = fit_lengths(pairs[:100])
    assert small.table().tolist() == pairs[:100].tolist()
