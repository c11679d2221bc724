"""The load generator against a small server with known delays and faults, over real sockets.

Times are bounded from below only: the server says how long it takes at least, the machine adds what it likes.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from penstock.core.errors import BadRequest, BadTrace, UpstreamFailed
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.lab.bench import Bench, Benched, bench
from penstock.lab.client import Client, Wish, root_url
from penstock.lab.prompts import WORDS, Composer, Lexicon, lexicon_of
from penstock.traffic import open_trace
from penstock.traffic.promises import parse_promise
from tests.lab.little_server import Little, count, serving

DATA = Path(__file__).parents[2] / "data"
AZURE = DATA / "azure_2023_conv_200.csv"
MOONCAKE = DATA / "mooncake_conversation_100.jsonl"


def trace_of(path: Path, rows: list[tuple[float, int, int]]) -> Path:
    """A trace file in Azure's format: (seconds, prompt, output)."""
    told = [f"2023-11-16 18:{int(at) // 60:02}:{at % 60:010.7f},{p},{o}" for at, p, o in rows]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(told) + "\n")
    return path


async def run(little: Little, trace: Path, **more: object) -> Benched:
    async with serving(little) as url:
        return await bench(Bench(url=url, trace=trace, **more))  # type: ignore[arg-type]


async def test_lengths_times_and_counts(tmp_path: Path) -> None:
    rows = [(0.0, 30, 5), (0.5, 200, 9), (0.5, 7, 3)]
    little = Little(prefill_s=0.05, token_s=0.02)
    found = await run(little, trace_of(tmp_path / "t.csv", rows))
    figures = found.figures.all
    assert figures.num_offered == figures.num_finished == figures.num_met == 3
    assert [body["max_tokens"] for body in little.bodies] == [5, 9, 3]
    assert [count(body["prompt"]) for body in little.bodies] == [30, 200, 7]
    assert figures.prompt_tokens == 237 and figures.output_tokens == 17
    assert figures.ttft_s.p50 is not None and figures.ttft_s.p50 >= 0.05
    assert figures.tpot_s.num == 3 and figures.tpot_s.p50 is not None
    assert figures.tpot_s.p50 >= 0.02
    assert figures.itl_s.num == 4 + 8 + 2
    assert figures.e2e_s.max is not None and figures.e2e_s.max >= 0.05 + 8 * 0.02
    assert little.at[1] - little.at[0] >= 0.2  # the trace's own arrival times
    assert not any("tokens were" in note for note in found.figures.notes)
    json.dumps(found.to_dict())


async def test_the_loop_is_open(tmp_path: Path) -> None:
    """A server that answers nobody before all twenty have come is sent all twenty; a cap holds them back."""
    trace = trace_of(tmp_path / "t.csv", [(i * 0.01, 5, 2) for i in range(20)])
    slow = Little(hold=20)
    found = await run(slow, trace)
    assert slow.most_open == 20 and found.figures.all.num_finished == 20
    capped = Little(prefill_s=0.02)
    found = await run(capped, trace, concurrency_cap=3)
    assert capped.most_open <= 3 and found.figures.all.num_finished == 20


async def test_time_held_back_is_part_of_the_latency(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.csv", [(0.0, 5, 2)] * 4)
    found = await run(Little(prefill_s=0.1), trace, concurrency_cap=1)
    assert found.figures.all.ttft_s.max is not None and found.figures.all.ttft_s.max >= 0.4
    assert "made 3 requests wait" in " ".join(found.figures.notes)


async def test_speed_and_limit(tmp_path: Path) -> None:
    little = Little()
    trace = trace_of(tmp_path / "t.csv", [(i * 0.5, 5, 2) for i in range(9)])
    await run(little, trace, speed=10.0, limit=4)
    assert len(little.bodies) == 4
    assert 0.08 <= little.at[-1] - little.at[0]


async def test_failures_are_counted_by_kind_and_are_misses(tmp_path: Path) -> None:
    little = Little(statuses=[200, 429, 503, 500, 200, 200], faults=["", "error", "cut"])
    trace = trace_of(tmp_path / "t.csv", [(i * 0.02, 5, 6) for i in range(6)])
    found = await run(little, trace)
    figures = found.figures
    assert figures.errors == {
        "HTTP 429 rate_limit_exceeded": 1,
        "HTTP 503": 1,
        "HTTP 500": 1,
        "in the stream: step_failed": 1,
        "cut off": 1,
    }
    assert (figures.all.num_refused, figures.all.num_failed, figures.all.num_finished) == (2, 3, 1)
    assert figures.all.attainment == pytest.approx(1 / 6)


async def test_timeouts_are_failures(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.csv", [(0.0, 5, 400)])
    found = await run(Little(token_s=0.1), trace, timeout_s=2.0)
    assert found.figures.errors == {"timeout": 1} and found.figures.all.attainment == 0.0


async def test_promises_are_judged(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.csv", [(0.0, 5, 3)] * 2)
    little = Little(prefill_s=0.1)
    missed = await run(little, trace, slo=Slo(ttft_s=0.05))
    assert missed.figures.all.num_met == 0 and missed.figures.all.num_finished == 2
    assert little.bodies[0]["slo"] == {"ttft_s": 0.05} and little.bodies[0]["ignore_eos"] is True
    met = await run(Little(), trace, slo=Slo(ttft_s=60.0, tpot_s=60.0))
    assert met.figures.all.num_met == 2
    assert list(met.figures.classes) == ["priority 0, ttft 60 s, tpot 60 s"]


@pytest.mark.parametrize("refused", ["slo", "ignore_eos", "stream_options", "priority"])
async def test_servers_that_know_fewer_fields(refused: str, tmp_path: Path) -> None:
    little = Little(refuses=frozenset({refused}))
    trace = trace_of(tmp_path / "t.csv", [(0.0, 5, 3)])
    found = await run(little, trace, slo=Slo(ttft_s=60.0))
    assert found.figures.all.num_finished == 1
    assert found.figures.all.output_tokens == 3
    fields = {"slo", "ignore_eos", "stream_options"}
    assert little.bodies[0].keys() & fields == fields - {refused}
    notes = " ".join(found.figures.notes)
    assert ("no ignore_eos" in notes) == (refused == "ignore_eos")
    assert ("told no usage" in notes) == (refused == "stream_options")


async def test_chat_completions(tmp_path: Path) -> None:
    little = Little()
    found = await run(little, trace_of(tmp_path / "t.csv", [(0.0, 5, 3)]), is_chat=True)
    assert found.figures.all.itl_s.num == 2  # the empty first event is no token
    assert little.bodies[-1]["messages"][0]["role"] == "user"


async def test_tokens_that_come_together_are_said(tmp_path: Path) -> None:
    little = Little(per_event=4)
    found = await run(little, trace_of(tmp_path / "t.csv", [(0.0, 5, 16)]))
    assert found.figures.all.output_tokens == 16 and found.figures.all.itl_s.num == 3
    assert "ITL is between events" in " ".join(found.figures.notes)


async def test_without_a_tokenizer_sizes_are_estimates(tmp_path: Path) -> None:
    little = Little(has_tokenize=False, context=None)
    found = await run(little, trace_of(tmp_path / "t.csv", [(0.0, 500, 3)]))
    assert "estimate" in " ".join(found.figures.notes)
    assert len(little.bodies[0]["prompt"]) == pytest.approx(2000, rel=0.1)


async def test_a_prompt_beyond_the_context_is_left_out(tmp_path: Path) -> None:
    little = Little(context=100)
    found = await run(little, trace_of(tmp_path / "t.csv", [(0.0, 5, 400), (0.0, 100, 3)]))
    assert [body["max_tokens"] for body in little.bodies] == [95]
    assert "does not fit a context of 100" in " ".join(found.figures.notes)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["trace"]["drops"] == {"prompt does not fit a context of 100": 1}


async def test_stopping_reports_what_was_measured(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.csv", [(0.0, 5, 2), (50.0, 5, 2)])
    async with serving(Little()) as url:
        seen = asyncio.Event()

        def on_tick(driven: object, total: object) -> None:
            if sum(group.num_finished for group in driven.groups.values()):  # type: ignore[attr-defined]
                seen.set()

        task = asyncio.create_task(bench(Bench(url=url, trace=trace), on_tick))
        await seen.wait()
        task.cancel()
        found = await task
    assert not found.is_whole and found.figures.all.num_finished == 1
    assert "stopped before" in " ".join(found.figures.notes)


async def test_tenants_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "0,GPT-4,5,2,7,API log\n0,ChatGPT,5,2,7,Conversation log\n0,ChatGPT,5,3,8,Conversation log\n"
    )
    little = Little()
    promises = (parse_promise("*/api:ttft=60,priority=2"),)
    found = await run(little, path, slo=Slo(ttft_s=1e-9), promises=promises)
    assert {
        name: (group.num_finished, group.num_met) for name, group in found.figures.classes.items()
    } == {
        "priority 0, ttft 1e-09 s": (2, 0),
        "priority 2, ttft 60 s": (1, 1),
    }
    assert [body.get("priority") for body in little.bodies if "api" in body["user"]] == [2]
    assert {name: group.num_finished for name, group in found.figures.tenants.items()} == {
        "ChatGPT/conversation": 2,
        "GPT-4/api": 1,
    }
    assert {body["user"] for body in little.bodies} == {"ChatGPT/conversation", "GPT-4/api"}


async def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.csv", [(0.0, 5, 2)])
    async with serving(Little(key="secret")) as url:
        with pytest.raises(UpstreamFailed, match="invalid_api_key"):
            await bench(Bench(url=url, trace=trace))
        found = await bench(Bench(url=url, trace=trace, api_key="secret"))
        assert found.figures.all.num_finished == 1
        with pytest.raises(BadRequest, match="serves no model 'other'"):
            await bench(Bench(url=url, trace=trace, api_key="secret", model="other"))
        with pytest.raises(BadTrace, match="cannot open"):
            await bench(Bench(url=url, trace=tmp_path / "none.csv"))
    with pytest.raises(UpstreamFailed, match="cannot reach"):
        await bench(Bench(url=url, trace=trace))


def request(number: int, tokens: int, hash_ids: tuple[int, ...] = ()) -> Request:
    return Request(
        id=RequestId(f"r{number}"),
        model="m",
        prompt=TracedPrompt(tokens, hash_ids),
        sampling=Sampling(max_tokens=5),
    )


def test_composed_text_has_the_length_and_its_seed() -> None:
    counts = tuple(1 if len(word) < 5 else 3 for word in WORDS)
    sizes = dict(zip(WORDS, counts, strict=True))
    composer = Composer(Lexicon(WORDS, counts, "a test", True), seed=1)
    for tokens in (1, 2, 3, 17, 1000, 20_000):
        text = composer.compose(request(tokens, tokens))
        assert text.startswith(" ") and sum(sizes[word] for word in text.split()) == tokens
    other = Composer(Lexicon(WORDS, counts, "a test", True), seed=2)
    assert composer.compose(request(7, 50)) == composer.compose(request(7, 50))
    assert composer.compose(request(7, 50)) != composer.compose(request(8, 50))
    assert composer.compose(request(7, 50)) != other.compose(request(7, 50))


def test_shared_prefixes_are_the_same_text() -> None:
    composer = Composer(Lexicon(WORDS, (1,) * len(WORDS), "a test", True), seed=1)
    requests = [each for _, each in open_trace(MOONCAKE, limit=20)]
    texts = [composer.compose(each).split() for each in requests]
    for one, text in zip(requests, texts, strict=True):
        assert len(text) == one.prompt.num_tokens
        for other, second in zip(requests, texts, strict=True):
            ids = zip(one.prompt.hash_ids, other.prompt.hash_ids, strict=False)  # type: ignore[attr-defined]
            shared = 0
            for left, right in ids:
                if left != right:
                    break
                shared += 512
            assert text[:shared] == second[:shared]
            if one is not other and shared < min(len(text), len(second)):
                assert text[shared : shared + 50] != second[shared : shared + 50]


async def test_a_tokenizer_folder_sizes_prompts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"[UNK]": 0} | {word: number for number, word in enumerate(WORDS, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    async with Client("http://127.0.0.1:1") as client:
        lexicon = await lexicon_of(client, tmp_path)
    assert lexicon.is_exact and set(lexicon.counts) == {1}


async def test_a_client_that_leaves_is_seen_by_the_server() -> None:
    little = Little(token_s=0.05)
    async with serving(little) as url, Client(url) as client:
        await client.find_model()
        pieces = client.tell(Wish(prompt="a", max_tokens=500))
        assert await anext(pieces) == " word"
        await pieces.aclose()
        for _ in range(100):
            if little.num_cut:
                break
            await asyncio.sleep(0.02)
    assert little.num_cut == 1 and little.num_open == 0


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://a:1/v1/", "http://a:1"),
        ("a:8000", "http://a:8000"),
        ("https://b/x/v1", "https://b/x"),
    ],
)
def test_urls_are_taken_with_and_without_v1(given: str, base: str) -> None:
    assert root_url(given) == base
