"""SmallThinker held to a plain forward written from its description: transformers does not have it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from penstock.core.errors import BadModel
from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.families import read_shape
from penstock.engine.torch.open import open_executor
from tests.engine.torch.driver import Driver
from tests.engine.torch.test_against_transformers import logits_of

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, TOP_K, WIDTH, LAYERS, VOCAB = 64, 4, 2, 16, 8, 3, 32, 4, 256
WINDOW = 24
CONFIG = {
    "architectures": ["SmallThinkerForCausalLM"],
    "model_type": "smallthinker",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1.5e6,
    "rope_layout": [0, 1, 1, 1],
    "sliding_window_layout": [0, 1, 1, 1],
    "sliding_window_size": WINDOW,
    "max_position_embeddings": 512,
    "moe_num_primary_experts": EXPERTS,
    "moe_num_active_primary_experts": TOP_K,
    "moe_ffn_hidden_size": WIDTH,
    "tie_word_embeddings": True,
    "eos_token_id": [2, 3],
}
IDS = [3 + (7 * at) % 250 for at in range(90)]


def weights() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance) * 0.15

    found = {
        "model.embed_tokens.weight": drawn(VOCAB, HIDDEN),
        "model.norm.weight": drawn(HIDDEN) + 1,
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            found[f"{at}self_attn.{name}_proj.weight"] = drawn(rows * DIM, HIDDEN)
        found[f"{at}self_attn.o_proj.weight"] = drawn(HIDDEN, HEADS * DIM)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = drawn(HIDDEN) + 1
        found[f"{at}block_sparse_moe.primary_router.weight"] = drawn(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            inside = f"{at}block_sparse_moe.experts.{expert}."
            found[f"{inside}gate.weight"] = drawn(WIDTH, HIDDEN)
            found[f"{inside}up.weight"] = drawn(WIDTH, HIDDEN)
            found[f"{inside}down.weight"] = drawn(HIDDEN, WIDTH)
    return found


def turned(x: Tensor) -> Tensor:
    """x [heads, T, DIM] by position."""
    turns = torch.outer(torch.arange(x.shape[1]), 1.5e6 ** -(torch.arange(0, DIM, 2) / DIM))
    first, second = x.chunk(2, -1)
    rotated = torch.complex(first, second) * torch.polar(torch.ones_like(turns), turns)
    return torch.cat((rotated.real, rotated.imag), -1)


def plain_logits(tensors: dict[str, Tensor], ids: list[int], is_softmax: bool) -> Tensor:
    """[T, VOCAB], a token and a layer at a time."""
    x = tensors["model.embed_tokens.weight"][ids]
    place = torch.arange(len(ids))
    for layer in range(LAYERS):
        own = {key.removeprefix(f"model.layers.{layer}."): value for key, value in tensors.items()}
        told = x @ own["block_sparse_moe.primary_router.weight"].T
        h = F.rms_norm(x, (HIDDEN,), own["input_layernorm.weight"], 1e-6)
        q, k, v = (
            (h @ own[f"self_attn.{name}_proj.weight"].T).view(len(ids), -1, DIM).transpose(0, 1)
            for name in "qkv"
        )
        mask = place[:, None] >= place
        if layer:
            q, k = turned(q), turned(k)
            mask &= place[:, None] - place < WINDOW
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, 0) for one in (k, v))
        scores = (q @ k.transpose(1, 2) / DIM**0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + (scores @ v).transpose(0, 1).flatten(1) @ own["self_attn.o_proj.weight"].T
        h = F.rms_norm(x, (HIDDEN,), own["post_attention_layernorm.weight"], 1e-6)
        for row in range(len(ids)):
            best = told[row].topk(TOP_K)
            shares = best.values.softmax(0) if is_softmax else best.values.sigmoid()
            for share, expert in zip(shares / shares.sum(), best.indices.tolist(), strict=True):
                gate, up, down = (
                    own[f"block_sparse_moe.experts.{expert}.{name}.weight"]
                    for name in ("gate", "up", "down")
                )
                x[row] += share * (down @ ((gate @ h[row]).relu() * (up @ h[row])))
    x = F.rms_norm(x, (HIDDEN,), tensors["model.norm.weight"], 1e-6)
    return x @ tensors["model.embed_tokens.weight"].T


@pytest.fixture(params=[False, True], ids=["sigmoid", "softmax"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor], bool]:
    tensors, is_softmax = weights(), bool(request.param)
    told = {**CONFIG, "moe_primary_router_apply_softmax": is_softmax}
    (tmp_path / "config.json").write_text(json.dumps(told))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors, is_softmax


ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=40)


def test_logits(model: tuple[Path, dict[str, Tensor], bool]) -> None:
    folder, tensors, is_softmax = model
    want = plain_logits(tensors, IDS, is_softmax)
    built = build_decoder(model_facts(folder), ENGINE, Alone(), None)
    ids = np.array(IDS)
    with torch.inference_mode():
        for size in (16, 50, len(IDS)):
            ends = [min(at + size, len(IDS)) for at in range(0, len(IDS), size)]
            parts = [logits_of(built, ids, at * size, end) for at, end in enumerate(ends)]
            assert (torch.cat(parts) - want).abs().max() < 1e-4


async def test_greedy_text_in_mixed_steps(model: tuple[Path, dict[str, Tensor], bool]) -> None:
    folder, tensors, is_softmax = model
    executor = open_executor(str(folder), ENGINE)
    driver = Driver(executor)
    jobs = [driver.job(IDS[:40]), driver.job(IDS[5:12]), driver.job(IDS[:33])]
    await driver.finish(jobs, 6, budget=24)
    for job in jobs:
        ids = list(job.request.prompt.ids)  # type: ignore[attr-defined]
        text = ids + job.outputs
        best = plain_logits(tensors, text, is_softmax)[len(ids) - 1 : -1].argmax(-1)
        assert job.outputs == best.tolist()
    await executor.stop()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_layout": [1]}, "rope_layout must list 4"),
        ({"moe_layer_layout": [1, 0, 1, 1]}, "without experts"),
        ({"moe_enable_early_router": False}, "moe_enable_early_router"),
        ({"moe_enable_secondary_experts": True}, "moe_enable_secondary_experts"),
        ({"moe_num_active_primary_experts": 9}, "9 of 8 experts"),
    ],
)
def test_variants_that_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(BadModel, match=told):
        read_shape({**CONFIG, **changes}, "config.json")
