"""BurstGPT: both versions of the schema (rows made up here; the published ones are not at hand), and its generator."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest

from penstock.core.errors import BadTrace, SchemaMismatch
from penstock.traffic import open_trace
from penstock.traffic.arrivals import Renewal
from penstock.traffic.burst_model import BurstGptModel, Conversations, fit_burstgpt
from penstock.traffic.burstgpt import BurstGpt, Call, calls_of, read
from penstock.traffic.lengths import Fixed, Zipf
from penstock.traffic.renewal import Law
from penstock.traffic.rows import Drop, Row, Source
from penstock.traffic.sample import Sample
from penstock.traffic.statistics import counts_in_bins, gap_cv

SOURCE = Source("burstgpt.csv", len)
VERSION_1 = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,230,1317,API log
45,GPT-4,200,0,200,API log
60,ChatGPT,0,0,0,API log
61,ChatGPT,0,7,7,API log
62,ChatGPT,many,7,7,API log
"""
VERSION_2 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,17,2.25,ChatGPT,472,18,490,Conversation log
45,,8.5,GPT-4,1087,230,1317,API log
45,,0.5,GPT-4,200,0,200,API log
60,,0,ChatGPT,0,0,0,API log
61,,,ChatGPT,0,7,7,API log
62,,,ChatGPT,many,7,7,API log
"""


def split(text, reader=read):
    found = list(reader(io.StringIO(text), SOURCE))
    return [each for each in found if isinstance(each, Row)], [
        each.reason for each in found if isinstance(each, Drop)
    ]


@pytest.mark.parametrize(("text", "session"), [(VERSION_1, None), (VERSION_2, "17")])
def test_both_versions_are_read_by_column_names(text, session):
    rows, drops = split(text)
    assert rows == [
        Row(5.0, 472, 18, "ChatGPT/conversation", session=session),
        Row(45.0, 1087, 230, "GPT-4/api"),
    ]
    assert drops == [
        "failed at the source (0 response tokens)",
        "neither request nor response tokens",
        "no prompt tokens",
        "unreadable row",
    ]


def test_elapsed_time_is_kept_beside():
    calls = list(calls_of(io.StringIO(VERSION_2)))
    assert calls[0] == Call(5.0, "ChatGPT", 472, 18, "Conversation log", "17", 2.25)
    assert calls[2].has_failed and calls[2].elapsed_s == 0.5
    assert calls[4].elapsed_s is None
    assert all(
        call.elapsed_s is None for call in itertools.islice(calls_of(io.StringIO(VERSION_1)), 5)
    )


def test_failures_can_be_kept_for_their_prompts():
    rows, drops = split(VERSION_1, BurstGpt(failures="keep"))
    assert Row(45.0, 200, 1, "GPT-4/api") in rows and len(rows) == 3
    assert "failed at the source (0 response tokens)" not in drops


def test_log_type_and_model_choose_rows_and_count_the_others():
    rows, drops = split(VERSION_1, BurstGpt(log_type="conversation"))
    assert [row.tenant for row in rows] == ["ChatGPT/conversation"]
    assert drops.count("not of the conversation log") == 4
    rows, drops = split(VERSION_1, BurstGpt(model="GPT-4"))
    assert [row.tenant for row in rows] == ["GPT-4/api"]
    assert drops.count("not of the model GPT-4") == 3


def test_variants_can_be_named_as_formats(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text(VERSION_2)
    assert open_trace(path).format == "burstgpt"
    for name, num in (
        ("burstgpt-conversation", 1),
        ("burstgpt-api", 1),
        ("burstgpt-with-failures", 3),
    ):
        trace = open_trace(path, format=name)
        assert len(list(trace)) == num and trace.meta.rows_read == 6
    assert next(iter(open_trace(path)))[1].program == "17"


def test_the_published_generator():
    """Gamma(0.25, rate 2) for a minute, the windows given, then Gamma(0.5, rate 2); Zipf lengths below 1024."""
    model = BurstGptModel.published([(2.0, 4.0)])
    laws = (*model.arrivals.laws, model.arrivals.rest)
    assert [law.shape for law in laws] == [0.25, 2.0, 0.5]
    assert [law.rate_per_s for law in laws] == [8.0, 2.0, 4.0]
    assert [law.cv for law in laws] == pytest.approx([2.0, 0.5**0.5, 2.0**0.5])
    sample = Sample.of_rows(model.rows(0), end_s=6_000.0)
    assert sample.pairs.max() < 1024
    assert gap_cv(sample.at_s[sample.at_s > 120]) == pytest.approx(2**0.5, rel=0.05)
    per_window = np.mean(
        [counts_in_bins(model.arrivals.until(180.0, s), 60.0, end_s=180.0) for s in range(200)],
        axis=0,
    )
    assert per_window == pytest.approx([480.0, 120.0, 240.0], rel=0.03)


def test_modelled_scaling_divides_gaps_and_not_windows():
    plain, scaled = BurstGptModel.published(), BurstGptModel.published(scale=3.0)
    assert scaled.arrivals == plain.times(3.0).arrivals
    assert scaled.arrivals.window_s == plain.arrivals.window_s
    assert scaled.mean_rate_per_s == pytest.approx(3 * plain.mean_rate_per_s)


def conversations():
    return BurstGptModel(
        arrivals=Renewal(
            window_s=60.0, laws=tuple(Law(rate_per_s=1.0, shape=0.5) for _ in range(60))
        ),
        lengths=Fixed(prompt=9, output=8),
        conversations=Conversations(
            share=0.4, turns=(3.0, 2.0, 1.0), gap_median_s=20.0, gap_sigma=0.5
        ),
        tenants={"ChatGPT/conversation": 3.0, "GPT-4/api": 1.0},
    )


def test_conversations_come_back_in_time_order_with_their_turns():
    model = conversations()
    rows = list(model.rows(1))
    at = [row.at_s for row in rows]
    assert at == sorted(at) and rows == list(model.rows(1))
    assert len(rows) / 3_600 == pytest.approx(model.mean_rate_per_s, rel=0.06)
    talks = {}
    for row in rows:
        if row.session is not None:
            talks.setdefault(row.session, []).append(row)
    turns = np.bincount([len(talk) for talk in talks.values()])
    assert turns[:2].sum() == 0 and turns[2:] / turns.sum() == pytest.approx(
        [1 / 2, 1 / 3, 1 / 6], abs=0.05
    )
    gaps = np.concatenate([np.diff([row.at_s for row in talk]) for talk in talks.values()])
    assert np.median(gaps) == pytest.approx(20.0, rel=0.08)
    assert np.log(gaps).std() == pytest.approx(0.5, rel=0.08)
    assert all(len({row.tenant for row in talk}) == 1 for talk in talks.values())
    share = sum(row.tenant == "GPT-4/api" for row in rows) / len(rows)
    assert share == pytest.approx(0.25, abs=0.03)


def test_fitting_finds_the_conversations_again():
    model = conversations()
    found = fit_burstgpt(Sample.of_rows(model.rows(2)))
    talk = found.conversations
    assert talk.share == pytest.approx(0.4, abs=0.04)
    assert talk.mean_turns == pytest.approx(model.conversations.mean_turns, rel=0.05)
    assert talk.gap_median_s == pytest.approx(20.0, rel=0.08)
    assert found.tenants["GPT-4/api"] == pytest.approx(0.25, abs=0.03)
    assert found.mean_rate_per_s == pytest.approx(model.mean_rate_per_s, rel=0.06)


def test_a_model_is_kept_as_json(tmp_path):
    path = tmp_path / "model.json"
    for model in (conversations(), BurstGptModel.published([(2.0, 4.0)]).with_counts("exact")):
        model.save(path)
        assert BurstGptModel.load(path) == model
    json.loads(path.read_text())
    assert isinstance(BurstGptModel.load(path).lengths, Zipf)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "model.json"
    path.write_text("not json")
    with pytest.raises(BadTrace, match="cannot read"):
        BurstGptModel.load(path)
    path.write_text('{"schema": 99}')
    with pytest.raises(SchemaMismatch, match="layout 99"):
        BurstGptModel.load(path)
    path.write_text('{"schema": 1}')
    with pytest.raises(BadTrace, match="'arrivals'"):
        BurstGptModel.load(path)
    path.write_text("[]")
    with pytest.raises(BadTrace, match="no fitted model"):
        BurstGptModel.load(path)
