"""Linear layers on CUDA: a single row by our own programs, several rows in few bits too.

    row      x [1, in], numbers or few bits: a weight is read once, as it is kept, by as many programs as keep enough
             loads under way
    tile     up to TILED_ROWS rows of a weight in few bits: it is read as it is kept and multiplied as numbers, tile
             by tile; few outputs have their inputs cut into parts, that are summed in fp32
    widened  more rows: the weight becomes numbers first, once for all of them, and torch multiplies

Numbers of several rows are torch's own product. In few bits a row is not quantised, unlike on a CPU: scales multiply
sums (row) or codes (tile, widened; rounded to the type of x), and everything is summed in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.cuda import fused, products
from penstock.engine.torch.cuda.launch import Open, launch
from penstock.engine.torch.ports import Linear, ShardSpec
from penstock.engine.torch.quantised import Quantised

TILED_ROWS = 64
SMALLEST_GROUP = 16
LARGEST_GROUP = 256
ENOUGH = 264  # programs that keep a large card busy
WHOLE = 4096  # inputs of a row that are read at once
AT_ONCE = 1024  # inputs that a program reads of a row


class RowLinear:
    """The LinearMethod of weights as numbers."""

    name = "row"

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        return RowOrTorch(weight.contiguous(), bias)


@dataclass(frozen=True, slots=True, eq=False)
class RowOrTorch:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return F.linear(x, self.weight, self.bias)
        return self._row(x, len(self.weight), NOT_GATED)

    def gated(self, x: Tensor, is_gelu: bool) -> Tensor:
        """See ports.Gating."""
        if x.shape[0] > 1:
            return fused.gated(self(x), is_gelu)
        return self._row(x, len(self.weight) // 2, gates(is_gelu))

    def _row(self, x: Tensor, num_out: int, form: dict[str, bool]) -> Tensor:
        num_in, has_bias = self.weight.shape[1], self.bias is not None
        x = x if x.stride(1) == 1 else x.contiguous()
        out = x.new_empty(1, num_out)
        operands = (x, self.weight, self.bias, out, num_out, num_in)
        if num_in > WHOLE:
            outputs, at_once, warps = run_of(num_out, num_in)
            outputs = (
                outputs // 2 if form["IS_GATED"] else outputs
            )  # of gates, and as many beside them
            launch(
                products.row_by_numbers, (triton.cdiv(num_out, outputs),), *operands,
                BN=outputs, BK=at_once, HAS_BIAS=has_bias, warps=warps, **form,
            )  # fmt: skip
            return out
        width = triton.next_power_of_2(num_in)
        outputs, warps = whole_run_of(width, form["IS_GATED"])
        launch(
            products.whole_row_by_numbers, (triton.cdiv(num_out, outputs),), *operands,
            BN=outputs, WIDTH=width, IS_FULL=width == num_in, HAS_BIAS=has_bias, warps=warps, **form,
        )  # fmt: skip
        return out


NOT_GATED = {"IS_GATED": False, "IS_GELU": False}


def gates(is_gelu: bool) -> dict[str, bool]:
    return {"IS_GATED": True, "IS_GELU": is_gelu}


def whole_run_of(width: int, is_gated: bool) -> tuple[int, int]:
    """(outputs, warps) of a program that reads rows of so many inputs at once."""
    outputs, warps = (4, 4) if width <= 1024 else (4, 8) if width <= 2048 else (2, 8)
    return (outputs // 2 if is_gated else outputs), warps


def run_of(num_out: int, num_in: int) -> tuple[int, int, int]:
    """(outputs, inputs at once, warps) of a program, as they were fastest on an H200."""
    if num_out < 8 * ENOUGH:
        outputs, at_once, warps = 4, 2048, 8
    elif num_out < 20 * ENOUGH:
        outputs, at_once, warps = 4, 1024, 4
    else:
        outputs, at_once, warps = 8, 512, 4
    return outputs, min(at_once, triton.next_power_of_2(num_in)), warps


class CodesLinear:
    """The QuantisedMethod that keeps codes packed."""

    name = "packed"

    @staticmethod
    def why_not_for(weight: Quantised) -> str | None:
        """Why this weight cannot be kept packed, or None if it can."""
        if _group_of(weight) is None:
            return (
                f"groups of {weight.group} in {weight.shape[1]} inputs have no common power of two"
            )
        return None

    def pack_quantised(self, weight: Quantised, bias: Tensor | None) -> Linear:
        group = _group_of(weight)
        assert group is not None, self.why_not_for(weight)
        times, codes = weight.group // group, weight.codes
        if weight.bits == 4:
            low, high = codes.chunk(2, 1)
            codes = low | high << 4
        zeros = weight.zeros
        return PackedCodes(
            codes=codes.contiguous(),
            scales=weight.scales.repeat_interleave(times, 1).contiguous(),
            zeros=None if zeros is None else zeros.repeat_interleave(times, 1).contiguous(),
            order=weight.order,
            bias=bias,
            bits=weight.bits,
            group=group,
            num_in=weight.shape[1],
        )


def _group_of(weight: Quantised) -> int | None:
    """The largest power of two whose groups are whole in the weight's groups, and in half a row of 4 bits."""
    run = weight.shape[1] // (2 if weight.bits == 4 else 1)
    size = math.gcd(weight.group, run, LARGEST_GROUP)
    is_whole = weight.bits == 8 or weight.shape[1] % 2 == 0
    return size if is_whole and size >= SMALLEST_GROUP else None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedCodes:
    """Codes uint8 [out, in] or [out, in / 2], scales fp32 and zeros uint8 [out, in / group]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    bits: int
    group: int
    num_in: int

    @property
    def num_bytes(self) -> int:
        """Read by a call of few rows."""
        tables = (self.codes, self.scales, self.zeros)
        return sum(one.numel() * one.element_size() for one in tables if one is not None)

    def __call__(self, x: Tensor) -> Tensor:
        x = self._ordered(x)
        if x.shape[0] == 1:
            return self._row(x, len(self.codes), NOT_GATED)
        if x.shape[0] <= TILED_ROWS:
            return self._tiled(x)
        return F.linear(x, self.numbers(x.dtype), self.bias)

    def gated(self, x: Tensor, is_gelu: bool) -> Tensor:
        """See ports.Gating."""
        if x.shape[0] > 1:
            return fused.gated(self(x), is_gelu)
        return self._row(self._ordered(x), len(self.codes) // 2, gates(is_gelu))

    def _ordered(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x[:, self.order]
        return x if x.stride(1) == 1 else x.contiguous()

    def _row(self, x: Tensor, num_out: int, form: dict[str, bool]) -> Tensor:
        out = x.new_empty(1, num_out)
        outputs = 8 if num_out >= 40 * ENOUGH else 4
        at_once = (512 if outputs == 8 else AT_ONCE) // self.group
        groups = self.codes.shape[1] // self.group
        launch(
            products.row_by_codes, (triton.cdiv(num_out, outputs),), x,
            self.codes, self.scales, self.zeros, self.bias, out, num_out, self.num_in,
            BITS=self.bits, GROUP=self.group, BN=outputs,
            BG=min(at_once, triton.next_power_of_2(groups)),
            HAS_ZEROS=self.zeros is not None, HAS_BIAS=self.bias is not None,
            **form,
        )  # fmt: skip
        return out

    def _tiled(self, x: Tensor) -> Tensor:
        (rows, _), num_out = x.shape, len(self.codes)
        tile = min(64, max(16, triton.next_power_of_2(rows)))
        outputs, at_once = 64, self._groups_at_once(128)
        steps = self.codes.shape[1] // self.group // at_once
        programs = triton.cdiv(num_out, outputs) * triton.cdiv(rows, tile)
        parts = min(steps, max(1, ENOUGH // programs))
        steps = triton.cdiv(steps, parts)
        parts = triton.cdiv(self.codes.shape[1] // self.group // at_once, steps)
        dtype = x.dtype if parts == 1 else torch.float32
        out = torch.empty(parts, rows, num_out, dtype=dtype, device=x.device)
        grid = (triton.cdiv(num_out, outputs), triton.cdiv(rows, tile), parts)
        launch(
            products.rows_by_codes, grid, x, self.codes, self.scales, self.zeros, out,
            Open(rows), num_out, self.num_in, x.stride(0), Open(steps),
            BITS=self.bits, GROUP=self.group, BM=tile, BN=outputs, BG=at_once,
            HAS_ZEROS=self.zeros is not None, IS_EXACT=x.dtype == torch.float32,
        )  # fmt: skip
        whole = out[0] if parts == 1 else out.sum(0).to(x.dtype)
        return whole if self.bias is None else whole.add_(self.bias)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The weight again, in the order of the codes."""
        weight = torch.empty(len(self.codes), self.num_in, dtype=dtype, device=self.codes.device)
        at_once = self._groups_at_once(AT_ONCE)
        runs = self.codes.shape[1] // self.group // at_once
        launch(
            products.widen_codes, (len(self.codes), runs), self.codes, self.scales, self.zeros, weight, self.num_in,
            BITS=self.bits, GROUP=self.group, BG=at_once, HAS_ZEROS=self.zeros is not None,
        )  # fmt: skip
        return weight

    def _groups_at_once(self, most: int) -> int:
        """A power of two that divides the groups of a row of bytes, of at most `most` bytes."""
        groups = self.codes.shape[1] // self.group
        return math.gcd(groups, max(1, most // self.group))
