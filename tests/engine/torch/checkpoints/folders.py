"""Small model folders with packed weights, and the same models in floating point to judge them by."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from penstock.engine.folder import model_facts
from penstock.engine.torch.attention import KvLayout, choose_backend
from penstock.engine.torch.build import Built
from penstock.engine.torch.decoder import Alone, Decoder
from penstock.engine.torch.linear import PlainLinear
from penstock.engine.torch.load import load_decoder
from penstock.engine.torch.quantised import Quantised
from penstock.engine.torch.weights import WeightFolder
from tests.engine.torch.checkpoints.packers import Packer
from tests.engine.torch.models import saved
from tests.engine.torch.test_against_transformers import logits_of

IDS = np.array([3 + (11 * at) % 500 for at in range(40)])
CPU = torch.device("cpu")
MIXTRAL = (
    ("block_sparse_moe", "mlp"),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
)


def packed_folder(
    root: Path,
    name: str,
    place: Path,
    pack: Callable[[str], Packer | None],
    told: Mapping[str, object],
) -> tuple[Path, PreTrainedModel]:
    """A family's model with the modules packed for which `pack` has a packer, and the model that this means."""
    folder, model = saved(root, name)
    meant = copy.deepcopy(model)
    place.mkdir()
    tensors, weights = {}, {}
    torch.manual_seed(1)
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    for key, value in (pair for shard in shards for pair in shard.items()):
        module = key.removesuffix(".weight")
        packer = (
            pack(module) if value.dim() == 2 and "embed" not in key and "norm" not in key else None
        )
        if packer is None:
            tensors[key] = value
            continue
        packed = packer(value)
        weights[key] = packed.weight
        tensors |= {f"{module}.{piece}": one.contiguous() for piece, one in packed.tensors.items()}
    save_file(tensors, place / "model.safetensors")
    _set(meant, weights)
    config = json.loads((folder / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return place, meant


def _set(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Parameters by the names that checkpoints have; experts lie in memory as one tensor a layer."""
    left = {_spelled(name): value for name, value in weights.items()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in left:
                value.copy_(left.pop(name))
            elif ".experts." in name:
                at, _, kind = name.rpartition(".")
                parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
                for expert, rows in enumerate(value):
                    names = [f"{at}.{expert}.{part}_proj.weight" for part in parts]
                    rows.copy_(torch.cat([left.pop(one) for one in names]))
    assert not left, sorted(left)


def _spelled(name: str) -> str:
    """Mixtral's names for experts are its own."""
    for theirs, ours in MIXTRAL:
        name = name.replace(theirs, ours)
    return name


class Kept:
    """A method that computes with the codes as they are, in float64, and counts what it was given."""

    name = "kept"

    def __init__(self) -> None:
        self.forms: list[tuple[int, int, bool, bool]] = []

    def pack_quantised(self, weight: Quantised, bias: Tensor | None):  # type: ignore[no-untyped-def]
        self.forms.append(
            (weight.bits, weight.group, weight.zeros is not None, weight.order is not None)
        )
        zeros = 2 ** (weight.bits - 1) if weight.zeros is None else weight.zeros.double()[..., None]
        codes = weight.codes.double().view(*weight.scales.shape, weight.group)
        whole = (weight.scales.double()[..., None] * (codes - zeros)).flatten(1)

        def layer(x: Tensor) -> Tensor:
            shuffled = x if weight.order is None else x[:, weight.order]
            out = F.linear(shuffled.double(), whole).to(x.dtype)
            return out if bias is None else out + bias

        return layer


def decoder_of(place: Path, method: Kept | None = None) -> tuple[Decoder, str | None]:
    shape = model_facts(place).shape
    folder = WeightFolder(place, torch.float32, CPU)
    decoder = load_decoder(folder, shape, PlainLinear(), Alone(), method)
    latent = shape.latent
    layout = KvLayout(
        num_layers=shape.num_layers,
        num_blocks=40,
        block_size=16,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim if latent is None else latent.cached,
        dtype=torch.float32,
        device=CPU,
        latent=None if latent is None else latent.width,
    )
    decoder.attention, _ = choose_backend(layout, wanted="gather")
    return decoder, folder.said()


def logits(decoder: Decoder, ids: np.ndarray = IDS) -> Tensor:  # type: ignore[type-arg]
    built = Built(decoder, CPU, torch.float32, 40, {})
    with torch.inference_mode():
        return logits_of(built, ids, 0, len(ids))


def reference(model: PreTrainedModel, ids: np.ndarray = IDS) -> Tensor:  # type: ignore[type-arg]
    with torch.inference_mode():
        found: Tensor = model(torch.tensor(ids)[None]).logits[0]
    return found
