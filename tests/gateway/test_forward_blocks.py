"""Foreign servers that tell of their blocks, in the form of vLLM's events, on a real socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from penstock.cluster.told_blocks import ToldBlocks
from penstock.core.messages import BlockNews
from penstock.core.prompt import TokenPrompt
from penstock.gateway.text import TextModel
from penstock.net.kv_events import Cleared, Removed, Stored
from tests.gateway.test_forward import GOOD, ask, until
from tests.gateway.upstreams import Rude, config_of, front

SIZE = 4
IDS = list(range(100, 100 + 3 * SIZE))


def told() -> tuple[ToldBlocks, list[BlockNews]]:
    news: list[BlockNews] = []
    blocks = ToldBlocks("inproc://none", b"key")
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
