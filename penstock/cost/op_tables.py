"""Reader of operator latency tables: a folder of CSV files, microseconds of one device.

    dense.csv         layer, tokens, time_us                                     a linear layer, norm or activation
    attention.csv     prefill_chunk, kv_prefill, n_decode, kv_decode, time_us    one layer's attention call
    per_sequence.csv  layer, sequences, time_us                                  LM head and sampler
    moe.csv           tokens, activated_experts, time_us                         one layer's experts (optional)
    skew_fit.csv      pc, n_label, skew_rate_label, kv_big_label, kp_label, alpha, n_samples      (optional)

The format is that of LLMServingSim 2's profiler. Weights are already sharded: a table speaks for one degree of tensor
parallelism, and holds no communication.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import BadConfig
from penstock.cost.attention_table import Attention, AttentionTable
from penstock.cost.grid import Grid, Line, Point, full_axes

EACH_LAYER = {  # calls in one layer; a row that a model does not have is absent
    "layernorm": 2,
    "qkv_proj": 1,
    "qk_norm": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
ONCE = ("embedding", "final_layernorm")
NEEDED = ("layernorm", "qkv_proj", "o_proj")
MICRO = 1e-6


@dataclass(frozen=True, slots=True)
class OpTables:
    """Seconds. `layer` and `once`: by tokens of a step; `head`: by sampling rows; `experts`: tokens x experts. `sums`:
    all-reduce by bytes, None = as the card catalogue says. `alpha`: see cost.table."""

    name: str
    digest: str
    layer: dict[str, Line]
    once: dict[str, Line]
    head: dict[str, Line]
    attention: Attention
    alpha: float = 0.0
    experts: Grid | None = None
    sums: Line | None = None

    @property
    def is_mixture(self) -> bool:
        return self.experts is not None or "experts" in self.layer


@functools.cache
def read_op_tables(folder: Path) -> OpTables:
    """Raises BadConfig that names the file and says what is wrong."""
    if not folder.is_dir():
        raise BadConfig(
            f"there is no folder of operator tables {folder}",
            hint="it holds dense.csv, attention.csv and per_sequence.csv",
        )
    dense = _lines(folder / "dense.csv", "tokens")
    missing = [name for name in NEEDED if name not in dense]
    if missing:
        raise BadConfig(f"{folder / 'dense.csv'} has no rows of {', '.join(missing)}")
    experts = _experts(folder / "moe.csv")
    if experts is None and "down_proj" not in dense:
        raise BadConfig(f"{folder} knows neither down_proj (dense.csv) nor experts (moe.csv)")
    return OpTables(
        name=folder.resolve().name,
        digest=_digest(folder),
        layer={name: dense[name] for name in EACH_LAYER if name in dense},
        once={name: dense[name] for name in ONCE if name in dense},
        head=_lines(folder / "per_sequence.csv", "sequences"),
        attention=_attention(folder / "attention.csv"),
        alpha=_alpha(folder / "skew_fit.csv"),
        experts=experts,
    )


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[list[str]]:
    """The named columns of each row; ValueErrors of whoever reads them get the file's name."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise BadConfig(f"{path} has no column {', '.join(missing)}")
            for row in reader:
                yield [row[name] or "" for name in columns]
    except FileNotFoundError:
        raise BadConfig(f"operator tables need {path}, which is not there") from None
    except UnicodeDecodeError:
        raise BadConfig(f"{path} is no text") from None


def _numbers(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[list[int], float]]:
    """(sizes, seconds) of each row; the last column is the time."""
    for row in _rows(path, columns):
        try:
            sizes, seconds = [int(value) for value in row[:-1]], float(row[-1]) * MICRO
        except ValueError:
            raise BadConfig(f"{path}: {','.join(row)} is not a row of numbers") from None
        if not (seconds >= 0 and min(sizes) >= 0):
            raise BadConfig(f"{path}: {','.join(row)} holds a negative or undefined number")
        yield sizes, seconds


def _lines(path: Path, size: str) -> dict[str, Line]:
    points: dict[str, dict[int, float]] = {}
    for layer, at, time_us in _rows(path, ("layer", size, "time_us")):
        try:
            points.setdefault(layer, {})[int(at)] = float(time_us) * MICRO
        except ValueError:
            raise BadConfig(f"{path}: {layer},{at},{time_us} is not a row of numbers") from None
    if not points:
        raise BadConfig(f"{path} is empty")
    return {layer: Line(each) for layer, each in points.items()}


def _attention(path: Path) -> AttentionTable:
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    calls = {(a, b, c, d): seconds for (a, b, c, d), seconds in _numbers(path, columns)}
    return AttentionTable(calls, str(path))


def _experts(path: Path) -> Grid | None:
    if not path.is_file():
        return None
    found: dict[Point, float] = {
        (tokens, experts): seconds
        for (tokens, experts), seconds in _numbers(path, ("tokens", "activated_experts", "time_us"))
    }
    if not found:
        raise BadConfig(f"{path} is empty")
    # Few tokens cannot reach many experts: those corners were not measured, and are what more tokens cost.
    tokens, experts = (sorted({point[axis] for point in found}) for axis in (0, 1))
    for count in experts:
        measured = [at for at in tokens if (at, count) in found]
        for at in tokens:
            found.setdefault((at, count), found[measured[0], count])
    return Grid(full_axes(list(found)), found)


def _alpha(path: Path) -> float:
    """The median fit over steps of decodes, kept within [0, 1]; 0 without fits."""
    if not path.is_file():
        return 0.0
    found = []
    for chunk, value in _rows(path, ("pc", "alpha")):
        try:
            if int(chunk) == 0:
                found.append(float(value))
        except ValueError:
            raise BadConfig(f"{path}: {chunk},{value} is not a row of numbers") from None
    return min(1.0, max(0.0, statistics.median(found))) if found else 0.0


def _digest(folder: Path) -> str:
    told = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.csv")):
        told.update(path.name.encode() + b"\0" + path.read_bytes())
    return told.hexdigest()
