"""From a model folder to a DiffusionModel: weights under the decoder's names, and an arena of kept positions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import BadConfig, BadModel
from penstock.engine.folder import ModelFacts
from penstock.engine.torch.attention import KvLayout
from penstock.engine.torch.build import EngineConfig, choose_device, choose_dtype
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.diffusion.attention import PackedAttention
from penstock.engine.torch.diffusion.model import ROW_CAP, DiffusionModel
from penstock.engine.torch.kernels import build_with
from penstock.engine.torch.linear import choose_methods
from penstock.engine.torch.load import load_decoder
from penstock.engine.torch.memory import choose_num_blocks
from penstock.engine.torch.ports import ShardSpec
from penstock.engine.torch.quantised import Quantised
from penstock.engine.torch.weights import WeightFolder

LLADA_NAMES = (
    ("self_attn.q_proj", "q_proj"),
    ("self_attn.k_proj", "k_proj"),
    ("self_attn.v_proj", "v_proj"),
    ("self_attn.o_proj", "attn_out"),
    ("mlp.gate_proj", "ff_proj"),
    ("mlp.up_proj", "up_proj"),
    ("mlp.down_proj", "ff_out"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ff_norm"),
)


def open_diffusion(
    facts: ModelFacts, config: EngineConfig, *, row_cap: int = ROW_CAP
) -> tuple[DiffusionModel, int]:
    """A model and the number of its blocks. Raises BadModel, BadConfig."""
    if facts.canvas is None:
        raise BadModel(f"{facts.folder} holds no diffusion language model")
    if config.tensor_parallel != 1:
        raise BadConfig(
            "diffusion language models run in one process here", hint="leave out tensor_parallel"
        )
    if config.kv != "auto":
        raise BadConfig(
            "diffusion language models keep keys and values in their dtype here",
            hint="leave out kv",
        )
    shape = facts.shape
    build_with(config.compiler, config.kernel_cache)
    device = choose_device(config.device)
    dtype, _ = choose_dtype(config.dtype, shape.stored_dtype, device)
    methods = choose_methods(device, dtype, config.weights, is_plain=config.linear == "plain")
    opened = LladaFolder if shape.family == "llada" else WeightFolder
    folder = opened(facts.folder, dtype, device)
    decoder = load_decoder(folder, shape, methods.layers, Alone(), methods.quantised)
    folder.close()
    layout = KvLayout(
        num_layers=shape.num_layers,
        num_blocks=0,
        block_size=config.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        device=device,
    )
    num_blocks = choose_num_blocks(
        layout,
        config.max_context or shape.max_context,
        num_blocks=config.num_blocks,
        memory_bytes=config.memory_bytes,
        free_share=config.free_share,
    )
    decoder.attention = PackedAttention(
        num_layers=shape.num_layers,
        num_slots=num_blocks * config.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        device=device,
    )
    canvas = facts.canvas
    model = DiffusionModel(decoder, canvas.mask_id, canvas.is_shifted, device, row_cap)
    return model, num_blocks


class LladaFolder(WeightFolder):
    """LLaDA's tensors under Llama's names."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(folder, dtype, device)
        self.prefix = "model."

    def value(
        self,
        name: str,
        shape: Sequence[int],
        shard: ShardSpec | None = None,
        rows: range | None = None,
        *,
        as_numbers: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor | Quantised:
        return super().value(
            llada_name(name), shape, shard, rows, as_numbers=as_numbers, dtype=dtype
        )


def llada_name(name: str) -> str:
    """Of a tensor that Llama calls `name`."""
    whole = {
        "model.embed_tokens.weight": "model.transformer.wte.weight",
        "model.norm.weight": "model.transformer.ln_f.weight",
        "lm_head.weight": "model.transformer.ff_out.weight",
    }
    if name in whole:
        return whole[name]
    for theirs, ours in LLADA_NAMES:
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name.replace("model.layers.", "model.transformer.blocks.")
