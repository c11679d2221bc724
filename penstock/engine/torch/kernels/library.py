"""The compiled library as Python sees it: its structs, its entry points, and which instruction set to use.

Calls go through ctypes, which releases the interpreter lock. The struct classes mirror source/calls.h.
An instruction set is used only if it reproduces plain torch on a small case on this very machine.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from penstock.engine.torch.kernels.build import BEST_FIRST, BuildFailed, Variant, build

logger = logging.getLogger(__name__)

SEES_ALL = 2**31 - 1  # a window no context exceeds


class AttentionCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("query", "key", "value", "out", "lse")),
        *((name, c_void_p) for name in ("key_cache", "value_cache")),
        *((name, c_void_p) for name in ("query_start", "context", "block_table", "slots")),
        *((f"{name}_stride", c_int64) for name in ("query", "key", "value", "table")),
        *((f"num_{name}", c_int32) for name in ("chunks", "tokens", "heads", "kv_heads")),
        *((name, c_int32) for name in ("head_dim", "block_size", "causal", "window")),
        ("scale", c_float),
        ("cap", c_float),
        *((name, c_int32) for name in ("bf16", "eight_bits", "is_latent", "value_dim")),
    ]


class NormCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "residual", "weight", "out", "sum")),
        *((name, c_int64) for name in ("num_rows", "width", "x_stride", "residual_stride")),
        ("epsilon", c_float),
        ("bf16", c_int32),
        ("wide", c_int32),
    ]


class RopeCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("query", "key", "query_weight", "key_weight")),
        *((name, c_void_p) for name in ("cos_sin", "positions")),
        *((name, c_int64) for name in ("query_stride", "key_stride", "num_tokens")),
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
        ("epsilon", c_float),
        ("bf16", c_int32),
        ("wide", c_int32),
    ]


class GateCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("gate_up", "out")),
        *((name, c_int64) for name in ("num_rows", "width", "stride")),
        ("bf16", c_int32),
        ("gelu", c_int32),
    ]


class AdaptCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "out", "down", "up", "rows", "slots")),
        *((f"num_{name}", c_int64) for name in ("users", "in", "out")),
        *((name, c_int64) for name in ("rank", "x_stride", "out_stride")),
        *((name, c_int64) for name in ("down_stride", "up_stride")),
        ("bf16", c_int32),
    ]


class LinearCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, c_int64) for name in ("num_rows", "num_in", "num_out", "x_stride")),
        ("bf16", c_int32),
    ]


class QuantisedCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "bias", "codes", "scales", "zeros", "order")),
        *((name, c_void_p) for name in ("out", "bytes", "groups")),
        *((f"num_{name}", c_int64) for name in ("rows", "in", "out")),
        *((name, c_int64) for name in ("x_stride", "num_groups")),
        ("unit", c_float),
        *((name, c_int32) for name in ("bits", "group", "bf16")),
    ]


class ShortsCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "bias", "codes", "scales", "out", "rows", "steps")),
        *((f"num_{name}", c_int64) for name in ("rows", "in", "out")),
        ("x_stride", c_int64),
        *((name, c_int32) for name in ("group", "bf16", "is_plain")),
    ]


class DrawCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("logits", "heat", "chance", "top_k", "top_p", "min_p")),
        *((name, c_void_p) for name in ("ids", "best")),
        *((name, c_int64) for name in ("num_rows", "width", "stride")),
    ]


class BanCall(ctypes.Structure):
    _fields_: ClassVar = [("logits", c_void_p), ("allowed", c_void_p), ("width", c_int64)]


class Library:
    """Entry points, each called with (table of an instruction set, byref(call), threads)."""

    def __init__(self, path: Path, variants: Sequence[Variant]) -> None:
        self.path = str(path)
        dll = ctypes.CDLL(self.path)
        self.attention = dll.penstock_attention
        self.norm = dll.penstock_norm
        self.rope = dll.penstock_rope
        self.gate = dll.penstock_gate
        self.linear = dll.penstock_linear
        self.adapt = dll.penstock_adapt
        self.draw = dll.penstock_draw
        self.quantised = dll.penstock_quantised
        self.shorten = dll.penstock_shorten
        self.shorts = dll.penstock_shorts
        self.ban = dll.penstock_ban
        large = (self.attention, self.linear, self.quantised, self.shorts)
        small = (self.norm, self.rope, self.gate, self.adapt, self.shorten)
        for entry in (*large, *small, self.draw, self.ban):
            entry.argtypes = (c_void_p, c_void_p, ctypes.c_int)
            entry.restype = None
        self.program = dll.penstock_program
        self.program.argtypes = (c_void_p, c_void_p, c_int64, ctypes.c_int)
        self.program.restype = None
        self.pieces = dll.penstock_pieces
        self.pieces.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, ctypes.c_int)
        self.pieces.restype = c_int64
        self.large_pages = dll.penstock_large_pages
        self.large_pages.argtypes, self.large_pages.restype = (c_void_p, c_int64), None
        self.tables = {
            v.name: table for v in variants if (table := _table(dll, v.name)) is not None
        }
        dll.penstock_use_threads.argtypes = (c_void_p,)
        dll.penstock_use_threads(openmp_region())


def _table(dll: ctypes.CDLL, name: str) -> int | None:
    try:
        return ctypes.addressof(ctypes.c_char.in_dll(dll, f"penstock_{name}"))
    except ValueError:
        return None


def openmp_region() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded. Opening any other copy would start rival threads."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line or "libomp" in line}
    for path in sorted(loaded, key=lambda p: ("/torch/" not in p, p)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


_build_with: tuple[str | None, Path | None] = (None, None)


def build_with(compiler: str | None, folder: Path | None) -> None:
    """How this process makes its library, None = what build.py looks for. Whoever asks from now on gets that one."""
    global _build_with
    if _build_with != (compiler, folder):
        _build_with = (compiler, folder)
        load.cache_clear()
        why_not.cache_clear()


@cache
def load() -> Library:
    """The library with the instruction sets that passed their check, best first. Raises BuildFailed."""
    compiler, folder = _build_with
    try:
        library = Library(build(folder, compiler=compiler), BEST_FIRST)
    except OSError as error:
        raise BuildFailed(f"the compiled library cannot be loaded: {error}") from error
    from penstock.engine.torch.kernels.check import agrees

    for name in list(library.tables):
        if not agrees(library, name):
            logger.warning("the %s kernels disagree with torch on this machine: not used", name)
            del library.tables[name]
    if not library.tables:
        raise BuildFailed("no instruction set passed the check against torch")
    return library


@cache
def why_not() -> str | None:
    """Why the kernels cannot be used here, or None if they can. The first call may compile."""
    try:
        load()
    except BuildFailed as error:
        logger.warning(
            "CPU kernels are not available, torch operations are used instead: %s", error
        )
        return str(error)
    return None


def available() -> bool:
    return why_not() is None


def isas() -> list[str]:
    """The instruction sets that can be used here, best first; empty when there are no kernels."""
    return list(load().tables) if available() else []


def pick(isa: str | None) -> tuple[Library, int]:
    """The library and the table of one instruction set (the best, if none is named)."""
    library = load()
    name = isa or next(iter(library.tables))
    assert name in library.tables, f"no {name} kernels here; there are {', '.join(library.tables)}"
    return library, library.tables[name]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16
