"""The operator tables that NVIDIA's AIConfigurator carries, as ours: cards, engines and versions that it measured.

Its package is used as data only (Parquet files of latencies in milliseconds), never imported. What we take:

    gemm_perf                    (m, n, k): the projections, sharded; n and k that lie between measured ones bilinearly
    generation_attention_perf    (batch, step): steps of decodes; a step reads step + 1 positions
    context_attention_perf       (batch, isl), without a prefix: prefills
    moe_perf                     (tokens) of this very mixture, routed by its power law

Nothing was measured of prefills with a prefix, of prefills and decodes in one call, of norms and activations. A chunk
that continues a prefix costs its share of the pairs of the whole; both kinds in one step cost the sum; the small
kernels cost 3 us each and their bytes at 80 % of the bandwidth, which is how its own models fill them in.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from penstock.core.errors import BadConfig, MissingExtra, missing_extra
from penstock.cost.attention_table import SplitAttention
from penstock.cost.grid import Grid, Line, Point, full_axes
from penstock.cost.hardware import Card
from penstock.cost.op_tables import OpTables
from penstock.cost.shapes import ModelShape

PACKAGE = "aiconfigurator"
SYSTEMS = {
    "a100-80g": "a100_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
SMALL_KERNELS = 4  # a layer's two norms, rotary embedding and activation
SMALL_FLOOR_S = 3e-6
SMALL_BANDWIDTH = 0.8
ROUTING = "power_law_1.01"
MILLI = 1e-3
SMALL_ROWS = (1, 1 << 17)  # two points of a straight line

Row = dict[str, object]


def read_configurator(
    shape: ModelShape, card: Card, *, tp: int = 1, engine: str | None = None
) -> OpTables:
    """Raises MissingExtra without the package, BadConfig for what it has not measured."""
    folder = _folder(card, engine)
    name = f"{PACKAGE} {folder.parts[-3]} {folder.parts[-2]} {folder.parts[-1]}"
    layer = _layer(folder, shape, card, tp)
    head = _gemm(folder, -(-shape.vocab // tp), shape.hidden)
    return OpTables(
        name=name,
        digest=hashlib.blake2b(f"{name} {tp} {shape}".encode(), digest_size=8).hexdigest(),
        layer=layer,
        once={},
        head={"lm_head": head},
        attention=_attention(folder, shape, tp),
    )


def _folder(card: Card, engine: str | None) -> Path:
    system = SYSTEMS.get(card.name)
    if system is None:
        raise BadConfig(f"{PACKAGE} has no tables of {card.name}; it has: {', '.join(SYSTEMS)}")
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtra(
            f"this reads the tables of the package {PACKAGE!r}, which is not installed",
            hint=f"pip install --no-deps {PACKAGE}==0.10.0 (only its data is used, and it asks for an old numpy)",
        )
    backend, _, version = (engine or "vllm").partition(" ")
    place = Path(spec.origin).parent / "systems" / "data" / system / backend
    known = sorted(path.parent for path in place.glob("*/gemm_perf.parquet"))
    for folder in reversed(known):
        if folder.name == version or folder.name.startswith(f"{version}.") or not version:
            return folder
    told = ", ".join(f"{backend} {folder.name}" for folder in known) or "none"
    raise BadConfig(f"{PACKAGE} has no {engine} tables of {card.name}; it has: {told}")


@functools.cache
def _rows(path: Path, **wanted: str | int) -> tuple[Row, ...]:
    if not path.is_file():
        raise BadConfig(f"{PACKAGE} measured no {path.stem} there: {path} is missing")
    try:
        import pyarrow.compute as pc  # type: ignore[import-untyped, import-not-found, unused-ignore]
        import pyarrow.parquet as pq  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise missing_extra("pyarrow", "lab") from None
    keep = None
    for column, value in wanted.items():
        is_right = pc.field(column) == value
        keep = is_right if keep is None else keep & is_right
    rows: list[Row] = pq.read_table(path, filters=keep).to_pylist()
    return tuple(rows)


def _points(rows: Iterable[Row], *columns: str) -> dict[Point, float]:
    """Seconds by sizes; the fastest of several kernels."""
    found: dict[Point, float] = {}
    for row in rows:
        sizes = tuple(int(str(row[column])) for column in columns)
        seconds = float(str(row["latency"])) * MILLI
        found[sizes] = min(seconds, found.get(sizes, seconds))
    return found


def _layer(folder: Path, shape: ModelShape, card: Card, tp: int) -> dict[str, Line]:
    """Lines over tokens of what a layer does besides attention."""
    hidden, width = shape.hidden, shape.head_dim
    heads = (shape.heads + 2 * shape.kv_heads) * width // tp
    found = {
        "qkv_proj": _gemm(folder, heads, hidden),
        "o_proj": _gemm(folder, hidden, shape.heads * width // tp),
    }
    ffn = shape.ffn
    if shape.experts is None:
        found["gate_up_proj"] = _gemm(folder, 2 * ffn // tp, hidden)
        found["down_proj"] = _gemm(folder, hidden, ffn // tp)
    else:
        ffn = (shape.top_k or 0) * (shape.expert_ffn or 0)
        found["router"] = _gemm(folder, shape.experts, hidden)
        found["experts"] = _experts(folder, shape, tp)
    each = (8 * hidden + 3 * ffn / tp) * shape.weight_item_bytes
    per_row = each / (card.bandwidth * SMALL_BANDWIDTH)
    floor = SMALL_KERNELS * SMALL_FLOOR_S
    found["small kernels"] = Line({rows: floor + rows * per_row for rows in SMALL_ROWS})
    return found


def _gemm(folder: Path, n: int, k: int) -> Line:
    return Line({m: max(0.0, grid(n, k)) for m, grid in _gemms(folder).items()})


@functools.cache
def _gemms(folder: Path) -> dict[int, Grid]:
    """A grid over (n, k) for each measured m."""
    rows = _rows(folder / "gemm_perf.parquet", gemm_dtype="bfloat16")
    by_m: dict[int, dict[Point, float]] = {}
    for (m, n, k), seconds in _points(rows, "m", "n", "k").items():
        by_m.setdefault(m, {})[n, k] = seconds
    return {m: Grid(full_axes(list(values)), values) for m, values in by_m.items()}


def _experts(folder: Path, shape: ModelShape, tp: int) -> Line:
    rows = _rows(
        folder / "moe_perf.parquet",
        moe_dtype="bfloat16",
        hidden_size=shape.hidden,
        inter_size=shape.expert_ffn or 0,
        topk=shape.top_k or 0,
        num_experts=shape.experts or 0,
        moe_tp_size=tp,
        moe_ep_size=1,
        distribution=ROUTING,
    )
    if not rows:
        raise BadConfig(f"{PACKAGE} has not measured the experts of {shape.name} at {tp} cards")
    return Line({tokens: seconds for (tokens,), seconds in _points(rows, "num_tokens").items()})


def _attention(folder: Path, shape: ModelShape, tp: int) -> SplitAttention:
    wanted = {
        "num_heads": shape.heads // tp,
        "num_key_value_heads": max(1, shape.kv_heads // tp),
        "head_dim": shape.head_dim,
        "kv_cache_dtype": "bfloat16",
    }
    decodes = _rows(folder / "generation_attention_perf.parquet", **wanted)
    prefills = _rows(folder / "context_attention_perf.parquet", **wanted)
    if not decodes or not prefills:
        raise BadConfig(f"{PACKAGE} has not measured attention of {shape.name} at {tp} cards")
    lines: dict[int, dict[int, float]] = {}
    for (batch, step), seconds in _points(decodes, "batch_size", "step").items():
        lines.setdefault(batch, {})[step + 1] = seconds
    return SplitAttention(lines, _points(prefills, "batch_size", "isl"))
