"""How answers are guessed ahead: the words that configuration, engine and simulation share.

    [fleet.speculation]
    method = "ngram"                # guesses come from the job's own text, or from a model: "draft"
    max_drafts = 4                  # guesses for one job in a step, at most
    min_ngram = 2                   # of "ngram": how many last tokens must have stood there before
    max_ngram = 4
    model = "./my-small-model"      # of "draft": a folder or a Hub name, with the served model's tokens
    acceptance = [0.7, 0.6]         # simulations: chance that the j-th guess is right where those before it were
    of_tenants = {code = [0.9]}     # the same for the requests of some tenants
    proposes = 0.5                  # simulations: chance that there is anything to guess

How many guesses a job gets in a step is a decision: see policy/batch/speculative.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """See the module's text. `revision`: of a Hub's model."""

    method: Literal["ngram", "draft"] = "ngram"
    max_drafts: int = 4
    min_ngram: int = 2
    max_ngram: int = 4
    model: str | None = None
    revision: str | None = None
    acceptance: tuple[float, ...] = (0.6,)
    of_tenants: dict[str, tuple[float, ...]] = field(default_factory=dict)
    proposes: float = 1.0

    def __post_init__(self) -> None:
        if self.max_drafts < 1:
            raise ValueError(f"max_drafts must be at least 1, got {self.max_drafts}")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"min_ngram must lie between 1 and max_ngram ({self.max_ngram}), got {self.min_ngram}"
            )
        if (self.method == "draft") != (self.model is not None):
            raise ValueError('method = "draft" needs a `model`, and no other method has one')
        told = [self.acceptance, *self.of_tenants.values()]
        if not all(told):
            raise ValueError("acceptance lists at least one probability")
        if not all(
            0 <= one <= 1 for one in (*(each for row in told for each in row), self.proposes)
        ):
            raise ValueError("acceptance and proposes are probabilities, from 0 to 1")

    def chances(self, tenant: str) -> tuple[float, ...]:
        """By depth; the last one goes on."""
        return self.of_tenants.get(tenant, self.acceptance)
