"""What is changed in exchanges that are passed on: nothing but what was meant to be, however the bytes were cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cluster.passage import Passage, Renaming, body_for
from penstock.core.forward import Forward, ForwardedPrompt


def event(table: object) -> bytes:
    return b"data: " + json.dumps(table).encode() + b"\n\n"


def delta(word: str, finish: str | None = None) -> dict[str, object]:
    choice = {"index": 0, "delta": {"content": word}, "finish_reason": finish}
    return {"id": "c", "model": "theirs", "choices": [choice], "usage": None}


USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}
WORDS = [delta("a"), delta('the "usage" of \n\n breaks'), delta("żółw", "length")]
COUNTED = event({"id": "c", "choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
STREAM = b"".join(map(event, WORDS)) + COUNTED + DONE


def pass_on(pieces: list[bytes], **how: object) -> tuple[Passage, bytes]:
    passage = Passage(**{"shows_usage": False, **how})  # type: ignore[arg-type]
    told = b"".join(passage.events(piece) for piece in pieces)
    return passage, told + passage.rest()


@given(st.lists(st.integers(0, len(STREAM)), max_size=12), st.booleans())
def test_the_cuts_of_a_stream_change_nothing(cuts: list[int], shows: bool) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in zip(places, places[1:], strict=False)]
    passage, told = pass_on(pieces, shows_usage=shows)
    assert told == (STREAM if shows else STREAM.replace(COUNTED, b""))
    usage = passage.counted()
    assert (usage.num_prompt, usage.num_output, usage.num_cached) == (7, 3, 4)
    assert usage.is_counted and passage.is_done and passage.is_length


def test_each_call_gives_whole_events_only() -> None:
    passage = Passage(shows_usage=False)
    for place in range(len(STREAM)):
        told = passage.events(STREAM[place : place + 1])
        assert not told or told.endswith(b"\n\n")


def test_a_usage_beside_an_answer_is_counted_and_stays() -> None:
    last = event({**delta("end", "stop"), "usage": USAGE})
    passage, told = pass_on([event(WORDS[0]) + last + DONE])
    assert told == event(WORDS[0]) + last + DONE
    assert passage.counted().num_output == 3 and not passage.is_length


def test_without_a_usage_events_are_counted() -> None:
    passage, _ = pass_on([b"".join(map(event, WORDS)), DONE])
    assert passage.counted().num_output == 3 and not passage.counted().is_counted


@pytest.mark.parametrize("end", ["\r\n\r\n", "\n\n"])
def test_other_line_ends_and_a_missing_last_one(end: str) -> None:
    stream = STREAM.decode().replace("}\n\n", "}" + end).encode()
    passage, told = pass_on([stream[:100], stream[100:].rstrip()])
    assert passage.is_done and passage.counted().num_prompt == 7
    assert b'"prompt_tokens"' not in told and told.endswith(b"[DONE]")


def test_a_stream_without_its_end_is_not_done() -> None:
    passage, _ = pass_on([event(WORDS[0])])
    assert not passage.is_done


def test_the_model_gets_the_name_that_callers_know() -> None:
    rename = Renaming("theirs", 'ours \\ "x"')
    _, told = pass_on([STREAM], rename=rename)
    first = json.loads(told.split(b"\n\n")[0][6:])
    assert first == {**WORDS[0], "model": 'ours \\ "x"'}


def test_a_body_that_needs_nothing_is_the_same_bytes() -> None:
    body = b' {"model":"m", "prompt": "x",  "temperature": 0.30}'
    assert body_for(Forward("/", body, "m"), "m", adds_usage=True) is body


def test_a_stream_is_asked_for_its_usage_by_one_insertion() -> None:
    body = b' {"model":"m", "stream":true, "prompt": "x",  "temperature": 0.30}'
    told = body_for(Forward("/", body, "m", is_stream=True), "m", adds_usage=True)
    assert told.endswith(body.lstrip(b" {"))
    assert json.loads(told) == {**json.loads(body), "stream_options": {"include_usage": True}}
    asked = Forward("/", body, "m", is_stream=True, takes_usage=True)
    assert body_for(asked, "m", adds_usage=True) is body


def test_what_is_changed_in_a_body_leaves_the_rest() -> None:
    table = {
        "model": "ours", "stream": True, "stream_options": {"include_obfuscation": False},
        "slo": {"ttft_s": 1}, "program": "p", "seed": 2**62, "odd": {"a": [1.5, None]},
    }  # fmt: skip
    forward = Forward(
        "/", json.dumps(table).encode(), "ours",
        is_stream=True, has_options=True, has_ours=True, salt="tenant",
    )  # fmt: skip
    told = json.loads(body_for(forward, "theirs", adds_usage=True))
    assert told == {
        "model": "theirs", "stream": True,
        "stream_options": {"include_obfuscation": False, "include_usage": True},
        "seed": 2**62, "odd": {"a": [1.5, None]}, "cache_salt": "tenant",
    }  # fmt: skip


def test_prompts_share_hashes_as_far_as_their_bytes_do() -> None:
    def blocks(told: bytes, salt: str = "") -> tuple[bytes, ...]:
        return ForwardedPrompt(Forward("/", b""), [told], salt=salt).blocks(16)

    system = b"[{'role':'system','content':'" + b"be kind " * 40
    one, two = blocks(system + b"hello" * 30), blocks(system + b"good day" * 30)
    shared = len(system) // 64
    assert one[:shared] == two[:shared] and one[shared + 1] != two[shared + 1]
    assert not set(blocks(system)) & set(blocks(system, "tenant"))
    assert len(set(one)) == len(one)
