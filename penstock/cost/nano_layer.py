"""The operators of one layer cut into nano-operations: who waits for whom, and how long each takes alone.

NanoFlow (Zhu et al., OSDI 2025) runs operators that use different resources side by side. For that a batch is cut into
nano-batches, and an operator into nano-operations, one for each range of tokens:

    qkv -> decode attention, prefill attention -> out -> out sum -> gate up -> down -> down sum -> qkv of the next layer
    compute  memory             compute           compute  network   compute   compute  network

Rules
- A nano-operation waits for those of the operator before it whose token ranges meet its own; the next layer's qkv for
  the sums of its tokens only. On one device there are no sums.
- qkv and attention ("the front") may be cut finer than the rest: a Split says into which pieces each nano-batch's
  front is cut.
- Decode tokens stand first in the batch, then prefill tokens; attention of a piece is its part of each. Products run
  on the whole range, whatever it holds.
- Times are those of a cost model for the whole device (LayerTimes); a smaller product takes longer a token, which is
  the model's own price of cutting. `slowed` makes products of cut batches slower still.
- Norms go with the product behind them and the activation with the product `down`, as one block of the compute class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, Protocol

from penstock.core.errors import BadConfig
from penstock.cost.step import StepFeatures

Resource = Literal["compute", "memory", "network"]
RESOURCES: tuple[Resource, ...] = ("compute", "memory", "network")
FRONT = ("qkv", "decode attention", "prefill attention")
PRODUCTS = ("qkv", "out", "gate up", "down")
USES: dict[str, Resource] = {
    "qkv": "compute",
    "decode attention": "memory",
    "prefill attention": "compute",
    "out": "compute",
    "out sum": "network",
    "gate up": "compute",
    "down": "compute",
    "down sum": "network",
}
BEFORE: dict[str, tuple[str, ...]] = {
    "decode attention": ("qkv",),
    "prefill attention": ("qkv",),
    "out": ("decode attention", "prefill attention"),
    "out sum": ("out",),
    "gate up": ("out sum",),
    "down": ("gate up",),
    "down sum": ("down",),
}


class LayerTimes(Protocol):
    """Seconds of one layer's operators, each alone on the whole device."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def tp(self) -> int: ...

    def product_s(self, operator: str, rows: int) -> float: ...
    def decode_s(self, num: int, context: float) -> float: ...
    def prefill_s(self, tokens: float, pairs: float, num: float) -> float: ...
    def sum_s(self, rows: int) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a dense batch holds, in the sums of StepFeatures: `decodes` tokens first, then prefill tokens."""

    decodes: int
    decode_context: float
    prefills: int = 0
    num_prefills: int = 0
    pairs: float = 0.0

    @property
    def tokens(self) -> int:
        return self.decodes + self.prefills


def load_of(features: StepFeatures) -> Load:
    return Load(
        decodes=features.num_decodes,
        decode_context=features.decode_context,
        prefills=features.num_tokens - features.num_decodes,
        num_prefills=features.num_prefills,
        pairs=features.prefill_pairs,
    )


@dataclass(frozen=True, slots=True)
class Split:
    """Sizes in tokens of the front pieces of each nano-batch: ((256, 384), (768, 640)) are two of 640 and 1,408."""

    pieces: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.pieces or any(not each or min(each) < 1 for each in self.pieces):
            raise BadConfig(f"a split needs pieces of at least one token, not {self.pieces}")

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.pieces))

    @property
    def is_cut(self) -> bool:
        return len(self.pieces) > 1 or len(self.pieces[0]) > 1

    def ranges(self, operator: str) -> list[tuple[int, int]]:
        """Token ranges of an operator's nano-operations."""
        sizes = [sum(each) for each in self.pieces]
        if operator in FRONT:
            sizes = [size for each in self.pieces for size in each]
        return list(pairwise(accumulate(sizes, initial=0)))


class NanoOp(NamedTuple):
    """One operator on the tokens [first, end)."""

    operator: str
    first: int
    end: int

    @property
    def resource(self) -> Resource:
        return USES[self.operator]

    @property
    def tokens(self) -> int:
        return self.end - self.first

    def __str__(self) -> str:
        return f"{self.operator} {self.first}-{self.end}"


class Wait(NamedTuple):
    """`later` begins after the end of `sooner` in the layer `layers` before its own. Both are places in a list."""

    sooner: int
    later: int
    layers: int = 0


def nano_ops(split: Split, tp: int) -> list[NanoOp]:
    """All of a layer, operator by operator."""
    names = [name for name in USES if tp > 1 or not name.endswith("sum")]
    return [NanoOp(name, *ends) for name in names for ends in split.ranges(name)]


def waits_of(ops: Sequence[NanoOp]) -> list[Wait]:
    """Who waits for whom, within a layer and from one to the next."""
    present = {op.operator for op in ops}
    last = [name for name in USES if name in present][-1]
    found = []
    for later, op in enumerate(ops):
        sources = {name: 0 for name in _present_before(op.operator, present)}
        if op.operator == "qkv":
            sources = {last: 1}
        found += [
            Wait(sooner, later, sources[other.operator])
            for sooner, other in enumerate(ops)
            if other.operator in sources and other.first < op.end and op.first < other.end
        ]
    return found


def _present_before(operator: str, present: set[str]) -> list[str]:
    """Operators right before this one; those that are absent are passed through."""
    found = []
    for name in BEFORE.get(operator, ()):
        found += [name] if name in present else _present_before(name, present)
    return found


def seconds_of(
    ops: Sequence[NanoOp], load: Load, times: LayerTimes, *, slowed: float = 1.0
) -> list[float]:
    """How long each takes alone. Decodes stand first; padding up to the end of the split is computed for nothing."""
    return [_seconds(op, load, times, slowed) for op in ops]


def _seconds(op: NanoOp, load: Load, times: LayerTimes, slowed: float) -> float:
    if op.operator in PRODUCTS:
        return slowed * times.product_s(op.operator, op.tokens)
    if op.operator.endswith("sum"):
        return times.sum_s(op.tokens)
    if op.operator == "decode attention":
        num = max(0, min(op.end, load.decodes) - op.first)
        return times.decode_s(num, load.decode_context * num / load.decodes) if num else 0.0
    tokens = max(0, min(op.end, load.tokens) - max(op.first, load.decodes))
    if not tokens:
        return 0.0
    part = tokens / load.prefills
    return times.prefill_s(tokens, load.pairs * part, max(1.0, load.num_prefills * part))


def sequential_s(load: Load, times: LayerTimes) -> float:
    """One layer of an uncut batch, operator after operator."""
    return sum(seconds_of(nano_ops(Split(((load.tokens,),)), times.tp), load, times))


def busy_s(ops: Sequence[NanoOp], seconds: Sequence[float]) -> dict[Resource, float]:
    """What each resource has to do in a layer."""
    found: dict[Resource, float] = dict.fromkeys(RESOURCES, 0.0)
    for op, each in zip(ops, seconds, strict=True):
        found[op.resource] += each
    return found
