"""The operator tables that NVIDIA's AIConfigurator carries, as ours: cards, engines and versions that it measured.

cost.table_files finds and reads them. What we take:

    gemm_perf                    (m, n, k): the projections, sharded; n and k that lie between measured ones bilinearly
    generation_attention_perf    (batch, step): steps of decodes; a step reads step + 1 positions
    context_attention_perf       (batch, isl), without a prefix and without a window: prefills
    moe_perf                     (tokens) of this very mixture, routed by its power law
    custom_allreduce_perf        (numbers) summed among the cards, as the engine's captured graphs do it; NCCL's own
                                 where it is missing, the card catalogue where both are

Nothing was measured of prefills with a prefix, of prefills and decodes in one call, of norms and activations. A chunk
that continues a prefix costs its share of the pairs of the whole; both kinds in one step cost the sum, or more where
FlashAttention 2 runs them (cost.attention_table); the small kernels cost 3 us each and their bytes at 80 % of the
bandwidth, which is how its own models fill them in.

Weights and KV are two bytes a number or one (fp8), as the shape says; the LM head and what is summed have two.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from penstock.core.errors import BadConfig
from penstock.cost.attention_table import SplitAttention
from penstock.cost.grid import Grid, Line, Point, full_axes
from penstock.cost.hardware import Card
from penstock.cost.op_tables import OpTables
from penstock.cost.shapes import ModelShape
from penstock.cost.table_files import TableFiles, digest_of, find_tables, read_points

DTYPES = {2.0: "bfloat16", 1.0: "fp8"}
WHOLE_BYTES = 2  # of a number that is not quantized
SMALL_KERNELS = 4  # a layer's two norms, rotary embedding and activation
SMALL_FLOOR_S = 3e-6
SMALL_BANDWIDTH = 0.8
SMALL_ROWS = (1, 1 << 17)  # two points of a straight line
ROUTING = "power_law_1.01"
TILED = (
    "a100-80g",
    "l40s",
    "rtx-pro-6000",
)  # where vLLM runs FlashAttention 2: cost.attention_table


def read_configurator(
    shape: ModelShape, card: Card, *, tp: int = 1, engine: str | None = None
) -> OpTables:
    """Raises MissingExtra without the package, BadConfig for what it has not measured."""
    files = find_tables(card.name, engine)
    sums = _sums(files, tp)
    used = [files.needed(name) for name in _names(shape)] + ([] if sums is None else [sums[0]])
    name = files.told(used)
    told = hashlib.blake2b(f"{name} {tp} {shape}".encode(), digest_size=8)
    for path in used:
        told.update(digest_of(path))
    return OpTables(
        name=name,
        digest=told.hexdigest(),
        layer=_layer(files, shape, card, tp),
        once={},
        head={"lm_head": _gemm(files, "bfloat16", -(-shape.vocab // tp), shape.hidden)},
        attention=_attention(files, shape, card, tp),
        sums=None if sums is None else sums[1],
    )


def _names(shape: ModelShape) -> list[str]:
    if not shape.is_uniform:
        raise BadConfig(
            f"AIConfigurator's tables cannot price {shape.name}: its layers differ from each other, have no gate, "
            "share an expert or cache latents",
            hint="use the roofline of a card",
        )
    names = ["gemm_perf", "generation_attention_perf", "context_attention_perf"]
    return names if shape.experts is None else [*names, "moe_perf"]


def _dtype(item_bytes: float) -> str:
    if item_bytes not in DTYPES:
        raise BadConfig(
            f"AIConfigurator's tables are read for 1 or 2 bytes a number, not {item_bytes}"
        )
    return DTYPES[item_bytes]


def _layer(files: TableFiles, shape: ModelShape, card: Card, tp: int) -> dict[str, Line]:
    """Lines over tokens of what a layer does besides attention."""
    hidden, width = shape.hidden, shape.head_dim
    gemm = functools.partial(_gemm, files, _dtype(shape.weight_item_bytes))
    heads = (shape.heads + 2 * shape.kv_heads) * width // tp
    found = {"qkv_proj": gemm(heads, hidden), "o_proj": gemm(hidden, shape.heads * width // tp)}
    ffn = shape.ffn
    if shape.experts is None:
        found["gate_up_proj"] = gemm(2 * ffn // tp, hidden)
        found["down_proj"] = gemm(hidden, ffn // tp)
    else:
        ffn = (shape.top_k or 0) * (shape.expert_ffn or 0)
        found["router"] = _gemm(files, "bfloat16", shape.experts, hidden)
        found["experts"] = _experts(files, shape, tp)
    each = (8 * hidden + 3 * ffn / tp) * WHOLE_BYTES
    per_row = each / (card.bandwidth * SMALL_BANDWIDTH)
    floor = SMALL_KERNELS * SMALL_FLOOR_S
    found["small kernels"] = Line({rows: floor + rows * per_row for rows in SMALL_ROWS})
    return found


def _gemm(files: TableFiles, dtype: str, n: int, k: int) -> Line:
    grids = _gemms(files.needed("gemm_perf"), dtype)
    return Line({m: max(0.0, grid(k, n)) for m, grid in grids.items()})


@functools.cache
def _gemms(path: Path, dtype: str) -> dict[int, Grid]:
    """A grid over (k, n) for each measured m. k first: where the corner of both largest is missing, a k is given up."""
    by_m: dict[int, dict[Point, float]] = {}
    for (m, n, k), seconds in read_points(path, ("m", "n", "k"), gemm_dtype=dtype).items():
        by_m.setdefault(m, {})[k, n] = seconds
    if not by_m:
        raise BadConfig(f"no products of {dtype} were measured: {path}")
    return {m: Grid(full_axes(list(values)), values) for m, values in by_m.items()}


def _experts(files: TableFiles, shape: ModelShape, tp: int) -> Line:
    found = read_points(
        files.needed("moe_perf"),
        ("num_tokens",),
        moe_dtype=_dtype(shape.weight_item_bytes),
        hidden_size=shape.hidden,
        inter_size=shape.expert_ffn or 0,
        topk=shape.top_k or 0,
        num_experts=shape.experts or 0,
        moe_tp_size=tp,
        moe_ep_size=1,
        distribution=ROUTING,
    )
    if not found:
        raise BadConfig(f"{files.name} has not measured the experts of {shape.name} at {tp} cards")
    return Line({tokens: seconds for (tokens,), seconds in found.items()})


def _attention(files: TableFiles, shape: ModelShape, card: Card, tp: int) -> SplitAttention:
    wanted: dict[str, str | int] = {
        "num_heads": shape.heads // tp,
        "num_key_value_heads": max(1, shape.kv_heads // tp),
        "head_dim": shape.head_dim,
        "kv_cache_dtype": _dtype(shape.kv_item_bytes),
        "window_size": 0,
    }
    steps, prompts = ("batch_size", "step"), ("batch_size", "isl")
    decodes = read_points(files.needed("generation_attention_perf"), steps, **wanted)
    prefills = read_points(files.needed("context_attention_perf"), prompts, **wanted)
    if not decodes or not prefills:
        raise BadConfig(f"{files.name} has not measured attention of {shape.name} at {tp} cards")
    lines: dict[int, dict[int, float]] = {}
    for (batch, step), seconds in decodes.items():
        lines.setdefault(batch, {})[step + 1] = seconds
    is_tiled = files.engine == "vllm" and card.name in TILED
    return SplitAttention(lines, prefills, is_tiled=is_tiled)


def _sums(files: TableFiles, tp: int) -> tuple[Path, Line] | None:
    """Where from, and seconds by bytes (told in numbers); None where no sum among so many cards was measured."""
    custom, nccl = files.path("custom_allreduce_perf"), files.nccl()
    at = ("message_size",)
    if tp > 1 and custom is not None:
        points = read_points(custom, at, allreduce_dtype="bfloat16", num_gpus=tp)
        if points:
            return custom, _by_bytes(points)
    if tp > 1 and nccl is not None:
        points = read_points(nccl, at, op_name="all_reduce", nccl_dtype="half", num_gpus=tp)
        if points:
            return nccl, _by_bytes(points)
    return None


def _by_bytes(points: Mapping[Point, float]) -> Line:
    return Line({numbers * WHOLE_BYTES: seconds for (numbers,), seconds in points.items()})
