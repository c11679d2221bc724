"""Small random models of every family, made and judged by transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SIZE = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.15,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    partial_rotary_factor=0.75,
    factor=8.0,
    short_factor=[1.0 + 0.1 * at for at in range(12)],
    long_factor=[
        1.0 + 0.1 * at for at in range(12)
    ],  # alike: in which use is tested by test_families
)
DEEPSEEK_YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=128,
    mscale=0.707,
    mscale_all_dim=0.9,
)
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=40,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    first_k_dense_replace=1,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
)
SLIDING = "sliding_attention"
FAMILIES: dict[str, tuple[type[PreTrainedModel], type, dict[str, object]]] = {
    "llama2": (LlamaForCausalLM, LlamaConfig, dict(num_key_value_heads=4)),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
    ),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters=YARN)),
    "llama-biased": (
        LlamaForCausalLM,
        LlamaConfig,
        dict(
            attention_bias=True,
            mlp_bias=True,
            head_dim=32,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig, dict(sliding_window=24, head_dim=32)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2-windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        dict(use_sliding_window=True, sliding_window=20, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=32, tie_word_embeddings=True)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        dict(
            sliding_window=24,
            head_dim=32,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=6.0,
            attn_implementation="eager",
        ),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        dict(
            num_hidden_layers=4,
            layer_types=[SLIDING, SLIDING, "full_attention", SLIDING],
            sliding_window=24,
            head_dim=32,
            query_pre_attn_scalar=40,
            rope_parameters={
                SLIDING: dict(rope_type="default", rope_theta=10000.0),
                "full_attention": dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
            },
        ),
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, dict(sliding_window=24)),
    "phi3-long": (
        Phi3ForCausalLM,
        Phi3Config,
        dict(
            num_attention_heads=2,
            num_key_value_heads=2,
            original_max_position_embeddings=64,
            rope_parameters=LONGROPE,
        ),
    ),
    "phi": (
        PhiForCausalLM,
        PhiConfig,
        dict(
            num_key_value_heads=4,
            rope_parameters=dict(rope_theta=10000.0, partial_rotary_factor=0.5),
        ),
    ),
    "deepseek-lite": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        dict(**{**LATENT, "kv_lora_rank": 32}, q_lora_rank=None, rope_parameters=DEEPSEEK_YARN),
    ),
    "deepseek-v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        dict(
            **LATENT,
            q_lora_rank=24,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
        ),
    ),
    "deepseek-v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        dict(
            **{**LATENT, "n_routed_experts": 16, "n_shared_experts": 1},
            q_lora_rank=24,
            n_group=4,
            topk_group=2,
            rope_parameters=DEEPSEEK_YARN,
        ),
    ),
    "kimi-k2": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        dict(**LATENT, q_lora_rank=24, n_group=1, topk_group=1, routed_scaling_factor=2.827),
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, dict(num_hidden_layers=4)),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        dict(
            embedding_multiplier=12.0,
            attention_multiplier=0.08,
            residual_multiplier=0.22,
            logits_scaling=3.0,
            initializer_range=0.3,
        ),
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, dict(num_local_experts=6)),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        dict(num_experts=6, moe_intermediate_size=48, shared_expert_intermediate_size=80),
    ),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        dict(
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            head_dim=32,
        ),
    ),
    "qwen3-moe-mixed": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        dict(
            num_hidden_layers=4,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=48,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            use_sliding_window=True,
            sliding_window=24,
        ),
    ),
}

MIXTURES = [
    name for name in FAMILIES if "moe" in name or name.startswith(("mixtral", "deepseek", "kimi"))
]
DEEP: dict[str, tuple[type[PreTrainedModel], type, dict[str, object]]] = {
    "llama-8": (LlamaForCausalLM, LlamaConfig, dict(num_hidden_layers=8, initializer_range=0.08)),
    "qwen3-moe-8": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        dict(
            num_hidden_layers=8,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            initializer_range=0.08,
        ),
    ),
}


def make_reference(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model with non-zero biases and uneven norms, so that forgetting any of them shows."""
    model_class, config_class, changes = {**FAMILIES, **DEEP}[name]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZE, **changes}))
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.1)
        for key, value in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                value.add_(torch.randn_like(value) * 0.3)
    return model.eval()


@cache
def _made(root: Path, name: str) -> tuple[Path, PreTrainedModel]:
    model = make_reference(name)
    folder = root / name
    model.save_pretrained(folder, max_shard_size="100KB" if name == "llama2" else "5GB")
    return folder, model


def saved(root: Path, name: str) -> tuple[Path, PreTrainedModel]:
    """(folder, the reference) of one family; made once a session."""
    return _made(root, name)
