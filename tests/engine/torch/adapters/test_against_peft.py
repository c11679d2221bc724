"""Adapters made and judged by PEFT itself, where it is installed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from penstock.engine.folder import model_facts
from penstock.engine.torch.adapters.store import AdapterStore
from penstock.engine.torch.build import build_decoder
from penstock.engine.torch.decoder import Alone
from tests.engine.torch.adapters.test_exact import ENGINE, IDS, logits_with, rms
from tests.engine.torch.models import saved

peft = pytest.importorskip("peft")

FORMS = {
    "names": dict(target_modules=["q_proj", "down_proj"]),
    "all-linear": dict(target_modules="all-linear", use_rslora=True),
    "pattern": dict(target_modules=r"model\.layers\.1\..*_proj", exclude_modules=["k_proj"]),
    "patterns of ranks": dict(
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={r"layers.1.self_attn.q_proj": 3, "up_proj": 11},
        alpha_pattern={r"^model.layers.0.self_attn.v_proj": 2, "up_proj": 30},
    ),
    "some layers": dict(target_modules=["o_proj"], layers_to_transform=[0, 2]),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits(model_root: Path, tmp_path: Path, form: str) -> None:
    folder, model = saved(model_root, "qwen3")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=6, lora_alpha=9, **FORMS[form])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn_like(value) * 0.2)
    theirs.eval().save_pretrained(str(tmp_path / "a"))
    built = build_decoder(model_facts(folder), ENGINE, Alone(), None)
    store = AdapterStore(
        built.decoder, slots=2, rank=16, device=built.device, folders={"a": tmp_path / "a"}
    )
    store._fill("a", 1)
    with torch.inference_mode():
        want = theirs(torch.tensor(IDS)[None]).logits[0]
        base = model(torch.tensor(IDS)[None]).logits[0]
    bound = 1e-5 * float(want.std())
    assert rms(logits_with(built, 1, 0, 60) - want) < bound < 1e-3 * rms(want - base)
