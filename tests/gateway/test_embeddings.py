"""The official client's embeddings, and rerankers: what is asked of the service, and how vectors are told."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from penstock.core.errors import BadModel
from penstock.core.ports import OnOutput
from penstock.core.types import Output, Request
from penstock.gateway.text import TextModel
from tests.gateway.conftest import Start
from tests.gateway.scripted import Scripted
from tests.gateway.test_openai_client import client_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "query", ":"]
WIDTH = 8
CONTEXT = 16


class Reads(Scripted):
    """Answers with a vector that tells what was asked; `says` are a ranker's scores, in order."""

    def __init__(self, says: Sequence[float] | None = None, step_s: float = 0.0) -> None:
        super().__init__(lambda request, answer: [], step_s=step_s)
        self._says = says

    async def _speak(self, request: Request, on_output: OnOutput | None) -> None:
        await asyncio.sleep(self.step_s)
        assert request.kind == "embed" and on_output is not None
        if self._says is not None:
            told = [self._says[int(request.id.rpartition("-")[2])]]
        else:
            told = vector_of(list(request.prompt.ids)).tolist()  # type: ignore[attr-defined]
        on_output(Output(0, (), 0, "stop", vector=np.array(told, "<f4").tobytes()))


def vector_of(ids: list[int]) -> np.ndarray:
    raw = np.array([len(ids), *ids, *[0] * WIDTH][:WIDTH], np.float32)
    return raw / np.linalg.norm(raw)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)  # as published files have it
    tokenizer.save(str(place / "tokenizer.json"))
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 10, "hidden_size": WIDTH,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    module = {"path": "", "type": "sentence_transformers.models.Transformer"}
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    norm = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
    (place / "modules.json").write_text(json.dumps([module, pooling, norm]))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    told = {"max_seq_length": CONTEXT, "do_lower_case": True}
    (place / "sentence_bert_config.json").write_text(json.dumps(told))
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    (place / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return place


@pytest.fixture(scope="session")
def encoder(encoder_folder: Path) -> TextModel:
    return TextModel.load(encoder_folder)


@pytest.fixture(scope="session")
def ranker(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    place = tmp_path_factory.mktemp("ranker")
    (place / "tokenizer.json").write_text((encoder_folder / "tokenizer.json").read_text())
    config = json.loads((encoder_folder / "config.json").read_text())
    config.update(
        architectures=["BertForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        max_position_embeddings=CONTEXT,
    )
    (place / "config.json").write_text(json.dumps(config))
    return TextModel.load(place)


@pytest.fixture
def reads() -> Reads:
    return Reads()


@pytest.fixture
def url(start: Start, reads: Reads, encoder: TextModel) -> str:
    return start(reads, encoder)


@pytest.fixture
def client(url: str) -> OpenAI:
    return client_of(url)


def test_one_text(client: OpenAI, reads: Reads) -> None:
    """The client asks for base64 by itself and gives numbers."""
    told = client.embeddings.create(model="tiny", input="A b c")
    assert told.object == "list" and told.model == "tiny"
    assert np.allclose(told.data[0].embedding, vector_of([2, 4, 5, 6, 3]), atol=1e-7)
    assert (told.data[0].object, told.data[0].index) == ("embedding", 0)
    assert told.usage.prompt_tokens == told.usage.total_tokens == 5
    assert reads.requests[0].sampling.max_tokens == 1 and reads.requests[0].n == 1


@pytest.mark.parametrize("spelt", ["float", "base64"])
def test_spelling(url: str, spelt: str) -> None:
    body = {"model": "tiny", "input": "a", "encoding_format": spelt}
    found = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    if spelt == "base64":
        found = np.frombuffer(base64.b64decode(found), "<f4")
    assert np.array_equal(np.array(found, np.float32), vector_of([2, 4, 3]))


@pytest.mark.parametrize(
    ("told", "ids"),
    [
        (["a", "b"], [[2, 4, 3], [2, 5, 3]]),
        ([4, 5], [[4, 5]]),
        ([[4, 5], [6]], [[4, 5], [6]]),
    ],
)
def test_several(client: OpenAI, reads: Reads, told: Any, ids: list[list[int]]) -> None:
    found = client.embeddings.create(model="tiny", input=told)
    assert [request.prompt.ids for request in reads.requests] == [tuple(one) for one in ids]  # type: ignore[attr-defined]
    assert [one.index for one in found.data] == list(range(len(ids)))
    for one, own in zip(found.data, ids, strict=True):
        assert np.allclose(one.embedding, vector_of(own), atol=1e-7)
    assert len({request.id for request in reads.requests}) == len(ids)


def test_dimensions(client: OpenAI) -> None:
    """The first ones, of length one again: what a model trained for several widths is made for."""
    told = client.embeddings.create(model="tiny", input="a b c", dimensions=3)
    want = vector_of([2, 4, 5, 6, 3])[:3]
    assert np.allclose(told.data[0].embedding, want / np.linalg.norm(want), atol=1e-7)
    with pytest.raises(openai.BadRequestError, match="8 numbers") as caught:
        client.embeddings.create(model="tiny", input="a", dimensions=9)
    assert caught.value.param == "dimensions"


def test_prompts_by_name(url: str, reads: Reads) -> None:
    body = {"model": "tiny", "input": "a", "prompt_name": "query"}
    assert httpx.post(f"{url}/v1/embeddings", json=body).status_code == 200
    assert reads.requests[0].prompt.ids == (2, 8, 9, 4, 3)  # type: ignore[attr-defined]
    told = httpx.post(f"{url}/v1/embeddings", json={**body, "prompt_name": "doc"})
    assert told.status_code == 400 and "query, document" in told.json()["error"]["message"]


def test_long_texts(client: OpenAI, reads: Reads) -> None:
    """As long as the package says; cut only if asked, and the marks stay."""
    for whole in ("a " * (CONTEXT - 2), [4] * CONTEXT):
        client.embeddings.create(model="tiny", input=whole)
    for told in ("a " * (CONTEXT - 1), [4] * (CONTEXT + 1)):
        with pytest.raises(openai.BadRequestError, match="at most 16 tokens") as caught:
            client.embeddings.create(model="tiny", input=told)
        assert caught.value.code == "context_length_exceeded"
    for limit, count in ((-1, CONTEXT), (5, 5)):
        extra = {"truncate_prompt_tokens": limit}
        client.embeddings.create(model="tiny", input="a b c d " * 500, extra_body=extra)
        ids = reads.requests[-1].prompt.ids  # type: ignore[attr-defined]
        assert (len(ids), ids[0], ids[1:4], ids[-1]) == (count, 2, (4, 5, 6), 3)
    for limit in (0, 2, 17, -2):
        with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens"):
            extra = {"truncate_prompt_tokens": limit}
            client.embeddings.create(model="tiny", input="a", extra_body=extra)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"input": []}, "may not be empty or mixed"),
        ({"input": ["a", 4]}, "may not be empty or mixed"),
        ({"input": [[]]}, "at least one token"),
        ({"input": [[99]]}, "between 0 and 9"),
        ({}, "'input' is missing"),
        ({"input": "a", "dimension": 4}, "did you mean 'dimensions'"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": ["a"] * 1025}, "1 to 1024 texts"),
    ],
)
def test_faults(url: str, body: dict[str, object], told: str) -> None:
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", **body})
    assert answer.status_code == 400 and told in answer.json()["error"]["message"]


def test_what_a_model_cannot_do(start: Start, client: OpenAI, ranker: TextModel) -> None:
    with pytest.raises(openai.BadRequestError, match="use /v1/embeddings"):
        client.completions.create(model="tiny", prompt="a")
    with pytest.raises(openai.BadRequestError, match="use /v1/embeddings"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    judge = start(Reads([0.0]), ranker)
    with pytest.raises(openai.BadRequestError, match="use /v1/rerank"):
        client_of(judge).embeddings.create(model="tiny", input="a")


def test_a_decoder_embeds_too(start: Start, text: TextModel) -> None:
    reads = Reads()
    client_of(start(reads)).embeddings.create(model="tiny", input="Hello")
    assert list(reads.requests[0].prompt.ids) == text.encode("Hello")  # type: ignore[attr-defined]


def test_rerank(start: Start, ranker: TextModel) -> None:
    service = Reads([-1.0, 2.0, 0.5])
    body = {"query": "a b", "documents": ["c", {"text": "d d"}, "a"], "top_n": 2}
    url = start(service, ranker)
    told = httpx.post(f"{url}/v1/rerank", json={**body, "return_documents": True}).json()
    assert [one["index"] for one in told["results"]] == [1, 2]
    assert told["results"][0]["document"] == {"text": "d d"}
    assert math.isclose(told["results"][0]["relevance_score"], 1 / (1 + math.exp(-2)))
    first = service.requests[1]
    assert first.prompt.ids == (2, 4, 5, 3, 7, 7, 3) and first.second_at == 4  # type: ignore[attr-defined]
    assert told["usage"]["total_tokens"] == 6 + 7 + 6


def test_score_and_cutting(start: Start, ranker: TextModel) -> None:
    service = Reads([0.0] * 9)
    url = start(service, ranker)
    body = {"text_1": "a", "text_2": ["c " * 40, "d"], "truncate_prompt_tokens": -1}
    told = httpx.post(f"{url}/v1/score", json=body).json()
    assert [one["score"] for one in told["data"]] == [0.5, 0.5]
    assert service.requests[0].prompt.num_tokens == CONTEXT
    for more, why in (
        ({"truncate_prompt_tokens": None}, "at most 16 tokens"),
        ({"text_1": "a " * 20}, "leaves no room"),
        ({"text_1": ["a", "b", "c"]}, "3 texts and text_2 2"),
    ):
        answer = httpx.post(f"{url}/v1/score", json={**body, **more})
        assert answer.status_code == 400 and why in answer.json()["error"]["message"]


def test_metrics(url: str, client: OpenAI) -> None:
    client.embeddings.create(model="tiny", input=["a", "b c"])
    told = httpx.get(f"{url}/metrics").text
    for line in (
        'penstock:prompt_tokens_total{model_name="tiny"} 7.0',
        'penstock:request_success_total{finished_reason="stop",model_name="tiny"} 2.0',
        'penstock:e2e_request_latency_seconds_count{model_name="tiny"} 1.0',
        'penstock:num_requests_in_flight{model_name="tiny"} 0.0',
        'penstock:generation_tokens_total{model_name="tiny"} 0.0',
    ):
        assert line in told


async def test_a_caller_that_leaves(start: Start, encoder: TextModel) -> None:
    service = Reads(step_s=20.0)
    url = start(service, encoder)
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": "tiny", "input": ["a", "b"]}
            await client.post(f"{url}/v1/embeddings", json=body, timeout=0.5)
    for _ in range(200):
        if len(service.cancelled) == 2:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the texts were read on")


def test_a_prompt_that_is_not_there(encoder_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "modules.json", "sentence_bert_config.json"):
        (tmp_path / name).write_text((encoder_folder / name).read_text())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    told = {"prompts": {}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(told))
    with pytest.raises(BadModel, match="no prompt 'query'"):
        TextModel.load(tmp_path)
