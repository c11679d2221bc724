"""Readers against files of the published schemas: what is kept, what is dropped and why, and when it arrives."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from penstock.core.errors import BadConfig, BadTrace
from penstock.core.types import Slo
from penstock.traffic import open_trace
from penstock.traffic.promises import parse_promise
from penstock.traffic.trace import estimate_tokens

DATA = Path(__file__).parents[2] / "data"
AZURE = DATA / "azure_2023_conv_200.csv"
MOONCAKE = DATA / "mooncake_conversation_100.jsonl"
BURSTGPT = DATA / "burstgpt_schema_120.csv"
SHAREGPT = DATA / "sharegpt_schema_60.jsonl"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_azure_rows_are_exact_to_the_last_digit():
    trace = open_trace(AZURE)
    played = list(trace)
    assert len(played) == 200 == trace.meta.rows_kept
    assert trace.meta.is_whole and trace.meta.format == "azure"
    at_s, request = played[1]
    # 18:15:46.6805900 -> 18:15:50.9951690
    assert at_s == pytest.approx(4.314579, abs=1e-9)
    assert (request.prompt.num_tokens, request.true_output) == (396, 109)
    assert request.sampling.max_tokens == 4096
    assert request.id == "azure_2023_conv_200-1"
    assert played[0][0] == 0.0


def test_the_seventh_digit_and_a_day_change_count(tmp_path):
    rows = (
        "2023-11-16 23:59:59.9999999,1,1\n2023-11-17 00:00:00.0000001,1,1\n"
        "2023-11-17 00:00:01,1,1\n"
    )
    path = write(tmp_path / "t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    ats = [at_s for at_s, _ in open_trace(path)]
    assert ats == pytest.approx([0.0, 2e-7, 1.0000001], abs=1e-10)


def test_zones_are_read(tmp_path):
    rows = "2024-05-10 00:00:00.009930+00:00,9,9\n2024-05-10 02:00:01.009930+02:00,9,9\n"
    path = write(tmp_path / "t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    assert [at_s for at_s, _ in open_trace(path)] == pytest.approx([0.0, 1.0])


def test_every_row_is_kept_or_dropped_with_a_reason(tmp_path):
    rows = (
        "2023-11-16 18:00:00.0,10,5\n2023-11-16 18:00:01.0,0,5\n2023-11-16 18:00:02.0,10,0\n"
        "2023-11-16 18:00:03.0,ten,5\nnever,10,5\n2023-11-16 18:00:04.0,10\n"
        "2023-11-16 18:00:00.5,900,5\n2023-11-16 18:00:05.0,90,5\n"
    )
    path = write(tmp_path / "t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    trace = open_trace(path, max_context=100)
    played = list(trace)
    assert [request.prompt.num_tokens for _, request in played] == [10, 90]
    assert played[1][1].sampling.max_tokens == 10  # what the context leaves
    assert trace.meta.drops == {
        "no prompt tokens": 1,
        "no output tokens": 1,
        "unreadable row": 3,
        "prompt does not fit a context of 100": 1,
    }
    assert trace.meta.rows_read == trace.meta.rows_kept + sum(trace.meta.drops.values()) == 8
    assert trace.meta.shown == "2023-11-16 18:00:03.0,ten,5"
    assert "2 requests of 8 rows" in str(trace.meta)


def test_rows_out_of_order_are_moved_and_counted(tmp_path):
    rows = "".join(f"2023-11-16 18:00:0{second}.0,10,5\n" for second in (0, 3, 1, 4))
    path = write(tmp_path / "t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    trace = open_trace(path)
    assert [at_s for at_s, _ in trace] == [0.0, 3.0, 3.0, 4.0]
    assert trace.meta.num_late == 1


def test_speed_limit_slo_and_traced_max_tokens():
    slow = list(open_trace(AZURE, limit=20))
    fast = list(open_trace(AZURE, limit=20, speed=4.0, max_tokens="trace", slo=Slo(ttft_s=1.0)))
    assert len(slow) == len(fast) == 20
    assert [at_s for at_s, _ in fast] == pytest.approx([at_s / 4 for at_s, _ in slow])
    assert all(r.sampling.max_tokens == r.true_output and r.slo.ttft_s == 1.0 for _, r in fast)


def test_a_limit_does_not_read_on():
    trace = open_trace(AZURE, limit=3)
    list(trace)
    assert trace.meta.rows_read == 3 and not trace.meta.is_whole


def test_iterating_twice_gives_the_same():
    for path, options in (
        (AZURE, {}),
        (MOONCAKE, {}),
        (BURSTGPT, {}),
        (SHAREGPT, {"rate_per_s": 5}),
    ):
        trace = open_trace(path, **options)
        first = [(at_s, r.id, r.prompt.num_tokens, r.tenant) for at_s, r in trace]
        again = [(at_s, r.id, r.prompt.num_tokens, r.tenant) for at_s, r in trace]
        assert first == again and first
        assert trace.meta.rows_kept == len(first)


def test_mooncake_prompts_share_what_their_ids_share():
    requests = [request for _, request in open_trace(MOONCAKE)]
    assert len(requests) == 100
    first, second = (request.prompt.blocks(16) for request in requests[:2])
    # Both begin with block id 0 and go on with different ones.
    shared = 512 // 16
    assert first[:shared] == second[:shared] and first[shared] != second[shared]
    assert len(first) == 6758 // 16


def test_mooncake_rows_that_do_not_add_up_are_dropped(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 500, "input_length": 600, "output_length": 5, "hash_ids": [1]},
        {"timestamp": 1500, "input_length": 512, "output_length": 5, "hash_ids": [1]},
        {"timestamp": 1500, "input_length": 512, "output_length": 5},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\nnot json\n"
    trace = open_trace(write(tmp_path / "t.jsonl", text))
    assert [at_s for at_s, _ in trace] == [0.0, 1.5]
    assert trace.meta.drops == {"hash_ids do not cover the prompt": 1, "unreadable row": 2}


def test_burstgpt_tenants_and_failures():
    trace = open_trace(BURSTGPT)
    tenants = {request.tenant for _, request in trace}
    assert tenants == {"ChatGPT/conversation", "ChatGPT/api", "GPT-4/conversation", "GPT-4/api"}
    text = BURSTGPT.read_text().splitlines()[1:]
    failed = sum(line.split(",")[3] == "0" for line in text)
    assert trace.meta.drops == {"failed at the source (0 response tokens)": failed}
    assert failed > 0


def test_burstgpt_columns_are_found_by_name(tmp_path):
    text = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,,1.5,GPT-4,472,18,490,API log\n45,s1,2.5,ChatGPT,1087,230,1317,Conversation log\n"
        "50,,0,ChatGPT,0,0,0,API log\n"
    )
    trace = open_trace(write(tmp_path / "b.csv", text))
    assert [(at, r.prompt.num_tokens, r.true_output, r.tenant) for at, r in trace] == [
        (0.0, 472, 18, "GPT-4/api"),
        (40.0, 1087, 230, "ChatGPT/conversation"),
    ]
    assert trace.meta.drops == {"neither request nor response tokens": 1}


def test_sharegpt_sizes_and_poisson_arrivals():
    trace = open_trace(SHAREGPT, rate_per_s=10.0, seed=7)
    played = list(trace)
    assert trace.meta.drops == {"no human turn with an answer": 3}
    assert len(played) == 57
    conversation = json.loads(SHAREGPT.read_text().splitlines()[0])["conversations"]
    assert played[0][1].prompt.num_tokens == estimate_tokens(conversation[0]["value"])
    assert "estimates" in str(trace.meta) and "10/s" in str(trace.meta)
    counted = list(
        open_trace(SHAREGPT, rate_per_s=10.0, count_tokens=lambda text: len(text.split()))
    )
    assert counted[0][1].prompt.num_tokens == len(conversation[0]["value"].split())


def test_poisson_has_the_stated_rate_and_its_seed():
    def arrivals(seed: int) -> list[float]:
        return [at_s for at_s, _ in open_trace(AZURE, rate_per_s=8.0, seed=seed)]

    assert arrivals(1) == arrivals(1) != arrivals(2)
    mean = sum(arrivals(seed)[-1] for seed in range(20)) / 20
    assert mean == pytest.approx(199 / 8.0, rel=0.06)  # 20 x 199 gaps: standard error 1.6%


@pytest.mark.parametrize("indent", [None, 2])
def test_sharegpt_array_is_the_same_as_lines(tmp_path, indent):
    values = [json.loads(line) for line in SHAREGPT.read_text().splitlines()]
    values[5]["conversations"][0]["value"] = 'brackets ] } " and \\ in text ' * 9000
    array = write(tmp_path / "a.json", json.dumps(values, indent=indent))
    lines = write(tmp_path / "l.jsonl", "\n".join(map(json.dumps, values)))
    sizes = [[r.prompt.num_tokens for _, r in open_trace(p, rate_per_s=1)] for p in (array, lines)]
    assert sizes[0] == sizes[1]


def test_a_broken_array_says_so(tmp_path):
    values = [json.loads(line) for line in SHAREGPT.read_text().splitlines()]
    whole = json.dumps(values)
    trace = open_trace(write(tmp_path / "a.json", whole[: len(whole) // 2]), rate_per_s=1)
    assert 20 < len(list(trace)) < 40
    assert trace.meta.drops["broken JSON: the rest of the file is lost"] == 1


def test_gzip_is_unpacked(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(AZURE.read_bytes()))
    assert len(list(open_trace(path))) == 200


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(repeats: int) -> int:
        rows = AZURE.read_text().splitlines()
        path = write(tmp_path / "big.csv", "\n".join([rows[0], *(rows[1:] * repeats)]))
        tracemalloc.start()
        for _ in open_trace(path):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(40) < peak(4) + 20_000


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "is empty"),
        ("a,b,c\n1,2,3\n", {}, "no known format"),
        ('{"x": 1}\n', {}, "no known format"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,1,2\n", {}, "no arrival times"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nbad,1,2\n", {}, "nothing to play"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", {"format": "burstgpt"}, "lacks the column"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", {"format": "xml"}, "no trace format is named"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", {"speed": 0.0}, "must be positive"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", {"limit": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_played_is_said(tmp_path, text, options, said):
    with pytest.raises(BadTrace, match=said):
        list(open_trace(write(tmp_path / "t.csv", text), **options))


def test_a_missing_or_binary_file_is_said(tmp_path):
    with pytest.raises(BadTrace, match="cannot open the trace"):
        open_trace(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\x80\x81\xff\xfe" * 100)
    with pytest.raises(BadTrace, match="is not text"):
        open_trace(tmp_path / "b.csv")


def test_promises_go_to_the_tenants_they_name():
    promises = [
        parse_promise(each) for each in ("GPT-4/*:ttft=2,weight=3", "*/api:tpot=0.1,priority=1")
    ]
    for _, request in open_trace(BURSTGPT, promises=promises, slo=Slo(deadline_s=9.0)):
        model, caller = request.tenant.split("/")
        wanted = {
            ("GPT-4", "api"): (Slo(ttft_s=2.0, weight=3.0), 0),
            ("GPT-4", "conversation"): (Slo(ttft_s=2.0, weight=3.0), 0),
            ("ChatGPT", "api"): (Slo(tpot_s=0.1), 1),
            ("ChatGPT", "conversation"): (Slo(deadline_s=9.0), 0),
        }[model, caller]
        assert (request.slo, request.priority) == wanted


@pytest.mark.parametrize(
    "text", ["a", ":ttft=1", "a:", "a:ttft", "a:ttft=-1", "a:speed=1", "a:priority=x"]
)
def test_what_is_no_promise_is_said(text):
    with pytest.raises(BadConfig, match="promise|slo"):
        parse_promise(text)


def test_the_whole_published_traces():
    folder = os.environ.get("PENSTOCK_TRACES")
    if not folder:
        pytest.skip("set PENSTOCK_TRACES to a folder with the published traces")
    azure = open_trace(Path(folder) / "azure_2023_conv.csv")
    assert sum(1 for _ in azure) == 19_366 and not azure.meta.drops
    assert azure.meta.last_at_s == pytest.approx(3501.721937, abs=1e-6)
    mooncake = open_trace(Path(folder) / "mooncake_conversation.jsonl")
    assert sum(1 for _ in mooncake) == 12_031 and not mooncake.meta.drops
