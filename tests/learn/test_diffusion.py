# ruff: noqa: E402
"""The masked objective against what it must be on average, pages, and a trained model that the engine opens."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from penstock.core.types import CanvasRule
from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.diffusion.canvas import Canvas
from penstock.engine.torch.diffusion.open import open_diffusion
from penstock.learn.local.corpus import Corpus, Document
from penstock.learn.local.diffusion import SMALL, learned, train_diffusion
from penstock.learn.local.masked import MaskedDecoder, drawn_noise
from penstock.learn.local.registers import RECAPS, facts, halves, page, pages
from penstock.learn.local.stream import prepare

SHAPE = replace(
    SMALL.shape,
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
TINY = replace(
    SMALL, shape=SHAPE, steps=12, tokens_per_step=256, tokens_at_once=256, contexts=((1.0, 64),)
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary() -> None:
    """Whatever is masked: the weights 1/p make it the likelihood of all tokens on average."""
    torch.manual_seed(0)
    model = MaskedDecoder(SHAPE)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        ids = torch.randint(299, (32, 60))
        chance = torch.Generator().manual_seed(0)
        losses = [float(model.diffusion_loss(ids, drawn_noise(ids, chance))) for _ in range(8)]
    assert sum(losses) / 8 == pytest.approx(math.log(300), rel=0.05)


def test_shares_are_spread_evenly_and_prompts_stay() -> None:
    chance = torch.Generator().manual_seed(0)
    noise = drawn_noise(torch.zeros(200, 300, dtype=torch.int64), chance)
    assert sorted((noise.share[:, 0] * 200).floor().tolist()) == pytest.approx(
        list(range(200)), abs=1.01
    )
    assert not (noise.is_masked & ~noise.may_be).any()
    assert noise.may_be[::2].all()
    assert (~noise.may_be[1::2]).float().mean() == pytest.approx(0.5, abs=0.1)
    told = (noise.is_masked.sum(1) / noise.may_be.sum(1))[noise.may_be.sum(1) > 100]
    wanted = noise.share[:, 0][noise.may_be.sum(1) > 100]
    assert (told - wanted).abs().max() < 0.2


def test_every_position_sees_every_other() -> None:
    torch.manual_seed(0)
    model = MaskedDecoder(SHAPE)
    for layer in model.model.layers:  # they write nothing at the beginning
        torch.nn.init.normal_(layer.self_attn.o_proj.weight)
    ids = torch.randint(299, (1, 20))
    is_masked = torch.zeros(1, 20, dtype=torch.bool)
    is_masked[0, 3] = True
    before = model.masked_logits(ids, is_masked)
    for place in (0, 19):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 299
        assert (model.masked_logits(other, is_masked) - before).abs().max() > 1e-4
    other = ids.clone()
    other[0, 3] += 1
    assert torch.equal(model.masked_logits(other, is_masked), before)


def test_pages_tell_their_lists_again() -> None:
    text = page(random.Random(3))
    head, told = halves(text)
    assert head + told == text and head.endswith(":")
    listed = [line[2:].split(": ")[0] for line in head.splitlines() if line.startswith("- ")]
    recaps = [line for line in text.splitlines() if line.split(":")[0] in RECAPS]
    assert len(recaps) == 3
    for recap in recaps:
        assert [part.split()[0] for part in recap.split(": ")[1].split(", ")] == listed
    told = [[text[start:end].strip() for start, end in spans] for spans in facts(text)]
    wanted = [{line.split(":")[0]: line for line in recaps}[recap] for recap in RECAPS]
    assert told == [
        [part.split()[1].rstrip(".") for part in line.split(": ")[1].split(", ")] for line in wanted
    ]
    assert pages(3, seed=1) == pages(3, seed=1) != pages(3, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diffusion")
    held = Document("held.py", "def held(value):\n    return value\n" * 60, "code")
    corpus = Corpus(tuple(pages(60, seed=1)), (*pages(12, seed=2), held))
    return train_diffusion(root / "out", runs=root / "runs", recipe=TINY, corpus=corpus)


def test_a_run_learns_and_says_what_it_knows(folder: Path) -> None:
    rows = [
        [float(cell.strip(" %")) for cell in line.split("|")[2:-1]]
        for line in (folder / "README.md").read_text().splitlines()
        if line.startswith(("| pages", "| facts"))
    ]
    assert [row[0] for row in rows][:3] == [15, 50, 85] and len(rows) == 4
    assert all(row[3] < math.log(300) - 0.2 for row in rows)  # nats
    assert all(0 <= row[1] <= 100 and 3 < row[2] < 40 for row in rows)  # right, unigram
    kinds = [json.loads(line)["kind"] for line in (folder / "held_out.jsonl").open()]
    assert kinds == ["pages"] * 12 + ["sources"]


def test_the_same_seed_learns_the_same(tmp_path: Path) -> None:
    text = Corpus(tuple(pages(20, seed=1)), tuple(pages(2, seed=2)))
    prepared = prepare(text, tmp_path, vocab_size=299, chat_share=0.0, seed=0)
    recipes = [replace(TINY, steps=2, seed=seed) for seed in (0, 0, 1)]
    found = [learned(recipe, prepared).model.embed_tokens.weight for recipe in recipes]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_engine_opens_what_was_trained_and_computes_the_same(folder: Path) -> None:
    from safetensors.torch import load_file

    from penstock.engine.torch.diffusion.open import llada_name

    model = MaskedDecoder(SHAPE)
    saved = load_file(folder / "model.safetensors")
    model.load_state_dict({name: saved[llada_name(name)].float() for name in model.state_dict()})
    ids = torch.arange(5, 45)[None]
    is_masked = torch.zeros(1, 40, dtype=torch.bool)
    is_masked[0, 32:] = True
    with torch.no_grad():
        want = model.masked_logits(ids, is_masked)
        want[:, model.mask_id] = -torch.inf
    config = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=8)
    opened = open_diffusion(model_facts(folder), config)[0]
    rule = CanvasRule(block_tokens=8, steps=1, retention=1.0)
    canvas = Canvas.begun(ids[0, :32].tolist(), 8, rule, opened.mask_id, None)
    for _ in opened.step([(canvas, "full")]):
        pass
    assert canvas.ids[32:].tolist() == want.argmax(-1).tolist()
