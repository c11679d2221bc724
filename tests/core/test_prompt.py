"""Block hashes: equal exactly where KV may be shared, and the same in every process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.prompt import HashedPrompt, TokenPrompt, TracedPrompt
from penstock.core.types import Part

IDS = st.lists(st.integers(0, 200_000), min_size=1, max_size=80)


@given(IDS, IDS, IDS)
def test_hashes_agree_exactly_on_the_common_prefix(
    head: list[int], a: list[int], b: list[int]
) -> None:
    one, two = TokenPrompt(head + a), TokenPrompt(head + b)
    shared = 0
    for x, y in zip(head + a, head + b, strict=False):
        if x != y:
            break
        shared += 1
    hashes = one.blocks(4), two.blocks(4)
    assert [len(each) for each in hashes] == [(len(head + a)) // 4, (len(head + b)) // 4]
    for place, (x, y) in enumerate(zip(*hashes, strict=False)):
        assert (x == y) == ((place + 1) * 4 <= shared)


def test_what_decides_the_kv_decides_the_hash() -> None:
    ids = range(16)
    media = (Part(kind="image", digest=b"cat", start=5, num_tokens=2),)
    variants = [
        TokenPrompt(ids),
        TokenPrompt(ids, key=b"k" * 16),
        TokenPrompt(ids, adapter="lora"),
        TokenPrompt(ids, salt="tenant"),
    ]
    assert len({prompt.blocks(4)[0] for prompt in variants}) == len(variants)
    plain, pictured = TokenPrompt(ids).blocks(4), TokenPrompt(ids, parts=media).blocks(4)
    assert plain[0] == pictured[0] and plain[1] != pictured[1] and plain[3] != pictured[3]


@given(IDS, IDS)
def test_the_chain_goes_on_through_the_output(prompt: list[int], output: list[int]) -> None:
    started = TokenPrompt(prompt, salt="s")
    whole = TokenPrompt(prompt + output, salt="s").blocks(4)
    known = started.blocks(4)
    assert (*known, *started.extend(known, prompt + output, 4)) == whole


def test_hashes_are_the_same_in_another_process() -> None:
    code = "from penstock.core.prompt import TokenPrompt as T;print(T(range(32),key=b'k').blocks(16)[1].hex())"
    there = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert there == {TokenPrompt(range(32), key=b"k").blocks(16)[1].hex()}


def test_traced_prompts_share_what_the_trace_says() -> None:
    one, two = TracedPrompt(1200, (1, 2, 3)), TracedPrompt(1100, (1, 2, 9))
    assert len(one.blocks(16)) == 1200 // 16
    assert one.blocks(16)[:64] == two.blocks(16)[:64]
    assert not set(one.blocks(16)[64:]) & set(two.blocks(16)[64:])
    assert TracedPrompt(1200).blocks(16) == ()
    assert HashedPrompt(1200, one.blocks(16), 16).blocks(16) == one.blocks(16)


def test_traced_prompts_serve_larger_blocks_too() -> None:
    short, long = TracedPrompt(100, (1, 2, 3), 32), TracedPrompt(200, (1, 2, 3, 4, 5, 6), 32)
    assert len(short.blocks(64)) == 1 and len(long.blocks(64)) == 3
    assert short.blocks(64) == long.blocks(64)[:1]
    other = TracedPrompt(200, (1, 7, 3, 4), 32)
    assert not set(other.blocks(64)[:1]) & set(long.blocks(64))
    assert TracedPrompt(100, (1, 2, 3, 4), 32).blocks(128) == ()  # the fourth run is not full
    with pytest.raises(ValueError, match="nor is it a multiple"):
        short.blocks(48)


def test_hashes_of_a_trace_are_its_ids_and_places() -> None:
    prompt = TracedPrompt(2 * 512 + 70, (7, 1 << 40, 9), 512, "salt")
    told = [
        [7, 1 << 40, 9][place // 32].to_bytes(8, "big") + (place % 32).to_bytes(4, "big") + b"salt"
        for place in range(2 * 32 + 4)  # the last run has four full blocks
    ]
    assert list(prompt.blocks(16)) == told
    assert prompt.blocks(16) is prompt.blocks(16)
    assert (
        TracedPrompt(5000, (7,), 512).blocks(16)[-1] == told[31][:12]
    )  # no more than the trace names
