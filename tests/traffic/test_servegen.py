"""ServeGen's clients: files written here to its layout, and the published ones where they are at hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from penstock.core.config import build
from penstock.core.errors import BadConfig, BadTrace
from penstock.traffic.servegen import ServeGen, read_laws
from penstock.traffic.statistics import counts_in_bins, gap_cv


def client(folder: Path, number: int, windows, spans, stem="client"):
    lines = [",".join(map(str, (600 * i, *window))) for i, window in enumerate(windows)]
    (folder / f"{stem}-{number}-trace.csv").write_text("\n".join(lines) + "\n")
    told = {
        str(start): {"input_tokens": str(prompt), "output_tokens": str(output)}
        for start, (prompt, output) in spans.items()
    }
    (folder / f"{stem}-{number}-dataset.json").write_text(json.dumps(told))


SILENT = (0, 0, "", 0, 0)


@pytest.fixture
def folder(tmp_path):
    bursty = (
        0.5,
        3.0,
        "Weibull",
        0.4,
        9.9,
    )  # the scale disagrees with the rate and is not looked at
    even = (2.0, 0.5, "Gamma", 4.0, 0.125)
    lengths = {0: ({100: 0.25, 200: 0.75}, {7: 1.0}), 1200: ({}, {}), 1800: ({900: 1.0}, {0: 1.0})}
    client(tmp_path, 0, [bursty, SILENT, bursty, bursty], lengths)
    client(tmp_path, 10, [even] * 4, {0: ({50: 1.0}, {3: 1.0})})
    client(
        tmp_path,
        2,
        [SILENT, (0.02, 1.0, "Gamma", 1.0, 50.0), SILENT, SILENT],
        {600: ({9: 1.0}, {9: 1.0})},
    )
    return tmp_path


def rows_of(folder, seed=0, **options):
    return list(ServeGen(folder=folder, **options).open().rows(seed))


def test_counts_of_every_client_and_window_are_the_published_ones(folder):
    rows = rows_of(folder)
    assert [row.at_s for row in rows] == sorted(row.at_s for row in rows)
    counts = {
        name: counts_in_bins(
            [r.at_s for r in rows if r.tenant == name], 600.0, end_s=2400.0
        ).tolist()
        for name in ("client-0", "client-2", "client-10")
    }
    assert counts == {
        "client-0": [300, 0, 300, 300],
        "client-2": [0, 12, 0, 0],
        "client-10": [1200] * 4,
    }


def test_shapes_are_the_published_ones(folder):
    at = {name: [] for name in ("client-0", "client-10")}
    for seed in range(5):
        for row in rows_of(folder, seed, duration_s=600.0):
            at[row.tenant].append(row.at_s + 600 * seed)
    assert gap_cv(at["client-10"]) == pytest.approx(0.5, rel=0.05)
    assert gap_cv(at["client-0"]) == pytest.approx(3.14, rel=0.15)  # Weibull of shape 0.4


def test_lengths_follow_the_span_and_an_empty_span_the_one_before(folder):
    seen = {}
    for row in rows_of(folder):
        if row.tenant == "client-0":
            seen.setdefault(int(row.at_s // 600), Counter())[row.num_prompt, row.num_output] += 1
    assert set(seen[0]) == {(100, 7), (200, 7)} == set(seen[2])
    assert seen[0][200, 7] / 300 == pytest.approx(0.75, abs=0.1)
    assert set(seen[3]) == {(900, 1)}  # an answer of nothing still takes a token


def test_a_start_inside_a_window_and_a_duration_cut(folder):
    rows = rows_of(folder, start_hour=0.25, duration_s=600.0)
    whole = [row for row in rows_of(folder, start_hour=1 / 6) if 300 <= row.at_s < 900]
    assert [row.at_s for row in rows] == pytest.approx([row.at_s - 300 for row in whole])
    assert 0 <= rows[0].at_s and rows[-1].at_s < 600


def test_the_total_rate_is_scaled_and_shares_are_kept(folder):
    replayed = ServeGen(folder=folder, rate_per_s=5.0).open()
    assert replayed.mean_rate_per_s == pytest.approx(5.0)
    rows = list(replayed.rows(0))
    assert len(rows) == pytest.approx(5.0 * 2400, abs=8)
    share = sum(row.tenant == "client-10" for row in rows) / len(rows)
    assert share == pytest.approx(4800 / 5712, abs=0.001)


def test_leaving_a_client_out_changes_no_other(folder):
    all_rows, few = rows_of(folder), rows_of(folder, clients=("client-0", "client-2"))
    assert few == [row for row in all_rows if row.tenant != "client-10"]
    assert {row.tenant for row in rows_of(folder, num_clients=1)} == {"client-10"}


def test_drawn_counts_vary_about_the_published_ones(folder):
    counts = [len(rows_of(folder, s, counts="renewal", clients=("client-10",))) for s in range(20)]
    assert len(set(counts)) > 5 and np.mean(counts) == pytest.approx(4800, rel=0.01)


def test_seeds_and_published_file_names(folder, tmp_path):
    assert rows_of(folder, 1) == rows_of(folder, 1) != rows_of(folder, 2)
    other = tmp_path / "published"
    other.mkdir()
    client(other, 7, [(1.0, 1.0, "Gamma", 1.0, 1.0)] * 2, {0: ({5: 1.0}, {5: 1.0})}, stem="chunk")
    assert {row.tenant for row in rows_of(other)} == {"chunk-7"}


def test_a_table_says_it(folder):
    told = {"folder": str(folder), "start_hour": 0, "clients": ["client-0"], "counts": "renewal"}
    assert build(ServeGen, told).clients == ("client-0",)
    with pytest.raises(BadConfig, match="rate_per_s must be positive"):
        build(ServeGen, {"folder": str(folder), "rate_per_s": 0})


def test_what_is_wrong_is_named(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for options, error, said in (
        ({"folder": empty}, BadTrace, "no ServeGen clients"),
        ({"folder": folder, "clients": ("client-9",)}, BadConfig, "no client 'client-9'"),
        ({"folder": folder, "duration_s": 3600.0}, BadConfig, "not 1 h"),
        ({"folder": folder, "start_hour": 1.0}, BadConfig, "from hour 1 on"),
        (
            {"folder": folder, "clients": ("client-2",), "duration_s": 600.0},
            BadConfig,
            "send nothing",
        ),
    ):
        with pytest.raises(error, match=said):
            ServeGen(**options).open()
    bad = tmp_path / "client-5-trace.csv"
    bad.write_text("0,1,1,Gamma,1,1\n600,1,1,Pareto,1,1\n")
    with pytest.raises(BadTrace, match="line 2"):
        read_laws(bad)
    bad.write_text("0,1,1,Gamma,1,1\n600,1,1,Gamma,1,1\n1800,1,1,Gamma,1,1\n")
    with pytest.raises(BadTrace, match="evenly"):
        read_laws(bad)
    (tmp_path / "client-10-dataset.json").write_text("{}")
    with pytest.raises(BadTrace, match="no span with lengths"):
        ServeGen(folder=tmp_path, clients=("client-10",)).open()


@pytest.mark.parametrize("model", ["language_m-large", "reason_deepseek-r1"])
def test_published_clients_keep_their_rates_and_lengths(penstock_data, model):
    """A day: the count of every window is the published one; lengths are within 0.05 (KS) of the published tables."""
    replayed = ServeGen(
        folder=penstock_data / "traces" / "servegen" / model, duration_s=86_400.0
    ).open()
    parts = list(replayed.windows(0))
    for number, (at, _, owners) in enumerate(parts):
        counts = np.bincount(owners, minlength=len(replayed.clients))
        wanted = [client.laws[number].rate_per_s * 600 for client in replayed.clients]
        assert counts == pytest.approx(wanted, abs=1e-6)
        assert (at >= 600 * number).all() and (at < 600 * (number + 1)).all()
    assert sum(len(part[0]) for part in parts) / 86_400 == pytest.approx(
        replayed.mean_rate_per_s, rel=1e-9
    )
    place = 0  # the busiest client, its first span
    drawn = np.concatenate([sizes[owners == place] for _, sizes, owners in parts[:36]])
    for side, (values, weights) in enumerate(replayed.clients[place].tables_at(0.0)):
        order = np.argsort(values)
        cumulative = np.cumsum(weights[order]) / weights.sum()
        seen = np.searchsorted(np.sort(drawn[:, side]), np.maximum(values[order], 1), side="right")
        assert np.abs(seen / len(drawn) - cumulative).max() <= 0.05
