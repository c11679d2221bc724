"""Mixtures of few rows without the host: which experts are read is known to the card alone, so a step can be recorded.

The weights of a layer's experts lie in one tensor, and a program is told by the card's memory which of them it reads.
Of M rows that take k experts each there are M * k pairs; a pair's product is that of a single row, so an expert that
several rows take is read once for each of them, mostly from the card's cache. That is best for few rows; more of them
go the way of mlp.Mixture, by expert, with the host deciding. The sum of a row runs over its experts in their order, and
is rounded after each, as there.

Which experts were taken is left in memory of the card, to be counted when the step is over.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from penstock.engine.torch.cuda import expert_programs
from penstock.engine.torch.cuda.launch import launch
from penstock.engine.torch.cuda.linear import RowOrTorch, run_of
from penstock.engine.torch.decoder import Decoder
from penstock.engine.torch.kernels import gelu_mul
from penstock.engine.torch.mlp import Mixture, PlainMlp, Taken

MOST_ROWS = 32


@dataclass(slots=True, kw_only=True)
class Stacked:
    """Of one layer. `chosen` int64 [MOST_ROWS, top_k], what the last step without the host took."""

    gate_up: Tensor  # [experts, 2 width, hidden]
    down: Tensor  # [experts, hidden, width]
    is_gelu: bool
    chosen: Tensor


@dataclass(slots=True)
class CardMixture(Mixture):
    """`is_alone`: the host is not to be asked, as while a step is recorded."""

    stacked: Stacked | None = None
    is_alone: bool = False

    def routed(self, x: Tensor, taken: Taken, told: Tensor) -> Tensor:
        if not self.is_alone:
            return Mixture.routed(self, x, taken, told)
        assert self.stacked is not None and len(x) <= MOST_ROWS
        chosen, weights = self.choose(told, x.dtype)
        chosen, order = chosen.sort(1)
        self.stacked.chosen[: len(x)] = chosen
        out = self._begin(x, taken)
        between = _by_experts(x, self.stacked.gate_up, chosen, self.stacked.is_gelu)
        parts = _by_experts(between, self.stacked.down, chosen, None)
        width = parts.shape[1]
        each = min(1024, triton.next_power_of_2(width))
        launch(
            expert_programs.add_experts, (len(x), triton.cdiv(width, each)), parts,
            weights.gather(1, order), out, width, TAKES=self.top_k, WIDTH=each,
        )  # fmt: skip
        return out


def _by_experts(x: Tensor, weight: Tensor, chosen: Tensor, gelu: bool | None) -> Tensor:
    """x [M or M * k, in], weight [experts, out, in], chosen [M, k] -> [M * k, out]; gated unless `gelu` is None."""
    pairs, (_, num_out, num_in) = chosen.numel(), weight.shape
    num_out = num_out if gelu is None else num_out // 2
    out = x.new_empty(pairs, num_out)
    outputs, at_once, warps = run_of(num_out * chosen.shape[1], num_in)
    outputs = outputs if gelu is None else outputs // 2
    launch(
        expert_programs.row_by_expert, (triton.cdiv(num_out, outputs), pairs), x, weight, chosen, out,
        num_out, num_in, EACH=pairs // len(x), BN=outputs, BK=at_once,
        IS_GATED=gelu is not None, IS_GELU=bool(gelu), warps=warps,
    )  # fmt: skip
    return out


class Mixtures:
    """All of a decoder, made so that steps can be recorded; see `open_mixtures`."""

    def __init__(self, held: list[CardMixture], chosen: Tensor) -> None:
        self._held, self._chosen = held, chosen

    def set_alone(self, is_alone: bool) -> None:
        for each in self._held:
            each.is_alone = is_alone

    def taken(self, count: int) -> Taken:
        """By the first `count` rows of the last step that was played."""
        told = self._chosen[:, :count].flatten(1).cpu().numpy()
        return {
            each.layer: np.bincount(row, minlength=each.num_experts).tolist()
            for each, row in zip(self._held, told, strict=True)
        }


def why_not(decoder: Decoder) -> str | None:
    """Why steps with this model's mixtures cannot be recorded; None when they can."""
    found = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Mixture)]
    if any(each.spread is not None for each in found):
        return "experts live in other processes"
    experts = [one for each in found for one in each.experts]
    if not all(one.can_record() for one in experts):
        return "its experts have an activation of another kind"
    if not all(_is_plain(one) for one in experts):
        return "its experts are in few bits, or have biases"
    return None


def _is_plain(mlp: PlainMlp) -> bool:
    layers = (mlp.gate_up, mlp.down)
    return all(isinstance(one, RowOrTorch) and one.bias is None for one in layers)


def open_mixtures(decoder: Decoder) -> Mixtures:
    """Brings the experts of each layer together, and has its layers use them from there."""
    places = [at for at, layer in enumerate(decoder.layers) if isinstance(layer.mlp, Mixture)]
    first = decoder.layers[places[0]].mlp
    assert isinstance(first, Mixture)
    chosen = torch.zeros(
        len(places), MOST_ROWS, first.top_k, dtype=torch.int64, device=decoder.embedding.device
    )
    held = []
    for at, own in zip(places, chosen, strict=True):
        mixture = decoder.layers[at].mlp
        assert isinstance(mixture, Mixture)
        held.append(_stacked(mixture, own))
        decoder.layers[at] = replace(decoder.layers[at], mlp=held[-1])
    return Mixtures(held, chosen)


def _stacked(mixture: Mixture, chosen: Tensor) -> CardMixture:
    gate_up, down = (
        torch.stack([getattr(one, name).weight for one in mixture.experts])
        for name in ("gate_up", "down")
    )
    experts = [
        PlainMlp(RowOrTorch(gate_up[at], None), RowOrTorch(down[at], None), one.activate)
        for at, one in enumerate(mixture.experts)
    ]
    told = {each.name: getattr(mixture, each.name) for each in fields(mixture)}
    is_gelu = mixture.experts[0].activate is gelu_mul
    stacked = Stacked(gate_up=gate_up, down=down, is_gelu=is_gelu, chosen=chosen)
    return CardMixture(**{**told, "experts": experts, "num_experts": len(experts)}, stacked=stacked)
