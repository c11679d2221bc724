"""Packages in the layouts of AIConfigurator's two, whose every entry follows a law that tests can price by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

Row = dict[str, object]
SIZES = (1024, 4096, 8192, 16384)
FAMILIES = {"gemm_perf": "gemm", "moe_perf": "moe", "custom_allreduce_perf": "comm"}


def gemm_ms(m: float, n: float, k: float) -> float:
    return 0.004 + 1e-9 * n * k + 1e-11 * m * n * k


def decode_ms(batch: float, context: float) -> float:
    return 0.01 + 1e-6 * batch * context


def prefill_ms(batch: float, length: float) -> float:
    return 0.02 + 1e-5 * batch * length


def experts_ms(tokens: float) -> float:
    return 0.05 + 1e-4 * tokens


def sum_ms(numbers: float) -> float:
    return 0.005 + 2e-8 * numbers


class Package:
    """Holds tables of one system; importing it fails."""

    def __init__(self, place: Path, module: str, system: str = "h100_sxm") -> None:
        self.has_families = module == "aiconfigurator_core"
        self.name = module.replace("_", "-")
        self.system = place / module / "systems" / "data" / system
        self.system.mkdir(parents=True, exist_ok=True)
        init = place / module / "__init__.py"
        init.write_text("raise RuntimeError('data only, never imported')\n")
        told = place / f"{module}-9.8.7.dist-info"
        told.mkdir(exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: {self.name}\nVersion: 9.8.7\n"
        (told / "METADATA").write_text(text)

    def write(self, file: str, rows: Sequence[Row], version: str) -> None:
        family = FAMILIES.get(file, "attention")
        root = self.system / family if self.has_families else self.system
        _write(root / "vllm" / version / f"{file}.parquet", rows)

    def write_nccl(self, rows: Sequence[Row], version: str) -> None:
        root = self.system / "comm" if self.has_families else self.system
        _write(root / "nccl" / version / "nccl_perf.parquet", rows)


def _write(path: Path, rows: Sequence[Row]) -> None:
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    pyarrow: Any = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def write_dense(package: Package, version: str, heads: tuple[int, int] = (32, 8)) -> None:
    """What a dense model needs. Rows of a slower kernel, of other number formats and of windows are among them."""
    write = functools.partial(package.write, version=version)
    write("gemm_perf", [
        {"gemm_dtype": kind, "m": m, "n": n, "k": k, "latency": factor * gemm_ms(m, n, k)}
        for kind, factor in (("bfloat16", 1), ("bfloat16", 9), ("fp8", 0.5))
        for m, n, k in product((1, 128, 2048), SIZES, SIZES) if (n, k) != (16384, 16384)
    ])  # fmt: skip
    kinds: list[tuple[Row, float]] = [
        ({"kv_cache_dtype": "bfloat16"}, 1),
        ({"kv_cache_dtype": "fp8"}, 0.5),
    ]
    if package.has_families:
        kinds = [({**kind, "window_size": 0}, factor) for kind, factor in kinds]
        kinds.append(({"kv_cache_dtype": "bfloat16", "window_size": 128}, 0.1))
    head = {"num_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 128}
    write("generation_attention_perf", [
        {**head, **kind, "batch_size": batch, "step": step, "latency": factor * decode_ms(batch, step + 1)}
        for kind, factor in kinds for batch in (1, 16, 64) for step in (0, 127, 8191)
    ])  # fmt: skip
    write("context_attention_perf", [
        {**head, **kind, "batch_size": batch, "isl": length, "latency": factor * prefill_ms(batch, length)}
        for kind, factor in kinds for batch in (1, 4, 16, 64) for length in (16, 512, 4096)
    ])  # fmt: skip


def write_experts(package: Package, version: str) -> None:
    """Those of Qwen3-30B-A3B on one card; other splits and routings are among them."""
    package.write("moe_perf", [
        {"moe_dtype": "bfloat16", "hidden_size": 2048, "inter_size": 768, "topk": 8, "num_experts": 128,
         "moe_tp_size": tp, "moe_ep_size": ep, "distribution": routing, "num_tokens": tokens,
         "latency": factor * experts_ms(tokens)}
        for tp, ep, routing, factor in (
            (1, 1, "power_law_1.01", 1), (1, 1, "balanced", 0.1),
            (2, 1, "power_law_1.01", 0.1), (1, 2, "power_law_1.01", 0.1),
        )
        for tokens in (1, 64, 1024)
    ], version)  # fmt: skip


def write_sums(package: Package, version: str) -> None:
    """Of the engine between 2 cards, captured and not; of NCCL between 4, in two versions."""
    package.write("custom_allreduce_perf", [
        {"allreduce_dtype": "bfloat16", "num_gpus": 2, "message_size": size, "backend": kind,
         "latency": factor * sum_ms(size)}
        for kind, factor in (("vllm_graph", 1), ("vllm_eager", 4)) for size in (128, 1 << 20, 1 << 28)
    ], version)  # fmt: skip
    for nccl, factor in (("2.9.1", 3), ("2.29.2", 2)):
        package.write_nccl([
            {"nccl_dtype": kind, "op_name": name, "num_gpus": 4, "message_size": size,
             "latency": factor * sum_ms(size) * (1 if (kind, name) == ("half", "all_reduce") else 0.1)}
            for kind in ("half", "int8") for name in ("all_reduce", "all_gather")
            for size in (256, 1 << 20, 1 << 28)
        ], nccl)  # fmt: skip
