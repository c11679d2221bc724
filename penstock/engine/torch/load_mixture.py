"""From a folder's tensors to the mixture of a layer, with its experts or without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.engine.torch.families import Experts
from penstock.engine.torch.mlp import ExactRouter, Mixture, PlainMlp, Shared

if TYPE_CHECKING:
    from penstock.engine.torch.load import Packer

CORRECTION = "e_score_correction_bias"


def load_mixture(packer: Packer, mixed: Experts, index: int, block: str) -> Mixture:
    hidden, get = packer.shape.hidden, packer.folder.get
    shared = None
    if mixed.shared_width is not None:
        gate = None
        if mixed.is_gated:
            gate = packer.router(get(f"{block}{mixed.shared}_gate.weight", (1, hidden)))
        shared = Shared(_expert(packer, f"{block}{mixed.shared}.", mixed.shared_width), gate)
    router = get(f"{block}{mixed.router}.weight", (mixed.count, hidden))
    return Mixture(
        layer=index,
        router=ExactRouter(router.float()) if mixed.is_exact else packer.router(router),
        experts=[
            _expert(packer, f"{block}experts.{at}.", mixed.width)
            for at in range(mixed.count if packer.has_experts else 0)
        ],
        num_experts=mixed.count,
        top_k=mixed.top_k,
        is_normed=mixed.is_normed,
        shared=shared,
        scaling=mixed.scaling,
        groups=mixed.groups,
        scores=mixed.scores,
        correction=packer.folder.exact(f"{block}{mixed.router}.{CORRECTION}", (mixed.count,))
        if mixed.is_corrected
        else None,
    )


def load_expert(packer: Packer, layer: int, expert: int) -> PlainMlp:
    """One of a mixture's. Raises BadModel."""
    mixed, prefix = packer.shape.experts, packer.folder.prefix
    assert mixed is not None, "the model has no mixtures"
    return _expert(packer, f"{prefix}layers.{layer}.{mixed.block}.experts.{expert}.", mixed.width)


def _expert(packer: Packer, at: str, width: int) -> PlainMlp:
    mixed = packer.shape.experts
    assert mixed is not None, "the model has no mixtures"
    return packer.mlp((f"{at}{mixed.gate}", f"{at}{mixed.up}", f"{at}{mixed.down}"), width)
