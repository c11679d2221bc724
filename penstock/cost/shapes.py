"""Models by name: shapes of published ones, and of a folder's config.json (model_files.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.core.errors import BadModel
from penstock.cost.model_files import KINDS, shape_of_config
from penstock.cost.model_shape import LatentShape, ModelShape

__all__ = [
    "KINDS",
    "PRESETS",
    "WEIGHT_BYTES",
    "LatentShape",
    "ModelShape",
    "in_weights",
    "shape_of",
    "shape_of_config",
]


def _preset(
    name: str, sizes: tuple[int, ...], moe: tuple[int, int, int] | None = None, **more: Any
) -> ModelShape:
    """`moe`: experts, how many of them a token takes, width of each."""
    hidden, layers, heads, kv_heads, head_dim, ffn, vocab, max_context = sizes
    experts, top_k, expert_ffn = moe or (None, None, None)
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        max_context=max_context,
        experts=experts,
        top_k=top_k,
        expert_ffn=expert_ffn,
        **more,
    )


def _opt(name: str, *, hidden: int, layers: int, heads: int) -> ModelShape:
    """Ungated MLPs four times as wide, learned positions, and a bias and a shift wherever there can be one."""
    positions, small = 2050, layers * 11 + 1
    return _preset(
        name,
        (hidden, layers, heads, heads, 128, 4 * hidden, 50272, 2048),
        is_tied=True,
        mlp_matrices=2,
        small_params=(positions + small) * hidden,
    )


PRESETS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _preset("llama-2-7b", (4096, 32, 32, 32, 128, 11008, 32000, 4096)),
        _preset(
            "llama-2-7b-1m", (4096, 32, 32, 32, 128, 11008, 32000, 1 << 20)
        ),  # positions stretched
        _preset("llama-2-13b", (5120, 40, 40, 40, 128, 13824, 32000, 4096)),
        _preset("llama-2-70b", (8192, 80, 64, 8, 128, 28672, 32000, 4096)),
        _preset("llama-3.1-8b", (4096, 32, 32, 8, 128, 14336, 128256, 131072)),
        _preset("llama-3.1-70b", (8192, 80, 64, 8, 128, 28672, 128256, 131072)),
        _opt("opt-13b", hidden=5120, layers=40, heads=40),
        _opt("opt-66b", hidden=9216, layers=64, heads=72),
        _preset("mistral-7b", (4096, 32, 32, 8, 128, 14336, 32000, 32768)),
        _preset("qwen2-7b", (3584, 28, 28, 4, 128, 18944, 152064, 32768), has_qkv_bias=True),
        _preset("qwen2.5-14b", (5120, 48, 40, 8, 128, 13824, 152064, 131072), has_qkv_bias=True),
        _preset(
            "qwen3-0.6b",
            (1024, 28, 16, 8, 128, 3072, 151936, 40960),
            is_tied=True,
            has_qk_norm=True,
        ),
        _preset("qwen3-8b", (4096, 36, 32, 8, 128, 12288, 151936, 40960), has_qk_norm=True),
        _preset("qwen3-14b", (5120, 40, 40, 8, 128, 17408, 151936, 40960), has_qk_norm=True),
        _preset("qwen3-32b", (5120, 64, 64, 8, 128, 25600, 151936, 40960), has_qk_norm=True),
        _preset("mixtral-8x7b", (4096, 32, 32, 8, 128, 14336, 32000, 32768), (8, 2, 14336)),
        _preset("mixtral-8x22b", (6144, 56, 48, 8, 128, 16384, 32768, 65536), (8, 2, 16384)),
        _preset(
            "qwen3-30b-a3b",
            (2048, 48, 32, 4, 128, 6144, 151936, 40960),
            (128, 8, 768),
            has_qk_norm=True,
        ),
        _preset(
            "qwen3-235b-a22b",
            (4096, 94, 64, 4, 128, 12288, 151936, 40960),
            (128, 8, 1536),
            has_qk_norm=True,
        ),
        _preset(
            "gemma-2-9b",
            (3584, 42, 16, 8, 256, 14336, 256000, 8192),
            is_tied=True,
            window=4096,
            window_layers=21,
            small_params=42 * 2 * 3584,
        ),
        _preset("llada-8b", (4096, 32, 32, 32, 128, 12288, 126464, 4096)),
        _preset("dream-7b", (3584, 28, 28, 4, 128, 18944, 152064, 131072), has_qkv_bias=True),
        _preset(
            "deepseek-v2-lite",
            (2048, 27, 16, 1, 192, 10944, 102400, 163840),
            (64, 6, 1408),
            expert_layers=26,
            shared_ffn=2 * 1408,
            latent=LatentShape(rank=512, rotated=64, plain=128, value=128),
            small_params=27 * 512,
        ),
    )
}


# Bytes of a weight and its share of a float16 scale, in the groups that the engine makes.
WEIGHT_BYTES = {"int8": 1 + 2 / 128, "int4": 1 / 2 + 2 / 32}


def in_weights(shape: ModelShape, weights: str) -> ModelShape:
    """The same model with its weights "stored", or in "int8" or "int4".

    A head of more bits is not told apart, and the few bytes that pass between layers shrink too.
    """
    few = WEIGHT_BYTES.get(weights)
    return shape if few is None else replace(shape, weight_item_bytes=few)


CANVASSED = frozenset({"llada-8b", "dream-7b"})  # those that fill masks in any order


def shape_of(model: str) -> ModelShape:
    """The shape of a preset name, of a folder with a config.json, or of such a file."""
    found = PRESETS.get(model.lower())
    if found is not None:
        return found
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise BadModel(
            f"no model shape is known as {model!r}",
            hint=f"give a model folder with a config.json, or one of: {', '.join(sorted(PRESETS))}",
        )
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadModel(f"{file} is not valid JSON: {error}") from None
    return shape_of_config(table, name=path.name or model)
