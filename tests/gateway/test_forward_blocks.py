"""Foreign servers that tell of their blocks, in the form of vLLM's events, on a real socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from msgspec import UNSET

from penstock.cluster.told_blocks import ToldBlocks
from penstock.core.messages import BlockNews
from penstock.core.prompt import TokenPrompt
from penstock.gateway.text import TextModel
from penstock.net.kv_events import Cleared, Removed, Stored, events_of
from tests.gateway.test_forward import GOOD, ask, until
from tests.gateway.upstreams import Rude, config_of, front

SIZE = 4
IDS = list(range(100, 100 + 3 * SIZE))


def told(adapter: str | None = None) -> tuple[ToldBlocks, list[BlockNews]]:
    news: list[BlockNews] = []
    blocks = ToldBlocks("inproc://none", b"key", lambda: adapter)
    blocks._on_news = news.append
    return blocks, news


def test_blocks_have_the_hashes_that_prompts_are_looked_up_by() -> None:
    blocks, news = told()
    hashes = TokenPrompt(IDS, key=b"key").blocks(SIZE)
    blocks.hear([Stored([11, b"22"], None, IDS[: 2 * SIZE], SIZE)])
    blocks.hear([Stored([33], b"22", IDS[2 * SIZE :], SIZE, None, "GPU")])
    assert news == [BlockNews(hashes[:2]), BlockNews(hashes[2:])]
    blocks.hear([Removed([33, 44]), Removed([11], "CPU"), Cleared()])
    assert [each.removed for each in news[2:]] == [hashes[2:], hashes[:2]]


def test_what_cannot_be_found_is_left_out() -> None:
    blocks, news = told()
    blocks.hear([Stored([2], 1, IDS[:SIZE], SIZE)])  # of a parent that was missed
    blocks.hear([Stored([3], None, IDS[:SIZE], SIZE, 7)])  # of an adapter
    blocks.hear([Stored([4], None, IDS[:SIZE], SIZE, None, "CPU")])
    blocks.hear([Stored([5], None, IDS[: SIZE - 1], SIZE)])
    assert news == []


def stored(theirs: int, keys: object = UNSET, **more: Any) -> Stored:
    """The first two blocks of IDS, with extra keys for each."""
    told = {"medium": "GPU", "extra_keys": keys, **more}
    return Stored([theirs, theirs + 1], None, IDS[: 2 * SIZE], SIZE, **told)


def test_a_salted_prompt_is_found_by_the_salt_that_is_told() -> None:
    blocks, news = told()
    plain, salted = (TokenPrompt(IDS, key=b"key", salt=salt).blocks(SIZE) for salt in ("", "mine"))
    blocks.hear([stored(1, [["mine"], None]), Stored([3], 2, IDS[2 * SIZE :], SIZE)])
    assert news == [BlockNews(salted[:2]), BlockNews(salted[2:])]
    blocks.hear([stored(11, [None, None])])
    assert news[2:] == [BlockNews(plain[:2])]
    blocks.hear([stored(21, [[["an image", 0]], None]), stored(31, [["mine", b"embedded"], None])])
    assert len(news) == 3, "neither of these is a prompt of text"
    blocks.hear([Cleared(), stored(41, [None, ["an image, as older versions name it"]])])
    assert news[-1] == BlockNews(plain[:1]), "its second block is not"


def test_where_salts_are_not_told_nothing_is_believed_once_there_are_any() -> None:
    blocks, news = told()
    blocks.hear([stored(1)])
    assert len(news) == 1
    blocks.note_salt()
    blocks.hear([stored(11), Stored([13], 12, IDS[2 * SIZE :], SIZE)])
    assert len(news) == 1, "it may be the salted one's"
    blocks.hear([Stored([3], 2, IDS[2 * SIZE :], SIZE)])
    assert len(news) == 2, "what follows a block that is known is known"


def test_an_adapters_blocks_are_found_by_its_prompts_and_by_no_others() -> None:
    (base, of_base), (tuned, of_tuned) = told(), told("tuned")
    events = [
        stored(1, [None, None]),
        stored(11, [["tuned"], ["tuned"]], lora_id=3, lora_name="tuned"),
        stored(21, [["tuned", "mine"], ["tuned"]], lora_id=3, lora_name="tuned"),
        stored(31, [["other"], ["other"]], lora_id=4, lora_name="other"),
        stored(41, lora_id=3),  # an old version: which adapter that is, it does not say
    ]
    base.hear(events)
    tuned.hear(events)
    plain, salted = (TokenPrompt(IDS, key=b"key", salt=salt).blocks(SIZE) for salt in ("", "mine"))
    assert of_base == [BlockNews(plain[:2])]
    assert of_tuned == [BlockNews(plain[:2]), BlockNews(salted[:2])]
    tuned.hear([Removed([1, 31]), Removed([12], None, 1), Removed([12])])
    assert of_tuned[2:] == [BlockNews((), plain[1:2])]


def test_events_are_maps_or_lists() -> None:
    """Versions write them either way; fields that are not known here are passed over."""
    fields = {
        "type": "BlockStored", "block_hashes": [b"1"], "parent_block_hash": None, "token_ids": [5, 6], "block_size": 2,
        "lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": [["s"]], "kv_cache_spec_kind": "full",
    }  # fmt: skip
    wanted = Stored([b"1"], None, [5, 6], 2, None, "GPU", None, [["s"]])
    maps = msgspec.msgpack.encode({"ts": 1.0, "events": [fields, {"type": "AllBlocksCleared"}]})
    assert events_of(maps) == [wanted, Cleared()]
    short = ["BlockStored", [b"1"], None, [5, 6], 2, None, "GPU", None, [["s"]], 0, "full", None]
    (found,) = events_of(msgspec.msgpack.encode([1.0, [short], 0]))
    assert isinstance(found, Stored) and found.extra_keys == [["s"]] and found.group_idx == 0
    (mixed,) = events_of(msgspec.msgpack.encode([1.0, [fields]]))
    assert mixed == wanted
    (old,) = events_of(msgspec.msgpack.encode([1.0, [["BlockStored", [1], None, [5, 6], 2, None]]]))
    assert isinstance(old, Stored) and old.extra_keys is UNSET
    with pytest.raises(msgspec.DecodeError):
        events_of(b"\xc0")


async def test_prompts_go_where_their_blocks_are_told_to_be(folder: Path, text: TextModel) -> None:
    metrics = f'vllm:cache_config_info{{block_size="{SIZE}",num_gpu_blocks="100"}} 1.0\n'
    one, two = Rude(GOOD, metrics=metrics), Rude(GOOD, metrics=metrics)
    socket = zmq.asyncio.Context.instance().socket(zmq.PUB)
    endpoint = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
    chat = [{"role": "user", "content": "a long question about the quick brown fox " * 4}]
    ids = text.encode(text.render(chat), add_special=False)
    count = len(ids) // SIZE
    stored = [
        "BlockStored",
        list(range(count)),
        None,
        ids[: count * SIZE],
        SIZE,
        None,
        "GPU",
        None,
        [None] * count,
        0,
        "new",
    ]

    async with one.up() as first, two.up() as second:
        config = config_of(
            [first, second],
            "fleet.0.policy.route=kv-aware",
            tokenizer=str(folder),
            kv_events={second: endpoint},
        )
        async with front(config) as at:
            index: Any = at.service.fleet("m")._router.sight.blocks
            number = 0

            async def publish(*events: list[object]) -> None:
                nonlocal number
                batch = msgspec.msgpack.encode([1.5, events, 0])
                await socket.send_multipart([b"kv-events", number.to_bytes(8, "big"), batch])
                number += 1
                await asyncio.sleep(0.02)

            while not index.told("m-1"):  # until the subscription has come through
                await publish(stored)
            assert len(index.told("m-1")) == count and not index.told("m-0")
            for _ in range(3):
                assert (await ask(at, messages=chat))[0] == 200
            assert (len(one.bodies), len(two.bodies)) == (0, 3)
            await publish(["BlockRemoved", [count - 1]])
            await until(lambda: len(index.told("m-1")) == count - 1)
            number += 5  # what came between was missed
            await publish(["BlockRemoved", [count + 7]])
            await until(lambda: not index.told("m-1"))
            await publish(stored)
            await until(lambda: len(index.told("m-1")) == count)
            await publish(["AllBlocksCleared"])
            await until(lambda: not index.told("m-1"))
            status, body = await ask(at, messages=[{"role": "no such role", "content": None}])
            assert status == 200 and json.dumps("two") in body.decode()  # the server judges it
    socket.close(0)
