"""Diffusion language models: against transformers, across phases, neighbours and slices, and what retention costs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.core.types import CanvasRule, Phase
from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.diffusion.attention import most_useful
from penstock.engine.torch.diffusion.canvas import Canvas
from penstock.engine.torch.diffusion.families import read_canvassed
from penstock.engine.torch.diffusion.model import Counts, DiffusionModel
from penstock.engine.torch.diffusion.open import open_diffusion
from penstock.engine.torch.diffusion.unmask import Noise, guess
from tests.engine.torch.canvases import (
    CONFIGS,
    MASK,
    cached_logits,
    dense_answer,
    dense_logits,
    saved_canvas,
)

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=128)
PROMPTS = ([3, 4, 5, 6, 7], [9] * 20, [11 + (7 * at) % 400 for at in range(33)])
EVERY = CanvasRule(block_tokens=8, steps=8, delay=0, refresh_every=1, retention=1.0)
USUAL = CanvasRule(block_tokens=8, steps=8, retention=1.0)
T = TypeVar("T")


def opened(root: Path, name: str, row_cap: int = 1024) -> DiffusionModel:
    return open_diffusion(model_facts(saved_canvas(root, name)[0]), ENGINE, row_cap=row_cap)[0]


def run(step: Generator[object, None, T]) -> T:
    while True:
        try:
            next(step)
        except StopIteration as end:
            value: T = end.value
            return value


def begun(
    prompt: Sequence[int], rule: CanvasRule, first_slot: int = 0, num_masks: int = 24
) -> Canvas:
    canvas = Canvas.begun(list(prompt), num_masks, rule, MASK, None)
    canvas.slots = torch.arange(first_slot, first_slot + len(canvas.ids)).flip(0)  # in no order
    return canvas


def advance(model: DiffusionModel, canvases: Sequence[Canvas]) -> list[Phase]:
    """One step of all; the phases it ran them in."""
    phases = [canvas.rule.phase(canvas.step) for canvas in canvases]
    run(model.step(list(zip(canvases, phases, strict=True))))
    return phases


def finished(model: DiffusionModel, canvases: Sequence[Canvas]) -> list[list[int]]:
    while True:
        open_ones = [canvas for canvas in canvases if not canvas.is_over]
        if not open_ones:
            return [canvas.ids[canvas.num_prompt :].tolist() for canvas in canvases]
        advance(model, open_ones)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_logits_are_those_of_transformers_without_a_causal_mask(
    model_root: Path, name: str
) -> None:
    model, reference = opened(model_root, name), saved_canvas(model_root, name)[1]
    found: list[Tensor] = []

    canvas = begun(PROMPTS[2], EVERY)
    ids, here = canvas.ids.clone(), canvas.masked()
    kind = type(model.decoder)
    model.decoder.__class__ = type(
        "Noted",
        (kind,),
        {"__slots__": (), "logits": lambda self, x: noted_by(kind, self, x, found)},
    )
    advance(model, [canvas])
    want = dense_logits(reference, ids, name == "dream")[here]
    assert (found[0] - want).abs().max() < 2e-5


def noted_by(kind: type, decoder: object, hidden: Tensor, found: list[Tensor]) -> Tensor:
    logits: Tensor = kind.logits(decoder, hidden)  # type: ignore[attr-defined]
    found.append(logits.clone())
    return logits


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("steps", [8, 3])
@pytest.mark.parametrize("threshold", [None, 0.05])
def test_the_answer_is_the_dense_one_where_every_step_refreshes(
    model_root: Path, name: str, steps: int, threshold: float | None
) -> None:
    rule = replace(EVERY, steps=steps, threshold=threshold)
    model, reference = opened(model_root, name), saved_canvas(model_root, name)[1]
    for prompt in PROMPTS:
        want = dense_answer(reference, list(prompt), 24, rule, name == "dream")
        assert finished(model, [begun(prompt, rule)]) == [want]


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_reuse_with_all_kept_sees_what_a_dense_cache_holds(model_root: Path, name: str) -> None:
    """The step after a refresh: keys outside the block as of then, queries and keys of the block as of now."""
    model, reference = opened(model_root, name), saved_canvas(model_root, name)[1]
    canvas = begun(PROMPTS[1], replace(USUAL, delay=0))
    assert advance(model, [canvas]) == ["refresh"]
    stale = canvas.ids.clone()
    stale[canvas.block[0] : canvas.block[1]] = MASK  # what the refresh saw
    start, end = canvas.block
    now, here = canvas.ids[start:end].clone(), canvas.masked()
    want = cached_logits(reference, stale, now, start, name == "dream")[here - start]
    want[:, MASK] = -torch.inf
    assert advance(model, [canvas]) == ["reuse"]
    told = (here - start)[~canvas.is_masked[here]]
    assert len(told) == 1
    best = want.softmax(-1).max(-1)
    place = int(best.values.argmax())
    assert int(canvas.ids[here[place]]) == int(best.indices[place])
    assert not canvas.is_masked[here[place]]


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("often", [{}, {"delay": 0, "refresh_every": 3}])
def test_answers_that_keep_all_are_those_of_a_dense_cache(
    model_root: Path, name: str, often: dict[str, int]
) -> None:
    """Retention 1 through whole answers, against transformers' cache."""
    rule = replace(USUAL, **often)
    model, reference = opened(model_root, name), saved_canvas(model_root, name)[1]
    for prompt in PROMPTS[:2]:
        want = dense_answer(reference, list(prompt), 24, rule, name == "dream")
        assert finished(model, [begun(prompt, rule)]) == [want]


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_neighbours_and_slices_do_not_change_an_answer(model_root: Path, name: str) -> None:
    """Each begins when the one before is some steps ahead, so phases are mixed."""
    rule = replace(USUAL, retention=0.5)
    alone = [finished(opened(model_root, name), [begun(p, rule)])[0] for p in PROMPTS]
    for row_cap in (1, 5, 1024):
        model = opened(model_root, name, row_cap)
        canvases, mixed = [], set()
        for place, prompt in enumerate(PROMPTS):
            canvases.append(begun(prompt, rule, 100 * place))
            for _ in range(place + 1):
                mixed.add(tuple(advance(model, canvases)))
        assert any(len(set(phases)) > 1 for phases in mixed)
        assert finished(model, canvases) == alone


def test_a_wiped_block_is_written_again(model_root: Path) -> None:
    model = opened(model_root, "llada")
    [want] = finished(model, [begun(PROMPTS[0], USUAL)])
    canvas = begun(PROMPTS[0], USUAL)
    for _ in range(11):
        advance(model, [canvas])
    canvas.wipe()
    assert canvas.num_done == 8 and len(canvas.masked()) == 8
    assert finished(model, [canvas]) == [want]


def test_heads_keep_what_their_own_queries_need() -> None:
    torch.manual_seed(0)
    q, keys = torch.randn(8, 4, 16), torch.randn(2, 30, 16)
    found = most_useful(q, keys, 10)
    for head in range(2):
        mean = q[:, 2 * head : 2 * head + 2].mean(0)
        scores = (mean @ keys[head].T).max(0).values
        pooled = [float(scores[max(0, at - 1) : at + 2].max()) for at in range(30)]
        best = sorted(range(30), key=lambda at: (-pooled[at], at))[:10]
        assert found[head].tolist() == sorted(best)
    assert found[0].tolist() != found[1].tolist()


def test_what_is_not_kept_is_not_seen(model_root: Path) -> None:
    """With half retained, answers differ from the dense ones at some places, and what is stored is half."""
    model = opened(model_root, "llada")
    rule = replace(USUAL, retention=0.5)
    [dense], [sparse] = (finished(model, [begun(PROMPTS[2], each)]) for each in (USUAL, rule))
    agreed = sum(a == b for a, b in zip(dense, sparse, strict=True))
    assert 0 < agreed < len(dense)
    canvas = begun(PROMPTS[2], rule)
    assert len(canvas.kept()) == 25  # half of 33 + 24 - 8, rounded up


def test_logits_are_made_for_masked_positions_of_active_blocks(model_root: Path) -> None:
    model = opened(model_root, "llada", row_cap=6)
    canvas, counts = begun(PROMPTS[2], USUAL), Counts()
    run(model.step([(canvas, "full")], counts))
    assert counts == Counts(query_tokens=57, logit_rows=8, most_rows=6)
    run(model.step([(canvas, "refresh")], counts))
    run(model.step([(canvas, "reuse")], counts))
    assert counts == Counts(query_tokens=8, logit_rows=6, most_rows=6)


def peak_bytes(hidden: Tensor, head: Tensor, row_cap: int) -> int:
    """The most that is allocated at once, as the allocator tells it."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        guess(hidden, lambda rows: rows @ head, mask_id=0, row_cap=row_cap)
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_the_peak_of_logits_is_that_of_one_slice() -> None:
    """Vocabulary of 32k: 512 rows at once, and 32 at a time."""
    torch.manual_seed(0)
    hidden, head = torch.randn(512, 16), torch.randn(16, 32_000)
    whole, sliced = (peak_bytes(hidden, head, cap) for cap in (512, 32))
    row = 32_000 * 4
    assert whole >= 512 * row
    assert 32 * row <= sliced <= 3 * 32 * row
    assert whole / sliced > 10


def test_noise_belongs_to_the_answer() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(12, 16), torch.randn(16, 50)

    def drawn(temperature: float, cap: int, seed: int) -> list[int]:
        noise = Noise(temperature, torch.Generator().manual_seed(seed))
        told = guess(hidden, lambda rows: rows @ head, mask_id=0, row_cap=cap, noise=[noise] * 12)
        logits = hidden @ head
        logits[:, 0] = -torch.inf
        want = logits.softmax(-1).gather(1, told.tokens[:, None])[:, 0]
        assert torch.allclose(told.confidence, want)
        found: list[int] = told.tokens.tolist()
        return found

    assert drawn(1.0, 12, 3) == drawn(1.0, 5, 3) != drawn(1.0, 12, 4)
    plain = guess(hidden, lambda rows: rows @ head, mask_id=0, row_cap=12)
    assert drawn(1e-6, 12, 3) == plain.tokens.tolist()
    assert 0 not in drawn(50.0, 12, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mask_token_id": None}, "mask_token_id must be a positive integer"),
        ({"mask_token_id": 600}, "outside the vocabulary of 512"),
        ({"block_type": "sequential"}, "block_type 'sequential' is not supported"),
        ({"alibi": True}, "alibi is not supported"),
        ({"n_kv_heads": 3}, "4 heads do not fit 3 kv heads"),
    ],
)
def test_what_is_no_llada_is_refused(change: dict[str, object], told: str) -> None:
    with pytest.raises(BadModel, match=told):
        read_canvassed({**CONFIGS["llada"], **change}, "config.json")
