"""Every message comes back as it was sent, and what no codec wrote is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import SchemaMismatch
from penstock.core.messages import (
    Cancel,
    Drain,
    Drained,
    Failed,
    Hello,
    Message,
    Offer,
    Offered,
    Outputs,
    Refuse,
    Say,
    Settle,
    Stop,
    Submit,
    Take,
    Taken,
)
from penstock.core.moving import JobState, KvCard
from penstock.core.prompt import HashedPrompt, TokenPrompt, TracedPrompt
from penstock.core.types import (
    BlockHash,
    Output,
    Part,
    Report,
    Request,
    RequestId,
    Sampling,
    Slo,
    TokenLogprob,
)
from penstock.net.codec import BrokenFrame, Codec

codec = Codec(Message)

ids = st.lists(st.integers(0, 1 << 31), min_size=1, max_size=40).map(tuple)
text = st.text(max_size=12)
number = st.floats(allow_nan=False)
positive = st.floats(min_value=1e-3, max_value=1e6)
count = st.integers(0, 1 << 40)
maybe = st.none
parts = st.lists(
    st.builds(
        Part,
        kind=st.sampled_from(["image", "audio", "video"]),
        digest=st.binary(max_size=16),
        start=st.integers(0, 30),
        num_tokens=st.integers(1, 9),
    ),
    max_size=2,
).map(tuple)
token_prompts = st.builds(
    TokenPrompt, ids, key=st.binary(max_size=16), adapter=maybe() | text, salt=text, parts=parts
)
traced_prompts = st.builds(
    TracedPrompt,
    st.integers(1, 5000),
    st.lists(st.integers(0, 1 << 40), max_size=9).map(tuple),
    st.just(512),
    text,
)
hashed_prompts = st.builds(
    HashedPrompt,
    st.integers(1, 5000),
    st.lists(st.binary(min_size=16, max_size=16).map(BlockHash), max_size=9).map(tuple),
    st.just(16),
)
prompts = token_prompts | traced_prompts | hashed_prompts
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 9000),
    temperature=number,
    top_k=maybe() | count,
    logit_bias=st.lists(st.tuples(count, number), max_size=3).map(tuple),
    seed=maybe() | st.integers(-(1 << 63), (1 << 63) - 1),
    stop_ids=ids,
    ignore_eos=st.booleans(),
)
slos = st.builds(Slo, ttft_s=maybe() | positive, deadline_s=maybe() | positive, weight=positive)
requests = st.builds(
    Request,
    id=text.map(RequestId),
    model=text,
    prompt=prompts,
    sampling=samplings,
    slo=slos,
    n=st.integers(1, 9),
    tenant=text,
    priority=st.integers(-9, 9),
    adapter=maybe() | text,
    kind=st.sampled_from(["generate", "embed", "score"]),
    parts=parts,
    true_output=maybe() | count,
)
logprobs = st.builds(
    TokenLogprob, count, number, st.lists(st.tuples(count, number), max_size=2).map(tuple)
)
outputs = st.builds(
    Output,
    st.integers(0, 9),
    ids,
    count,
    st.sampled_from([None, "stop", "length", "cancelled", "error"]),
    st.lists(logprobs, max_size=2).map(tuple),
    st.lists(maybe() | logprobs, max_size=2).map(tuple),
    count,
    maybe() | text,
)
reports = st.builds(
    Report,
    replica=text,
    at=number,
    role=st.sampled_from(["any", "prefill"]),
    is_alive=st.booleans(),
    num_running=count,
    step_s=number,
)
states = st.builds(
    JobState,
    num_output=count,
    output_ids=ids,
    filled=st.lists(st.binary(min_size=16, max_size=16).map(BlockHash), max_size=3).map(tuple),
    chance=maybe() | st.integers(0, (1 << 64) - 1),
    first_token_age_s=maybe() | number,
)
cards = st.builds(KvCard, layout=text, address=text, block_size=count, block_bytes=count)
plain = st.one_of(
    st.builds(Offer, count, text, st.booleans()),
    st.builds(Settle, count, text, st.sampled_from(["release", "resume", "confirm", "drop"])),
    st.builds(Take, count, text, states, st.booleans(), st.booleans(), st.none(), text, ids),
    st.builds(Offered, count, st.booleans(), maybe() | states, ids, maybe() | text),
    st.builds(Taken, count, st.booleans(), count, maybe() | text),
    st.builds(Cancel, text),
    st.builds(Drain),
    st.builds(Stop),
    st.builds(Outputs, st.lists(st.tuples(text, outputs), max_size=4).map(tuple)),
    st.builds(Refuse, text, text, text, text, maybe() | text, maybe() | positive),
    st.builds(Hello, reports, about=text, kv=maybe() | cards),
    st.builds(Say, reports),
    st.builds(Drained),
    st.builds(Failed, text, text, text),
)


@given(plain)
def test_messages_come_back_equal(message: object) -> None:
    back = codec.decode(codec.encode(message))
    assert type(back) is type(message)
    assert back == message


def told(prompt: TokenPrompt | TracedPrompt | HashedPrompt) -> list[object]:
    """All that a prompt is, but for the hashes it remembers."""
    return [getattr(prompt, name) for name in prompt.__slots__ if name != "_hashes"]


@given(requests, st.booleans())
@settings(max_examples=60)
def test_requests_come_back_equal_and_hash_alike(request: Request, every: bool) -> None:
    message = codec.decode(codec.encode(Submit(request, every)))
    assert isinstance(message, Submit) and message.every_token is every
    back = message.request
    assert type(back.prompt) is type(request.prompt)
    assert told(back.prompt) == told(request.prompt)  # type: ignore[arg-type]
    assert back.prompt.blocks(16) == request.prompt.blocks(16)
    names = [name for name in Request.__slots__ if name != "prompt"]
    assert [getattr(back, name) for name in names] == [getattr(request, name) for name in names]


def test_another_schema_major_is_refused_before_the_body_is_read() -> None:
    frame = codec.encode(Drain())
    with pytest.raises(SchemaMismatch):
        codec.decode(bytes([frame[0] + 1]) + frame[1:2] + b"nonsense")


@given(st.binary(max_size=60))
def test_noise_is_a_broken_frame_or_another_schema(noise: bytes) -> None:
    with pytest.raises((BrokenFrame, SchemaMismatch)):
        codec.decode(noise)


@given(plain, st.data())
@settings(max_examples=60)
def test_a_cut_frame_never_passes_for_a_message(message: object, data: st.DataObject) -> None:
    frame = codec.encode(message)
    end = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(BrokenFrame):
        codec.decode(frame[:end])


def test_only_the_given_kinds_are_read() -> None:
    with pytest.raises(BrokenFrame):
        Codec(Cancel).decode(codec.encode(Drain()))
