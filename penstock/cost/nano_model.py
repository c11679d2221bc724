"""Prices steps under a pipeline template: a StepModel around the one that prices the plain forward.

    seconds = layers under the template + (plain seconds - layers one operator after the other)

so LM head and host cost what they did. The dense batch is constant: products run on all tokens of the template,
whatever the step holds; of attention there is as much as the step has. Steps that the template cannot hold (more
tokens, some layers only, a part of the device) and those below `least_tokens` are plain forwards.

About 2 ms a step: each is played (cost.nano_play). Runs of decode steps are played one by one.
"""

from __future__ import annotations

import hashlib

from penstock.core.errors import BadConfig
from penstock.cost.nano_layer import LayerTimes, Load, load_of, seconds_of, sequential_s
from penstock.cost.nano_play import Player
from penstock.cost.nano_sharing import Sharing, sharing_of
from penstock.cost.nano_template import Template
from penstock.cost.nano_times import times_of
from penstock.cost.step import StepCost, StepFeatures, StepModel


class NanoModel:
    """A plain model's steps under a template. `sharing` None: the template's own. `slowed`: see cost.nano_layer."""

    def __init__(
        self,
        plain: StepModel,
        template: Template,
        *,
        sharing: Sharing | None = None,
        slowed: float = 1.0,
        least_tokens: int = 1,
    ) -> None:
        self.plain, self.template = plain, template
        self.times: LayerTimes = times_of(plain)
        self.sharing = sharing or sharing_of(template.sharing)
        self.least_tokens = least_tokens
        self._slowed = slowed if template.split.is_cut else 1.0
        if template.tp != self.times.tp:
            raise BadConfig(
                f"template {template.name} is for {template.tp} devices, not {self.times.tp}",
                hint="search one for this deployment",
            )
        self._schedule = template.schedule
        self._player = Player(self._schedule, self.sharing)

    @property
    def name(self) -> str:
        return f"{self.plain.name}, overlapped as {self.template.name} with {self.sharing.name} sharing"

    @property
    def digest(self) -> str:
        told = repr(
            (self.plain.digest, self.template, self.sharing, self._slowed, self.least_tokens)
        )
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    def holds(self, features: StepFeatures, share: float = 1.0) -> bool:
        """Whether the template prices this step."""
        is_whole = features.layers in (None, self.times.num_layers) and share == 1.0
        return is_whole and self.least_tokens <= features.num_tokens <= self.template.tokens

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        plain_s = self.plain.seconds(features, share)
        if not self.holds(features, share):
            return plain_s
        load, num = load_of(features), self.times.num_layers
        rest_s = plain_s - num * sequential_s(load, self.times)
        return max(0.0, rest_s) + self.layers_s(load)

    def layers_s(self, load: Load) -> float:
        """All layers, the first one's filling and the last one's draining included."""
        seconds = seconds_of(self._schedule.ops, load, self.times, slowed=self._slowed)
        return self._player.layers_s(seconds, self.times.num_layers)

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        if not self.holds(features, share):
            return self.plain.run_seconds(features, count, share)
        return [self.seconds(features.grown(step), share) for step in range(count)]

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        """Bytes and flops are the plain forward's, though weights are read for every nano-batch; energy is unknown."""
        plain = self.plain.step(features, share)
        if not self.holds(features, share):
            return plain
        time_s = self.seconds(features, share)
        layers_s = self.layers_s(load_of(features))
        parts = (("layers", layers_s), ("head and host", time_s - layers_s))
        return StepCost(time_s, None, plain.num_bytes, plain.flops, parts)
