"""Model families: what a config.json means, as one flat shape (shape.py). Reads no weights and imports no torch.

A family is a function that reads its own spelling of the configuration; one decoder (decoder.py) runs the shapes of
all of them. All are decoders with rotary positions; in what they differ is told in the files beside this one:

    llama.py      Llama, Mistral, Qwen 2 and 3, SmolLM 3, Granite, OLMo 2
    mixtures.py   Mixtral, Qwen 2 and 3 with experts
    gemma.py      Gemma 2 and 3
    phi.py        Phi 1 to 2, Phi 3 and 4
    smallthinker.py   SmallThinker
    deepseek.py   DeepSeek-V2, V2-Lite, V3 and R1, Kimi-K2

Positions are read in positions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from penstock.core.errors import BadModel
from penstock.engine.torch.families.deepseek import deepseek_v2, deepseek_v3
from penstock.engine.torch.families.gemma import gemma2, gemma3, gemma3_text
from penstock.engine.torch.families.llama import (
    granite,
    llama,
    mistral,
    olmo2,
    qwen2,
    qwen3,
    smollm3,
)
from penstock.engine.torch.families.mixtures import mixtral, qwen2_moe, qwen3_moe
from penstock.engine.torch.families.phi import phi, phi3
from penstock.engine.torch.families.shape import DTYPE_BYTES, STORED, Experts, Latent, Names, Shape
from penstock.engine.torch.families.smallthinker import smallthinker
from penstock.engine.torch.reading import Config, Reader

__all__ = ["DTYPE_BYTES", "STORED", "Experts", "Latent", "Names", "Shape", "read_shape"]

FAMILIES: dict[str, Callable[[Reader], Shape]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gemma3": gemma3,
    "phi": phi,
    "phi3": phi3,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "kimi_k2": deepseek_v3,
    "smollm3": smollm3,
    "granite": granite,
    "olmo2": olmo2,
    "smallthinker": smallthinker,
}
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3",
    "PhiForCausalLM": "phi",
    "Phi3ForCausalLM": "phi3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "SmallThinkerForCausalLM": "smallthinker",
    "SmallthinkerForCausalLM": "smallthinker",
}
BARE, HEADED = "Model", "ForCausalLM"


def read_shape(config: Config, where: str) -> Shape:
    """Read a parsed config.json. `where` names the file in errors. Raises BadModel."""
    name = _architecture(config, where)
    shape = FAMILIES[name](Reader(config, where))
    return replace(shape, has_head=False) if _is_bare(config) else shape


def _named(config: Config) -> str | None:
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else None


def _is_bare(config: Config) -> bool:
    """Saved without a head, as models that embed are."""
    name = _named(config)
    return name is not None and name.endswith(BARE)


def _architecture(config: Config, where: str) -> str:
    known = ", ".join(sorted(ARCHITECTURES))
    name = _named(config)
    if name is None and config.get("model_type") in FAMILIES:
        return str(config["model_type"])
    family = ARCHITECTURES.get(str(name).removesuffix(BARE) + HEADED)
    family = family if _is_bare(config) else ARCHITECTURES.get(str(name))
    if family is None:
        told = f"architecture {name!r}" if name else f"model_type {config.get('model_type')!r}"
        raise BadModel(f"{where}: {told} is not supported", hint=f"supported are {known}")
    return family
