"""A pipeline template: how a layer's nano-operations are cut, ordered and sized, found once and used for ever.

`Batch.nano` names one. What a template is for is its key: model, card, devices, tokens of the dense batch, sharing, and
the load it was found for, with the digest of the times. It is plain JSON; other loads of the same dense batch are
priced under it too, less well the further they are from its own.

Everything in it is modelled: no kernel ran.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import build
from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema
from penstock.cost.nano_layer import LayerTimes, Load, Split, nano_ops
from penstock.cost.nano_play import Schedule
from penstock.cost.nano_sharing import Sharing

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Periods in seconds a layer. `bound_s`: below this no pipeline comes under this sharing; `free_*`: of phase 1,
    without interference; `uncut_s`: operator after operator on the whole batch.
    """

    schema: int = SCHEMA
    name: str
    model: str
    card: str
    tp: int
    tokens: int
    sharing: str
    digest: str
    pieces: tuple[tuple[int, ...], ...]
    places: tuple[float, ...]
    shares: tuple[float, ...]
    period_s: float
    uncut_s: float
    bound_s: float
    free_period_s: float
    free_bound_s: float
    search_s: float

    def __post_init__(self) -> None:
        num = len(nano_ops(self.split, self.tp))
        if not len(self.places) == len(self.shares) == num:
            raise BadConfig(
                f"template {self.name} needs places and shares of {num} nano-operations"
            )
        if self.split.tokens != self.tokens:
            raise BadConfig(
                f"template {self.name}: pieces hold {self.split.tokens} tokens, not {self.tokens}"
            )

    @property
    def split(self) -> Split:
        return Split(self.pieces)

    @property
    def schedule(self) -> Schedule:
        return Schedule(tuple(nano_ops(self.split, self.tp)), self.shares, self.places)

    @property
    def gap(self) -> float:
        """How far the period is from the bound."""
        return self.period_s / self.bound_s - 1

    @property
    def gain(self) -> float:
        """Over operator after operator."""
        return self.uncut_s / self.period_s

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def read_template(path: Path) -> Template:
    """Raises BadConfig for a file that is no template, SchemaMismatch for one of another version."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path} is no pipeline template: {error}") from None
    schema = table.get("schema") if isinstance(table, dict) else None
    check_schema(str(path), schema if isinstance(schema, int) else 0)
    return build(Template, table)


def key_of(times: LayerTimes, load: Load, sharing: Sharing, effort: str) -> str:
    """Digest of all that a search depends on; `effort`: how it searches."""
    told = repr((SCHEMA, times.digest, times.tp, dataclasses.astuple(load), sharing, effort))
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
