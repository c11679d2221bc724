"""Workload files: what they may say, that they are repeatable, and that what they state comes out."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.errors import BadConfig, BadTrace
from penstock.core.types import Request, Slo
from penstock.traffic import Trace, Workflow, open_trace
from penstock.traffic.promises import parse_promise
from tests.traffic.written_workloads import (
    FIXED,
    LENGTHS,
    POISSON,
    opened,
    requests_of,
    workflows_of,
    workload,
)

DATA = Path(__file__).parents[2] / "data"
AZURE, MOONCAKE = DATA / "azure_2023_conv_200.csv", DATA / "mooncake_conversation_100.jsonl"
EVERYTHING = f"""
duration_s = 15
{POISSON}{LENGTHS}
prefix = {{number = 3, tokens = 500, counts = "added"}}
sessions = {{turns = {{kind = "geometric", mean = 3}}, think_s = {{kind = "exponential", mean = 5}}}}
tenants = {{number = 4, zipf = 1.0}}
failures = {{share = 0.1, patience_s = {{kind = "exponential", mean = 20}}}}
[[service_class]]
share = 0.5
slo = {{ttft_s = 1.0}}
[[service_class]]
share = 0.5
priority = 2
[[mix]]
name = "agents"
{POISSON}{FIXED}
programs = {{shape = "fan_out", width = 3}}
[[mix]]
name = "azure"
trace = "{AZURE}"
"""


def told(trace: Trace) -> list[object]:
    """All that can be seen of a trace's items."""
    found: list[object] = []
    for at_s, item in trace:
        calls = [item] if isinstance(item, Request) else [call.request for call in item.calls]
        waits = (
            ()
            if isinstance(item, Request)
            else [(c.after, c.wait_s, c.abandon_s) for c in item.calls]
        )
        seen = [
            (r.id, r.prompt.num_tokens, r.prompt.blocks(64), r.true_output, r.tenant, r.slo, r.priority, r.program)
            for r in calls
        ]  # fmt: skip
        found.append((at_s, seen, waits))
    return found


def test_the_same_seed_gives_the_same_and_another_seed_another(tmp_path: Path) -> None:
    path = workload(tmp_path, EVERYTHING)
    first, again = told(open_trace(path, seed=7)), told(open_trace(path, seed=7))
    assert first == again and len(first) > 80
    other = told(open_trace(path, seed=8))
    assert other != first
    (tmp_path / "workload.toml").write_text("seed = 1\n" + EVERYTHING)
    assert told(open_trace(path, seed=7)) != first


def test_an_iteration_begins_again(tmp_path: Path) -> None:
    trace = opened(tmp_path, EVERYTHING)
    assert told(trace) == told(trace)


def test_items_come_in_time_order_and_are_all_counted(tmp_path: Path) -> None:
    trace = opened(tmp_path, EVERYTHING)
    items = list(trace)
    ats = [at_s for at_s, _ in items]
    assert ats == sorted(ats) and 0 <= ats[0] and ats[-1] <= 15
    meta = trace.meta
    assert meta.num_late == 0 and meta.is_whole and meta.format == "workload"
    assert meta.rows_kept == len(requests_of(trace))
    assert meta.rows_read == meta.rows_kept + sum(meta.drops.values())
    kinds = {item.kind for _, item in items if isinstance(item, Workflow)}
    assert kinds == {"session", "program"}
    ids = [request.id for request in requests_of(trace)]
    assert len(set(ids)) == len(ids)


def test_bounds(tmp_path: Path) -> None:
    many = opened(tmp_path, f"num_requests = 300\n{POISSON}{LENGTHS}")
    assert len(list(many)) == 300
    assert len(list(opened(tmp_path, f"num_requests = 300\n{POISSON}{LENGTHS}", limit=10))) == 10
    rate = len(list(opened(tmp_path, f"duration_s = 400\n{POISSON}{LENGTHS}"))) / 400
    assert abs(rate - 5) < 4 * math.sqrt(5 / 400)


def test_a_stated_rate_keeps_the_bursts(tmp_path: Path) -> None:
    text = f'num_requests = 500\narrivals = {{kind = "gamma", rate_per_s = 2, cv = 3}}\n{LENGTHS}'
    slow = [at_s for at_s, _ in opened(tmp_path, text)]
    fast = [at_s for at_s, _ in opened(tmp_path, text, rate_per_s=20.0)]
    assert fast == pytest.approx([at_s / 10 for at_s in slow])
    traced = opened(tmp_path, f'trace = "{AZURE}"\n')
    traced.rate_per_s = 3.0
    with pytest.raises(BadTrace, match="nobody knows the mean rate"):
        list(traced)


def test_speed_moves_arrivals_and_not_thoughts(tmp_path: Path) -> None:
    text = f"num_requests = 50\n{POISSON}{FIXED}sessions = {{turns = 3, think_s = 9}}"
    slow, fast = list(opened(tmp_path, text)), list(opened(tmp_path, text, speed=4.0))
    assert [at for at, _ in fast] == pytest.approx([at / 4 for at, _ in slow])
    assert {
        call.wait_s for w in workflows_of(opened(tmp_path, text, speed=4.0)) for call in w.calls
    } == {0.0, 9.0}


# ------------------------------------------------------------------ sessions


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 6), st.sampled_from(["within", "added"]), st.integers(0, 3), st.integers(0, 999)
)
def test_turns_are_chained_on_the_turn_before(
    tmp_path: Path, turns: int, counts: str, number: int, seed: int
) -> None:
    prefix = (
        f'prefix = {{number = {number}, tokens = 200, counts = "{counts}"}}\n' if number else ""
    )
    text = f"num_requests = 60\n{POISSON}{LENGTHS}{prefix}sessions = {{turns = {turns}, think_s = 2.0}}"
    for flow in workflows_of(opened(tmp_path, text, seed=seed)):
        assert flow.kind == "session" and len(flow) == turns
        assert [call.after for call in flow.calls] == [(), *((turn,) for turn in range(turns - 1))]
        assert {call.request.program for call in flow.calls} == {flow.id}
        for before, after in itertools.pairwise(call.request for call in flow.calls):
            assert after.prompt.num_tokens > before.prompt.num_tokens + (before.true_output or 0)
            known, grown = before.prompt.blocks(64), after.prompt.blocks(64)
            assert grown[: len(known)] == known
            assert len(known) == before.prompt.num_tokens // 64


def test_conversations_do_not_share_beyond_their_prefix(tmp_path: Path) -> None:
    text = f"num_requests = 200\n{POISSON}{FIXED}prefix = {{tokens = 640, counts = 'added'}}\nsessions = {{turns = 4}}"
    flows = workflows_of(opened(tmp_path, text))
    last = [flow.calls[-1].request.prompt.blocks(64) for flow in flows]
    for one, other in itertools.combinations(last[:20], 2):
        assert sum(a == b for a, b in zip(one, other, strict=False)) == 10


def test_a_conversation_ends_before_its_context_is_full(tmp_path: Path) -> None:
    text = f"num_requests = 99\n{POISSON}{FIXED}sessions = {{turns = 10, max_context = 350}}"
    assert {len(flow) for flow in workflows_of(opened(tmp_path, text))} == {3}  # 100, 220, 340
    short = opened(tmp_path, text, max_context=230)
    assert {len(flow) for flow in workflows_of(short)} == {2}
    assert short.meta.drops == {"prompt does not fit a context of 230": 33}


def test_open_sessions_are_rows_at_instants_told_in_advance(tmp_path: Path) -> None:
    text = f"duration_s = 60\n{POISSON}{FIXED}sessions = {{turns = 3, think_s = 10}}\n"
    closed = {flow.id: at_s for at_s, flow in opened(tmp_path, text) if isinstance(flow, Workflow)}
    rows = list(opened(tmp_path, text + 'replay = "open"'))
    ats = [at_s for at_s, _ in rows]
    assert ats == sorted(ats) and all(isinstance(item, Request) for _, item in rows)
    turns = Counter(item.program for _, item in rows if isinstance(item, Request))
    assert max(turns.values()) == 3
    starts = sorted(closed.values())
    expected = sorted(at + k * (20 * 0.02 + 10) for at in starts for k in range(3))
    assert ats == pytest.approx([at for at in expected if at <= 60])


# ------------------------------------------------------------------ tenants and classes


def test_tenants_have_their_shares(tmp_path: Path) -> None:
    trace = opened(
        tmp_path, f"num_requests = 8000\n{POISSON}{FIXED}tenants = {{number = 6, zipf = 1.3}}"
    )
    found = Counter(request.tenant for request in requests_of(trace))
    weights = {f"tenant-{rank}": rank**-1.3 for rank in range(1, 7)}
    for tenant, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(found[tenant] - 8000 * share) < 3 * math.sqrt(8000 * share * (1 - share))


LISTED = f"""
num_requests = 6000
{POISSON}{FIXED}
slo = {{ttft_s = 9.0}}
[[tenant]]
name = "chat"
share = 3
slo = {{ttft_s = 0.5, tpot_s = 0.05}}
priority = 1
[[tenant]]
name = "batch"
share = 1
lengths = {{kind = "fixed", prompt = 4000, output = 9}}
[[tenant]]
name = "cron"
arrivals = {{kind = "poisson", rate_per_s = 1.25}}
"""


def test_tenants_by_name_differ_in_what_they_state(tmp_path: Path) -> None:
    found = requests_of(opened(tmp_path, LISTED))
    counts = Counter(request.tenant for request in found)
    for tenant, share in (("chat", 0.6), ("batch", 0.2), ("cron", 0.2)):
        assert abs(counts[tenant] - 6000 * share) < 3 * math.sqrt(6000 * share * (1 - share))
    seen = {
        tenant: {
            (r.prompt.num_tokens, r.true_output, r.slo.ttft_s, r.priority)
            for r in found
            if r.tenant == tenant
        }
        for tenant in counts
    }
    assert seen == {
        "chat": {(100, 20, 0.5, 1)}, "batch": {(4000, 9, 9.0, 0)}, "cron": {(100, 20, 9.0, 0)},
    }  # fmt: skip


def test_promises_given_on_the_line_win(tmp_path: Path) -> None:
    promises = [parse_promise("chat:ttft=7,priority=5")]
    found = requests_of(opened(tmp_path, LISTED, promises=promises, slo=Slo(ttft_s=3.0)))
    assert {(r.tenant, r.slo.ttft_s, r.priority) for r in found} == {
        ("chat", 7.0, 5), ("batch", 9.0, 0), ("cron", 9.0, 0),
    }  # fmt: skip


def test_classes_divide_the_calls(tmp_path: Path) -> None:
    text = f"""num_requests = 4000\n{POISSON}{FIXED}
[[service_class]]
share = 0.7
slo = {{ttft_s = 1.0}}
[[service_class]]
share = 0.3
priority = 3
"""
    found = Counter((r.slo.ttft_s, r.priority) for r in requests_of(opened(tmp_path, text)))
    assert found.keys() == {(1.0, 0), (None, 3)}
    assert abs(found[1.0, 0] - 2800) < 3 * math.sqrt(4000 * 0.21)


# ------------------------------------------------------------------ traces inside


def test_a_trace_inside_is_the_trace(tmp_path: Path) -> None:
    inside = list(opened(tmp_path, f'trace = "{AZURE}"\nspeed = 2.0'))
    alone = list(open_trace(AZURE, speed=2.0))
    assert [(at, r.prompt.num_tokens, r.true_output) for at, r in inside] == [
        (at, r.prompt.num_tokens, r.true_output) for at, r in alone
    ]


def test_a_trace_may_come_at_other_instants_and_again(tmp_path: Path) -> None:
    text = f'num_requests = 250\n{POISSON}trace = "{MOONCAKE}"\nas_tenant = "kimi"'
    found = requests_of(opened(tmp_path, text))
    traced = [request for _, request in open_trace(MOONCAKE)]
    lengths = [request.prompt.num_tokens for request in traced]
    assert [request.prompt.num_tokens for request in found] == (lengths * 3)[:250]
    assert {request.tenant for request in found} == {"kimi"}
    assert [r.prompt.blocks(512) for r in found[:100]] == [r.prompt.blocks(512) for r in traced]
    again = {block for request in found[100:200] for block in request.prompt.blocks(512)}
    assert not again & {block for request in found[:100] for block in request.prompt.blocks(512)}


def test_what_a_trace_inside_drops_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(
        "prompt_tokens,output_tokens,arrival_s,tenant,session\n5,5,0,,\n0,5,1,,\n"
    )
    trace = opened(tmp_path, f'num_requests = 5\n{POISSON}trace = "own.csv"')
    assert len(list(trace)) == 5 and trace.meta.drops == {"no prompt tokens": 1}


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.csv").write_text(AZURE.read_text())
    path = workload(tmp_path, 'trace = "mine.csv"')
    monkeypatch.chdir("/")
    assert len(list(open_trace(path))) == 200


def test_a_csv_of_ones_own_inside(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("when,in,out\n0,5,6\n2.5,7,8\n")
    text = 'trace = "own.csv"\ncolumns = "arrival=when,prompt=in,output=out"'
    assert [(at, r.prompt.num_tokens) for at, r in opened(tmp_path, text)] == [(0.0, 5), (2.5, 7)]  # type: ignore[union-attr]


def test_a_workload_inside_a_workload_is_refused_or_played(tmp_path: Path) -> None:
    workload(tmp_path, f"num_requests = 20\n{POISSON}{FIXED}", "inner.toml")
    assert len(list(opened(tmp_path, 'trace = "inner.toml"'))) == 20


# ------------------------------------------------------------------ what is wrong is said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{POISSON}{LENGTHS}", "state duration_s or num_requests"),
        ("duration_s = 3", "needs \\[arrivals\\] or a trace"),
        (f"duration_s = 3\n{POISSON}", "lacks \\[lengths\\]"),
        (f"duration = 3\n{POISSON}{LENGTHS}", "did you mean 'duration_s'"),
        (f"duration_s = 3\n{LENGTHS}arrivals = {{kind = 'poison', rate_per_s = 1}}", "arrivals.kind"),
        (f"duration_s = 3\n{POISSON}lengths = {{kind = 'fixed', prompt = 1}}", "lacks the key 'output'"),
        (f"duration_s = 3\n{POISSON}{LENGTHS}prefix = {{nmuber = 3}}", "did you mean 'number'"),
        (f"duration_s = 3\n{POISSON}{LENGTHS}sessions = {{turns = {{kind = 'normal'}}}}", "sessions.turns.kind"),
        (f"duration_s = 3\n{POISSON}{LENGTHS}sessions = {{turns = 2}}\nprograms = {{}}", "sessions or programs"),
        (f"duration_s = 3\n{POISSON}{LENGTHS}trace = '{AZURE}'", "with a trace or a model, lengths"),
        (f"duration_s = -1\n{POISSON}{LENGTHS}", "duration_s must be positive"),
        (f"duration_s = 3\n{POISSON}{LENGTHS}tenants = {{number = 0}}", "number >= 1"),
        (f"duration_s = 3\n{POISSON}{LENGTHS}[[tenant]]\nname = 'a'", "needs a share or arrivals"),
        (f"duration_s = 3\n{POISSON}{LENGTHS}[[mix]]\nname = 'a'", "the source 'a' needs"),
        (f"duration_s = 3\n{POISSON}{LENGTHS}slo = {{ttft_s = 0}}", "ttft_s must be a positive"),
        ("duration_s = 3\n[model]\nkind = 'burst'", "'burstgpt' or 'servegen'"),
        ("duration_s = ", "is not valid TOML"),
    ],
)  # fmt: skip
def test_mistakes_are_told_when_the_file_is_opened(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        opened(tmp_path, text)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="there is no configuration file"):
        open_trace(tmp_path / "none.toml")
    with pytest.raises(BadTrace, match="cannot open the trace"):
        list(opened(tmp_path, 'trace = "none.csv"'))


def test_a_workload_that_plays_itself_is_told(tmp_path: Path) -> None:
    path = tmp_path / "loop.toml"
    path.write_text('num_requests = 5\ntrace = "loop.toml"\n')
    with pytest.raises(BadTrace, match="a trace of itself"):
        list(open_trace(path))
