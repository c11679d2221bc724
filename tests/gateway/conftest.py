"""A small byte-level model folder, and gateways over it on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock.core.types import Request
from penstock.gateway.app import Gateway, create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import Server, listen, url_of
from penstock.gateway.text import TextModel
from tests.gateway.scripted import Scripted

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 512
ANSWER = "Hello world, żółw 🐢 said: the quick brown fox.\nBye"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: tokenizer, configs, chat template."""
    place = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"],
        show_progress=False,
    )
    words = [
        "Hello world, the quick brown fox said: Hello again",
        "def add(a, b):\n    return a + b\n",
    ]
    tokenizer.train_from_iterator(words * 5, trainer)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT}))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    (place / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE})
    )
    return place


@pytest.fixture(scope="session")
def text(folder: Path) -> TextModel:
    return TextModel.load(folder)


@pytest.fixture(scope="session")
def answer_ids(text: TextModel) -> list[int]:
    """ANSWER and the end mark."""
    return [*text.encode(ANSWER), 0]


@pytest.fixture
def service(answer_ids: list[int]) -> Scripted:
    def script(request: Request, answer: int) -> list[int]:
        return answer_ids

    return Scripted(script)


Start = Callable[..., str]


@pytest.fixture
def start(text: TextModel) -> Iterator[Start]:
    """`start(service, speaks=None, **config)` serves on a free port in a thread; the URL comes back."""
    with contextlib.ExitStack() as stack:

        def run(service: Scripted, speaks: TextModel = text, **settings: object) -> str:
            config = GatewayConfig(host="127.0.0.1", port=0, **settings)  # type: ignore[arg-type]
            app = create_app(service, dict.fromkeys(service.names, speaks), config)
            return stack.enter_context(serving(app))

        yield run


@contextlib.contextmanager
def serving(app: Gateway) -> Iterator[str]:
    """A real server in a thread of its own."""
    listener = listen(app.config.host, app.config.port)
    server = Server(app)
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server._serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield url_of(listener)
    finally:
        if thread.is_alive():
            for _ in range(2):
                loops[0].call_soon_threadsafe(server.stop)
        thread.join()
        listener.close()
