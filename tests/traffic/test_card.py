"""Cards against plain recomputation, and against the published figures of the published traces."""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path

import pytest

from penstock.core.types import Request
from penstock.traffic import open_trace
from penstock.traffic.card import Card, Watched, card_of
from tests.traffic.written_workloads import FIXED, LENGTHS, POISSON, opened

DATA = Path(__file__).parents[2] / "data"
AZURE, MOONCAKE = DATA / "azure_2023_conv_200.csv", DATA / "mooncake_conversation_100.jsonl"
BURSTGPT = DATA / "burstgpt_schema_120.csv"


def counts_of(ats: list[float], width_s: float) -> list[int]:
    bins = [0] * int((ats[-1] - ats[0]) / width_s)
    for at_s in ats:
        place = int((at_s - ats[0]) // width_s)
        if place < len(bins):
            bins[place] += 1
    return bins


def test_figures_are_those_of_the_rows() -> None:
    card = card_of(open_trace(AZURE))
    played = list(open_trace(AZURE))
    ats = [at_s for at_s, _ in played]
    prompts = sorted(request.prompt.num_tokens for _, request in played)  # type: ignore[union-attr]
    assert card.rows_kept == 200 and card.is_whole and card.format == "azure"
    assert card.span_s == ats[-1] and card.rate_per_s == pytest.approx(200 / ats[-1])
    gaps = [after - before for before, after in zip(ats, ats[1:], strict=False)]
    assert card.gap_cv == pytest.approx(statistics.stdev(gaps) / statistics.mean(gaps))
    for width_s, found in ((1.0, card.dispersion_1s), (60.0, card.dispersion_60s)):
        counts = counts_of(ats, width_s)
        if len(counts) > 1:
            assert found == pytest.approx(statistics.variance(counts) / statistics.mean(counts))
    cuts = statistics.quantiles(prompts, n=100, method="inclusive")
    assert (card.prompt.p50, card.prompt.p90, card.prompt.p99) == pytest.approx(
        (cuts[49], cuts[89], cuts[98])
    )
    assert card.prompt.total == sum(prompts) and card.prompt.max == prompts[-1]
    assert card.prompt.mean == pytest.approx(statistics.mean(prompts))
    for power, count in enumerate(card.prompt.counts):
        assert count == sum(1 << power <= value < 2 << power for value in prompts)
    assert sum(card.rates) * card.span_s / 60 == pytest.approx(200)
    assert card.sha256 == hashlib.sha256(AZURE.read_bytes()).hexdigest()
    assert card.hit_ceiling_tokens is None and card.num_sessions == 0
    json.dumps(card.to_dict(), allow_nan=False)


def test_the_hit_ceiling_is_that_of_a_cache_without_end() -> None:
    card = card_of(open_trace(MOONCAKE))
    seen: set[int] = set()
    hit_blocks = num_blocks = hit_tokens = num_tokens = 0
    for line in MOONCAKE.read_text().splitlines():
        row = json.loads(line)
        hits = [id in seen for id in row["hash_ids"]]
        known = hits.index(False) if False in hits else len(hits)
        seen |= set(row["hash_ids"])
        hit_blocks, num_blocks = hit_blocks + known, num_blocks + len(hits)
        hit_tokens += min(known * 512, row["input_length"])
        num_tokens += row["input_length"]
    assert 0 < hit_blocks
    assert card.hit_ceiling_blocks == pytest.approx(hit_blocks / num_blocks)
    assert card.hit_ceiling_tokens == pytest.approx(hit_tokens / num_tokens)


def test_the_ceiling_of_conversations(tmp_path: Path) -> None:
    lengths = 'lengths = {kind = "fixed", prompt = 640, output = 64}\n'
    card = card_of(
        opened(tmp_path, f"num_requests = 80\n{POISSON}{lengths}sessions = {{turns = 4}}")
    )
    # Every turn finds all of the turn before: prompts of 640, 1344, 2048 and 2752 tokens.
    known, whole = 640 + 1344 + 2048, 640 + 1344 + 2048 + 2752
    assert card.hit_ceiling_tokens == card.hit_ceiling_blocks == pytest.approx(known / whole)


def test_callers_are_counted(tmp_path: Path) -> None:
    card = card_of(open_trace(BURSTGPT))
    tenants = [request.tenant for _, request in open_trace(BURSTGPT)]  # type: ignore[union-attr]
    most = max(set(tenants), key=tenants.count)
    assert (card.num_tenants, card.top_tenant) == (len(set(tenants)), most)
    assert card.top_tenant_share == pytest.approx(tenants.count(most) / len(tenants))
    assert card.rows_read == card.rows_kept + sum(card.drops.values())
    text = f"num_requests = 60\n{POISSON}{FIXED}sessions = {{turns = 3, think_s = 5}}"
    talks = card_of(opened(tmp_path, text))
    assert (talks.num_sessions, talks.num_in_sessions, talks.num_workflows) == (
        20,
        60,
        {"session": 20},
    )
    assert any("0.02 s" in note for note in talks.notes)


def test_a_card_made_while_playing_is_the_same(tmp_path: Path) -> None:
    text = f"duration_s = 60\n{POISSON}{LENGTHS}prefix = {{number = 2, tokens = 200}}"
    watched = Watched(opened(tmp_path, text))
    for _ in range(2):  # a second look begins again
        items = [item for _, item in watched]
    assert all(isinstance(item, Request) for item in items)
    assert watched.card() == card_of(opened(tmp_path, text))


def test_part_of_a_trace_says_so() -> None:
    assert not card_of(open_trace(AZURE, limit=10)).is_whole


@pytest.mark.parametrize("num", [1, 2])
def test_tiny_traces_have_cards(tmp_path: Path, num: int) -> None:
    card = card_of(opened(tmp_path, f"num_requests = {num}\n{POISSON}{FIXED}"))
    assert card.rows_kept == num and card.gap_cv is None
    assert (card.rate_per_s is None) == (num == 1)
    json.dumps(card.to_dict(), allow_nan=False)


def published(folder: Path, name: str) -> Card:
    return card_of(open_trace(folder / "traces" / name))


def test_azures_conversations(penstock_data: Path) -> None:
    card = published(penstock_data, "azure_2023_conv.csv")
    assert (card.rows_kept, card.drops) == (19_366, {})
    assert card.span_s == pytest.approx(3502, abs=1) and card.rate_per_s == pytest.approx(
        5.53, abs=0.005
    )
    found = [(each.mean, each.p50, each.p99) for each in (card.prompt, card.output)]
    assert found[0] == pytest.approx((1155, 1020, 4142), abs=0.5)
    assert found[1] == pytest.approx((211, 129, 601), abs=0.5)
    assert card.gap_cv == pytest.approx(1.09, abs=0.005)
    # 58 whole minutes; with the last 22 s as a 59th bin it is 20.
    assert card.dispersion_60s == pytest.approx(16.4, abs=0.05)


def test_mooncakes_conversations(penstock_data: Path) -> None:
    card = published(penstock_data, "mooncake_conversation.jsonl")
    assert card.rows_kept == 12_031
    assert card.hit_ceiling_blocks == pytest.approx(0.366, abs=0.0005)
    assert card.hit_ceiling_tokens == pytest.approx(0.374, abs=0.0005)
