"""What policies may ask about the outside: a StepModel seen through chunks of jobs (core.views.Cost)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from penstock.core.views import Chunk
from penstock.cost.step import StepModel, features_of


class StepPredictor:
    """Predicts steps with a StepModel. Chunks start where their jobs stand; layer ranges count as their share."""

    def __init__(self, model: StepModel, num_layers: int) -> None:
        self.model = model
        self._num_layers = num_layers

    def predict(self, chunks: Iterable[Chunk], share: float = 1.0) -> float:
        """Seconds of one step of these chunks in a lane with that share; 0 for none."""
        by_layers: dict[int | None, list[tuple[int, int, int]]] = {}
        for job, tokens, layers, phase in chunks:
            start = job.computed + job.in_flight
            is_last = layers is None or layers[1] == self._num_layers
            samples = int(is_last and start + tokens == job.known)
            if phase == "verify":
                samples = tokens
            depth = None if layers is None else layers[1] - layers[0]
            by_layers.setdefault(depth, []).append((start, tokens, samples))
        return math.fsum(
            self.model.seconds(features_of(pieces, depth), share)
            for depth, pieces in by_layers.items()
        )
