"""Where in a decoder adapters may add: every product of grouped heads and of plain MLPs, with a bank for each.

A product of the decoder is often several layers of the checkpoint side by side (q, k and v; gate and up), or part of
one (a checkpoint's own qkv): what adapters call by a layer's name becomes columns of a product. Routed experts and
heads over latents (DeepSeek) have no places: there rows are sorted by expert, or weights reordered when loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.engine.torch.adapters.bank import AdaptedLinear, Bank, BankForm, Part
from penstock.engine.torch.decoder import Decoder, Layer
from penstock.engine.torch.families import Shape
from penstock.engine.torch.heads import GroupedHeads, Heads
from penstock.engine.torch.mlp import Mixture, Mlp, PlainMlp
from penstock.engine.torch.ports import Linear


@dataclass(slots=True, eq=False)
class Places:
    """`layers`: the decoder's, with products that add. `banks`: by decoder layer."""

    layers: list[Layer]
    banks: list[list[Bank]]

    def parts(self, layer: int) -> dict[str, tuple[Bank, Part]]:
        """By the checkpoint's name inside a decoder layer."""
        return {part.name: (bank, part) for bank in self.banks[layer] for part in bank.parts}

    @property
    def arrays(self) -> list[int]:
        """Which arrays the banks hold now."""
        return [id(bank.held) for banks in self.banks for bank in banks]

    @property
    def can_record(self) -> bool:
        return all([bank.can_record for banks in self.banks for bank in banks])

    @property
    def num_bytes(self) -> int:
        return sum([bank.num_bytes for banks in self.banks for bank in banks])


def places_of(decoder: Decoder, form: BankForm) -> Places:
    """The decoder itself stays as it is. Of a single rank only."""
    assert decoder.rank.world == 1
    places = Places([], [])
    for layer in decoder.layers:
        found = _Layer(decoder.shape, form)
        attention, mlp = found.heads(layer.attention), found.mlp(layer.mlp)
        places.layers.append(replace(layer, attention=attention, mlp=mlp))
        places.banks.append(found.banks)
    return places


class _Layer:
    """One decoder layer on the way."""

    def __init__(self, shape: Shape, form: BankForm) -> None:
        self._shape, self._form = shape, form
        self.banks: list[Bank] = []

    def heads(self, heads: Heads) -> Heads:
        if not isinstance(heads, GroupedHeads):
            return heads
        shape, names = self._shape, self._shape.names
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        sized = [(names.q, query), (names.k, key), (names.v, key)]
        return replace(
            heads,
            qkv=self._adapted(heads.qkv, sized, shape.hidden),
            out=self._adapted(heads.out, [(names.out, shape.hidden)], query),
        )

    def mlp(self, mlp: Mlp) -> Mlp:
        shape, names = self._shape, self._shape.names
        if isinstance(mlp, PlainMlp):
            return self._plain(mlp, (names.gate, names.up, names.down), shape.intermediate)
        mixed = shape.experts
        if isinstance(mlp, Mixture) and mlp.shared is not None and mixed and mixed.shared_width:
            at = f"{mixed.block}.{mixed.shared}."
            told = (f"{at}{mixed.gate}", f"{at}{mixed.up}", f"{at}{mixed.down}")
            shared = self._plain(mlp.shared.mlp, told, mixed.shared_width)
            return replace(mlp, shared=replace(mlp.shared, mlp=shared))
        return mlp

    def _plain(self, mlp: PlainMlp, names: tuple[str | None, str, str], width: int) -> PlainMlp:
        gate, up, down = names
        sized = [(up, width)] if gate is None else [(gate, width), (up, width)]
        hidden = self._shape.hidden
        return replace(
            mlp,
            gate_up=self._adapted(mlp.gate_up, sized, hidden),
            down=self._adapted(mlp.down, [(down, hidden)], width),
        )

    def _adapted(self, base: Linear, sized: Sequence[tuple[str, int]], width: int) -> Linear:
        """Parts of one name are one layer of the checkpoint."""
        parts: dict[str, Part] = {}
        start = 0
        for name, size in sized:
            before = parts.get(name)
            begin = start if before is None else before.start
            parts[name] = Part(name=name, start=begin, stop=start + size)
            start += size
        bank = Bank(self._form, tuple(parts.values()), width)
        self.banks.append(bank)
        return AdaptedLinear(base, bank)
