"""Random adapters written as PEFT writes them, and the model with their weights merged in."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def is_meant(targets: object, name: str) -> bool:
    if targets == "all-linear":
        return not name.endswith("lm_head")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    assert isinstance(targets, list)
    return name.split(".")[-1] in targets


def write_adapter(
    folder: Path,
    model: PreTrainedModel,
    *,
    targets: object = ("q_proj", "v_proj"),
    rank: int = 4,
    alpha: float = 8,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> PreTrainedModel:
    """The merged model. `rank_pattern` and `alpha_pattern` name whole last parts."""
    targets = list(targets) if isinstance(targets, tuple) else targets
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none",
        "task_type": "CAUSAL_LM", "use_rslora": False, "use_dora": False, "modules_to_save": None, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(told))
    merged, tensors = copy.deepcopy(model), {}
    chance = torch.Generator().manual_seed(seed)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    assert isinstance(ranks, dict) and isinstance(alphas, dict)
    for name, module in merged.named_modules():
        if not isinstance(module, nn.Linear) or not is_meant(targets, name):
            continue
        last = name.split(".")[-1]
        r, a = ranks.get(last, rank), alphas.get(last, alpha)
        scale = a / (r**0.5 if config.get("use_rslora") else r)
        down = torch.randn(r, module.in_features, generator=chance).to(dtype) * 0.2
        up = torch.randn(module.out_features, r, generator=chance).to(dtype) * 0.2
        with torch.no_grad():
            module.weight += scale * up.float() @ down.float()
        at = f"base_model.model.{name}"
        tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"] = down, up
    save_file(tensors, folder / "adapter_model.safetensors")
    return merged
