"""What encoding images costs: vision towers in front of language models, on a card of the catalogue.

A tower cuts an image into patches and passes them through transformer layers in which every patch sees all others of
its image; several patches are merged into each token that the language model gets. For images of p patches each, P in
all, on g devices:

    products     2 P (4 h^2 + 2 h f) layers / (g F mfu(P)),  or reading the weights, whichever takes longer
    attention    sum of 4 p^2 h layers / (g F mfu_a(p))
    elementwise  P (8 h + 2 f / g) layers * item_bytes / B
    merging      2 tokens w_m / (g F mfu(tokens))
    host         launches of kernels, as in cost.roofline

Efficiencies are the card's, as for a language model (cost.hardware): no tower was measured here. Decoding a file into
pixels is CPU work and is not charged, nor what g > 1 devices say to each other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.errors import BadConfig
from penstock.cost.hardware import Card, curve
from penstock.cost.roofline import Host

ITEM_BYTES = 2  # fp16 or bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTower:
    """`merged`: patches that become one token. `merger`: weights between the tower and the language model."""

    name: str
    layers: int
    hidden: int
    ffn: int
    merged: int
    merger: int
    source: str

    @property
    def layer_params(self) -> int:
        return 4 * self.hidden**2 + 2 * self.hidden * self.ffn

    @property
    def params(self) -> int:
        return self.layers * self.layer_params + self.merger

    @property
    def weight_bytes(self) -> int:
        return self.params * ITEM_BYTES


TOWERS = {
    tower.name: tower
    for tower in (
        VisionTower(
            name="qwen2-vl",
            layers=32,
            hidden=1280,
            ffn=5120,
            merged=4,
            merger=5120 * 5120 + 5120 * 3584,
            source="Qwen2-VL-7B: 675M parameters, patches of 14 pixels, 2 x 2 of them a token",
        ),
        VisionTower(
            name="clip-l-336",
            layers=24,
            hidden=1024,
            ffn=4096,
            merged=1,
            merger=1024 * 4096 + 4096 * 4096,
            source="LLaVA-1.5-7B: CLIP ViT-L/14, 576 tokens for an image of 336 x 336",
        ),
        VisionTower(
            name="internvit-300m",
            layers=24,
            hidden=1024,
            ffn=4096,
            merged=4,
            merger=4096 * 4096 + 4096 * 4096,
            source="InternVL2-8B: 256 tokens for a tile of 448 x 448",
        ),
    )
}


def tower_of(name: str) -> VisionTower:
    """Raises BadConfig with the known names."""
    if name not in TOWERS:
        raise BadConfig(f"no vision tower is named {name!r}; known: {', '.join(sorted(TOWERS))}")
    return TOWERS[name]


class VisionCost:
    """Prices the encoding of some images in one go, each given by the tokens that it becomes."""

    def __init__(
        self, tower: VisionTower, card: Card, *, tp: int = 1, host: Host | None = None
    ) -> None:
        self.tower, self.card, self.tp, self.host = tower, card, tp, host or Host()
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def name(self) -> str:
        return f"{self.tower.name} on {self.tp} x {self.card.name}"

    @property
    def digest(self) -> str:
        told = repr([dataclasses.astuple(part) for part in (self.tower, self.card, self.host)])
        return hashlib.blake2b(f"{told}{self.tp}".encode(), digest_size=8).hexdigest()

    def flops(self, images: Sequence[int]) -> float:
        """Of all devices together."""
        tower, patches = self.tower, [tokens * self.tower.merged for tokens in images]
        products = 2 * sum(patches) * tower.layer_params * tower.layers
        attention = 4 * sum([one**2 for one in patches]) * tower.hidden * tower.layers
        return float(products + attention + 2 * sum(images) * tower.merger)

    def seconds(self, images: Sequence[int]) -> float:
        if not images:
            return 0.0
        key = tuple(sorted(images))
        found = self._known.get(key)
        if found is None:
            if len(self._known) > 4096:
                self._known.clear()
            found = self._known[key] = self._seconds(key)
        return found

    def _seconds(self, images: Sequence[int]) -> float:
        tower, card = self.tower, self.card
        patches, tokens = [one * tower.merged for one in images], sum(images)
        rows, speed = sum(patches), self.tp * card.flops
        multiplied = 2 * rows * tower.layer_params * tower.layers
        read_s = tower.weight_bytes / (self.tp * card.bandwidth * card.gemm_mbu)
        attention = [
            4 * one**2 * tower.hidden * tower.layers / curve(card.prefill_attention_mfu, one)
            for one in patches
        ]
        wide = rows * (8 * tower.hidden + 2 * tower.ffn / self.tp) * tower.layers * ITEM_BYTES
        return math.fsum(
            (
                max(multiplied / (speed * curve(card.gemm_mfu, rows)), read_s),
                math.fsum(attention) / speed,
                wide / card.bandwidth,
                2 * tokens * tower.merger / (speed * curve(card.gemm_mfu, tokens)),
                tower.layers * self.host.launches_per_layer * self.host.launch_s,
            )
        )
