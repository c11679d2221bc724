"""Attention by measured calls: (prefill chunk, KV before it, decodes, KV of each decode) -> seconds of one layer.

A step of decodes alone runs other kernels than one with a prefill among them, so the two are two tables:

    decodes   a line over the mean context for each measured number of decodes, numbers between them blended
    mixed     a full grid of four axes

A table knows one prefill a call. Several chunks become one of as many tokens whose prefix is chosen so that the
(query, key) pairs are the same; where even no prefix leaves too many pairs, the grid's value without a prefix is
scaled down by the pairs. Decodes of one call have one length in the table: see cost.table for what unequal ones add.

Where prefills and decodes were measured apart, a step with both costs the sum. FlashAttention 2 makes it more: heads
that share KV are packed into one tile only while no sequence has more than one query. Beside a prefill each head of
each decode fills a tile of 64 queries by itself, most of it for nothing, and costs what such tiles cost in prefills: a
prompt of length c computes c (c + 128) / 2 pairs, as tiles of 64 x 128 cover its triangle; a decode 64 (c + 64).
Published calls of both kinds on RTX PRO 6000 show it: 120 decodes at 500 beside 512 new tokens take 415 us with 8 heads
of KV and 402 with 4; this rule says 449 and 436, the sum 198 and 80.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from penstock.core.errors import BadConfig
from penstock.cost.grid import Grids, Line, Point, blend, place_on

Call = tuple[int, int, int, int]
TILE_QUERIES, TILE_KEYS = (
    64,
    128,
)  # of FlashAttention 2's kernel for paged KV at heads up to 128 wide


class Attention(Protocol):
    """Seconds of one layer's attention on one device."""

    def decodes(self, num: int) -> Line:
        """Over the context of each of `num` decodes, in a step without prefills."""
        ...

    def mixed(self, tokens: int, pairs: int, num_decodes: int, context: float) -> float:
        """Prefill chunks of `tokens` and `pairs` in all beside decodes at `context` each."""
        ...


class DecodeLines:
    """A line over the context for each measured number of decodes; numbers between them are blended."""

    def __init__(self, points: Mapping[int, Mapping[int, float]]) -> None:
        self._lines = {num: Line(each) for num, each in points.items()}
        self._nums = sorted(points)

    def __call__(self, num: int) -> Line:
        found = self._lines.get(num)
        if found is None:
            low, weight = place_on(self._nums, num)
            first, second = self._nums[low], self._nums[min(low + 1, len(self._nums) - 1)]
            found = blend(self._lines[first], self._lines[second], weight)
            self._lines[num] = found
        return found


class AttentionTable:
    """`calls`: seconds by (chunk, kv_prefill, num_decodes, kv_decode)."""

    def __init__(self, calls: Mapping[Call, float], where: str) -> None:
        lines: dict[int, dict[int, float]] = {}
        mixed: dict[Point, float] = {}
        alone: dict[Point, float] = {}
        for (chunk, prefix, num, context), seconds in calls.items():
            if not chunk and num:
                lines.setdefault(num, {})[context] = seconds
            elif chunk and num:
                mixed[chunk, prefix, num, context] = seconds
            elif chunk:
                alone[chunk, prefix] = seconds
        if not (lines and mixed and alone):
            raise BadConfig(f"{where} needs calls of decodes, of prefills, and of both together")
        self.decodes = DecodeLines(lines)
        self._mixed, self._alone = Grids(mixed), Grids(alone)
        self._least = min(point[0] for point in alone)

    def mixed(self, tokens: int, pairs: int, num_decodes: int, context: float) -> float:
        triangle = tokens * (tokens + 1) / 2
        prefix = max(0.0, (pairs - triangle) / tokens)
        if num_decodes:
            seconds = self._mixed(tokens, prefix, num_decodes, context)
        else:
            seconds = self._alone(tokens, prefix)
        if pairs < triangle:
            floor = self._alone(self._least, 0)
            seconds -= (self._alone(tokens, 0) - floor) * (1 - pairs / triangle)
        return seconds


class SplitAttention:
    """Prefills and decodes measured apart and added up. `prefills`: seconds by (batch, length), without a prefix.

    `is_tiled`: beside a prefill each decode fills a tile of its kernel, see TILE_QUERIES.
    """

    def __init__(
        self,
        decodes: Mapping[int, Mapping[int, float]],
        prefills: Mapping[Point, float],
        *,
        is_tiled: bool = False,
    ) -> None:
        self.decodes = DecodeLines(decodes)
        self._prefills = Grids(prefills)
        self._is_tiled = is_tiled

    def mixed(self, tokens: int, pairs: int, num_decodes: int, context: float) -> float:
        return self._chunks_s(tokens, pairs) + self._beside_s(num_decodes, context)

    def _chunks_s(self, tokens: int, pairs: int) -> float:
        length = 2 * pairs / tokens - 1  # of equal prompts with as many tokens and pairs
        if length <= tokens:
            return self._prefills(tokens / length, length)
        whole = pairs / tokens + (tokens - 1) / 2  # one chunk that continues a prefix
        return self._prefills(1, whole) * pairs / (whole * (whole + 1) / 2)

    def _beside_s(self, num: int, context: float) -> float:
        if not num:
            return 0.0
        seconds = self.decodes(num)(context)
        if not self._is_tiled:
            return seconds
        length = max(
            context, TILE_QUERIES
        )  # prompts as long as the contexts tell what a tile costs
        computed = length * (length + TILE_KEYS) / 2
        share = TILE_QUERIES * (context + TILE_KEYS / 2) / computed
        return max(seconds, self._prefills(num, length) * share)
