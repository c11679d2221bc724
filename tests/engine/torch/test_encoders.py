"""Encoders held to transformers, and vectors to sentence-transformers' formulas, alone and behind the real replica."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model

from penstock.core.errors import BadModel
from penstock.core.events import Arrived, Event, Finished, Stepped
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.engine.folder import model_facts
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.encoders.executor import EncoderExecutor
from penstock.engine.torch.encoders.model import Encoder, Text
from penstock.engine.torch.encoders.open import open_encoder
from penstock.engine.torch.encoders.pooling import Gathered
from penstock.engine.torch.open import open_executor, open_leaf
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy.admit.watermark import Watermark
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs
from tests.engine.torch.driver import Driver
from tests.engine.torch.encoders import ENCODERS, RANKERS, package, saved_encoder, states_of
from tests.engine.torch.models import SIZE
from tests.engine.torch.served import NoPredictions

TOLERANCE = 1e-5
ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1)
TEXTS = [[3 + (7 * at + place) % 500 for place in range(n)] for at, n in enumerate((5, 60, 17, 5, 180, 1))]  # fmt: skip


def numbers(vector: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(vector, "<f4").copy())


def run(made: Generator[object, None, list[bytes | None]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        while True:
            try:
                next(made)
            except StopIteration as end:
                return [numbers(vector) for vector in end.value]


def encoder_of(folder: Path) -> Encoder:
    return open_encoder(model_facts(folder), ENGINE)._model


@pytest.mark.parametrize("name", ENCODERS)
def test_states_are_the_references(model_root: Path, name: str) -> None:
    """Texts of several lengths in forwards of at most 128 tokens, two of one length; the longest alone."""
    folder, model = saved_encoder(model_root, name)
    package(folder, ["mean_tokens", "cls_token"], is_normed=False)
    found = run(encoder_of(folder).vectors([Text(ids) for ids in TEXTS], 128))
    for ids, vector in zip(TEXTS, found, strict=True):
        states = states_of(model, ids)
        want = torch.cat((states[0], states.mean(0)))
        assert (vector - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", RANKERS)
def test_labels_are_the_references(model_root: Path, name: str) -> None:
    """Of pairs, where the model tells the second text from the first."""
    folder, model = saved_encoder(model_root, name)
    second = 3 if name.startswith("bert") else None
    found = run(encoder_of(folder).vectors([Text(ids, second) for ids in TEXTS]))
    for ids, vector in zip(TEXTS, found, strict=True):
        told = {"input_ids": torch.tensor([ids])}
        if second is not None:
            told["token_type_ids"] = (torch.arange(len(ids)) >= second).long()[None]
        with torch.inference_mode():
            want = model(**told).logits[0]
        assert (vector - want).abs().max() < TOLERANCE


def test_the_heads_pooling_of_a_text_in_chunks() -> None:
    """Formulas of sentence-transformers over the states; a chunk that is run again counts once."""
    states = torch.randn(20, 8)
    weights = torch.arange(1, 21)[:, None].float()
    want = {
        "cls": states[0],
        "max": states.amax(0),
        "mean": states.mean(0),
        "mean_sqrt": states.sum(0) / 20**0.5,
        "weightedmean": (states * weights).sum(0) / weights.sum(),
        "last": states[-1],
    }
    gathered = Gathered(tuple(want), 20)  # type: ignore[arg-type]
    for start, stop in ((0, 7), (7, 12), (12, 20), (7, 12), (12, 13), (13, 20)):
        assert gathered.span(start, stop) == range(start, stop)
        gathered.add(states[start:stop], start)
    assert torch.allclose(gathered.pooled(), torch.cat(list(want.values())), atol=1e-6)
    assert Gathered(("last",), 20).span(7, 12) == range(19, 12)


def test_dense_layers_and_length(model_root: Path, tmp_path: Path) -> None:
    folder, model = saved_encoder(model_root, "distilbert")
    package(folder, ["max_tokens"])
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense, modules[2]]))
    (folder / "2_Dense").mkdir(exist_ok=True)
    weight, bias = torch.randn(24, 64), torch.randn(24)
    told = {"in_features": 64, "out_features": 24, "bias": True}
    told["activation_function"] = "torch.nn.modules.activation.Tanh"  # type: ignore[assignment]
    (folder / "2_Dense" / "config.json").write_text(json.dumps(told))
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense/model.safetensors")
    [vector] = run(encoder_of(folder).vectors([Text(TEXTS[1])]))
    want = torch.tanh(states_of(model, TEXTS[1]).amax(0) @ weight.T + bias)
    assert (vector - want / want.norm()).abs().max() < TOLERANCE


class Served:
    """Requests in; what their callers heard out."""

    def __init__(self, folder: Path, *, budget: int = 64, num_blocks: int | None = None) -> None:
        self.executor = open_leaf(str(folder), replace(ENGINE, num_blocks=num_blocks))
        self.told: dict[str, list[Output]] = {}
        self.events: list[Event] = []
        batch = VllmV1(max_tokens=budget)
        config = ReplicaConfig(num_blocks=self.executor.num_blocks, is_checked=True)
        policies = ReplicaPolicies(
            order=Fcfs(), admit=Watermark(), batch=batch, evict=RecomputeLast(), blocks=Lru()
        )
        predictors = Predictors(cost=NoPredictions(), lengths=NoPredictions())
        self.replica = Replica(
            config, self.executor, policies, predictors, log=self, on_outputs=self.hear
        )

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        for request, output in outputs:
            self.told.setdefault(request, []).append(output)

    async def embed(self, texts: Sequence[Sequence[int]], **more: object) -> list[Output]:
        """The only output of each."""
        running = asyncio.create_task(self.replica.run())
        for place, ids in enumerate(texts):
            told: dict[str, object] = {"kind": "embed", "model": "m", **more}
            self.replica.submit(Request(id=RequestId(f"{place}"), prompt=TokenPrompt(ids), **told))  # type: ignore[arg-type]
        await self.replica.drain()
        await self.replica.stop()
        await running
        assert self.replica.ledger.free == self.replica.ledger.total
        assert all(len(outputs) == 1 for outputs in self.told.values())
        return [self.told[f"{place}"][0] for place in range(len(texts))]


async def test_vectors_of_a_served_encoder(model_root: Path) -> None:
    """Chunks, and few blocks; equal texts are both computed."""
    folder, model = saved_encoder(model_root, "bert")
    package(folder, ["cls_token"])
    served = Served(folder, budget=64, num_blocks=16)
    texts = [*TEXTS, TEXTS[1]]
    for ids, output in zip(texts, await served.embed(texts), strict=True):
        want = states_of(model, ids)[0]
        assert (numbers(output.vector) - want / want.norm()).abs().max() < TOLERANCE
        assert output.finish == "stop" and output.num_cached == 0 and output.num_tokens == 0
    assert max(one.num_running for one in served.events if isinstance(one, Stepped)) > 1
    assert all(one.reason == "stop" for one in served.events if isinstance(one, Finished))
    assert all(one.is_scored for one in served.events if isinstance(one, Arrived))


async def test_a_text_as_long_as_the_model_takes(model_root: Path) -> None:
    """sentence-transformers' max_seq_length is the limit; RoBERTa's positions begin at 2."""
    folder, _ = saved_encoder(model_root, "roberta")
    package(folder, ["mean_tokens"], max_seq_length=254)
    assert model_facts(folder).max_context == 254
    [output] = await Served(folder).embed([[5] * 254])
    assert output.finish == "stop" and len(output.vector) == 4 * 64
    package(folder, ["mean_tokens"], max_seq_length=30)
    assert model_facts(folder).max_context == 30


async def test_what_an_encoder_cannot_do(model_root: Path) -> None:
    folder, _ = saved_encoder(model_root, "bert")
    for more, told in (
        ({"kind": "generate"}, "cannot generate"),
        ({"kind": "score"}, "cannot score"),
        ({"adapter": "x"}, "no adapters"),
    ):
        [output] = await Served(folder).embed([[3, 4]], **more)
        assert told in str(output.error)
    [output] = await Served(folder).embed([[3, 999]])
    assert "vocabulary of 512" in str(output.error)
    with pytest.raises(BadModel, match="an encoder: open_leaf"):
        open_executor(str(folder), ENGINE)
    leaf = open_leaf(str(folder), ENGINE)
    assert isinstance(leaf, EncoderExecutor)
    await leaf.stop()


async def test_cancelled_before_its_end(model_root: Path) -> None:
    folder, _ = saved_encoder(model_root, "bert")
    served = Served(folder)
    running = asyncio.create_task(served.replica.run())
    request = Request(id=RequestId("0"), model="m", prompt=TokenPrompt([5] * 180), kind="embed")
    served.replica.submit(request)
    served.replica.cancel("0")
    await served.replica.drain()
    await served.replica.stop()
    await running
    assert [output.finish for output in served.told["0"]] == ["cancelled"]


BROKEN: list[tuple[Callable[[dict[str, object]], object], str]] = [
    (lambda told: told.update(hidden_act="mish"), "mish"),
    (lambda told: told.update(position_embedding_type="relative_key"), "relative_key"),
    (lambda told: told.update(num_attention_heads=5), "5 heads"),
    (lambda told: told.update(is_decoder=True), "is_decoder"),
    (lambda told: told.update(vocab_size=500), "512, 64"),
]


@pytest.mark.parametrize(("change", "told"), BROKEN)
def test_broken_folders(
    model_root: Path, tmp_path: Path, change: Callable[[dict[str, object]], object], told: str
) -> None:
    folder, _ = saved_encoder(model_root, "bert")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(BadModel, match=told):
        open_encoder(model_facts(tmp_path), ENGINE)


def test_packages_that_are_refused(model_root: Path, tmp_path: Path) -> None:
    folder, _ = saved_encoder(model_root, "bert")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for module, told in (
        ({"path": "0_Transformer", "type": "x.Transformer"}, "lies in 0_Transformer"),
        ({"path": "1_CNN", "type": "x.CNN"}, "type x.CNN"),
        ({"path": "1_Pooling", "type": "x.Pooling"}, "is missing"),
    ):
        (tmp_path / "modules.json").write_text(json.dumps([module]))
        with pytest.raises(BadModel, match=told):
            model_facts(tmp_path)


def bare_decoder(folder: Path) -> Qwen3Model:
    """As Qwen's embedding models are saved: no head, names without a prefix."""
    torch.manual_seed(5)
    model = Qwen3Model(Qwen3Config(**{**SIZE, "head_dim": 32})).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("modes", [["lasttoken"], ["mean_tokens", "max_tokens"]])
async def test_a_decoder_that_embeds(tmp_path: Path, modes: list[str]) -> None:
    model = bare_decoder(tmp_path)
    package(tmp_path, modes)
    served = Served(tmp_path, budget=48, num_blocks=16)
    texts = [*TEXTS, TEXTS[4]]
    for ids, output in zip(texts, await served.embed(texts), strict=True):
        states = states_of(model, ids)
        want = states[-1] if modes == ["lasttoken"] else torch.cat((states.amax(0), states.mean(0)))
        assert (numbers(output.vector) - want / want.norm()).abs().max() < TOLERANCE
    assert all(one.num_cached == 0 for one in served.events if isinstance(one, Finished))


async def test_a_decoder_that_only_embeds_writes_no_text(tmp_path: Path) -> None:
    bare_decoder(tmp_path)
    served = Served(tmp_path, num_blocks=32)
    [output] = await served.embed([[3, 4]], kind="generate")
    assert "writes no text" in str(output.error)


async def test_embedding_beside_generation(tmp_path: Path, model_root: Path) -> None:
    """In one step of one engine: the text is what it is alone, and the vector of a served decoder is its last state."""
    from tests.engine.torch.models import saved

    folder, model = saved(model_root, "qwen3")
    executor = open_executor(str(folder), replace(ENGINE, num_blocks=40))
    driver = Driver(executor)
    alone = driver.job(TEXTS[1])
    await driver.finish([alone], 4)
    writes, embeds = driver.job(TEXTS[1]), driver.job(TEXTS[2], kind="embed")
    scored = driver.job(TEXTS[0], Sampling(max_tokens=1), kind="score")
    await driver.step([(writes, 60), (embeds, 10), (scored, 5)])
    await driver.step([(writes, 1), (embeds, 7)])
    assert writes.outputs == alone.outputs[:2]
    assert len(scored.sampled[0].prompt_logprobs) == 5
    with torch.inference_mode():
        want = model.model(torch.tensor([TEXTS[2]])).last_hidden_state[0, -1]
    assert (numbers(embeds.sampled[-1].vector) - want / want.norm()).abs().max() < TOLERANCE
    await executor.stop()
