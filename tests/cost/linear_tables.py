"""A folder of operator tables whose every entry follows a linear law, so that any step has a price by hand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

CHUNKS = (16, 64, 256, 1024, 2048)
PREFIXES = (0, 64, 512, 4096, 16384)
NUMS = (1, 2, 8, 32, 128)
CONTEXTS = (16, 128, 1024, 4096, 16384)
TOKENS = (1, 8, 64, 512, 2048)
EXPERTS = (8, 16, 32, 64, 128)

DENSE = {  # microseconds: of a call, of a token in it
    "embedding": (3.0, 0.01),
    "final_layernorm": (2.0, 0.02),
    "layernorm": (2.5, 0.01),
    "qkv_proj": (30.0, 0.1),
    "rotary_emb": (2.0, 0.0),
    "o_proj": (20.0, 0.1),
    "gate_up_proj": (150.0, 0.5),
    "act_fn": (3.0, 0.01),
    "down_proj": (80.0, 0.3),
}
HEAD = {"lm_head": (700.0, 1.0), "sampler": (20.0, 0.5)}
ALPHA = 0.05


def decode_us(num: int, context: float) -> float:
    return 8.0 + 0.5 * num + 0.01 * context + 0.003 * num * context


def mixed_us(chunk: float, prefix: float, num: int, context: float) -> float:
    """Without decodes the context does not count."""
    return 5.0 + 0.1 * chunk + 0.004 * prefix + (0.5 * num + 0.004 * num * context if num else 0.0)


def write_tables(
    folder: Path, *, alpha: float | None = ALPHA, dense: Mapping[str, tuple[float, float]] = DENSE
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dense.csv").write_text(_sized("tokens", dense))
    (folder / "per_sequence.csv").write_text(_sized("sequences", HEAD))
    rows = ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"]
    for num, context in product(NUMS, CONTEXTS):
        rows.append(f"0,0,{num},{context},{decode_us(num, context)!r}")
    for chunk, prefix in product(CHUNKS, PREFIXES):
        rows.append(f"{chunk},{prefix},0,0,{mixed_us(chunk, prefix, 0, 0)!r}")
        for num, context in product(NUMS, CONTEXTS):
            rows.append(
                f"{chunk},{prefix},{num},{context},{mixed_us(chunk, prefix, num, context)!r}"
            )
    (folder / "attention.csv").write_text("\n".join(rows) + "\n")
    if alpha is not None:
        header = "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples\n"
        lines = [f"0,n<={n},sr<=5%,kvB<=1k,kp=0,{a},4\n" for n, a in ((8, alpha), (32, 0), (64, 1))]
        far = "512,n<=8,sr<=5%,kvB<=1k,kp=0,-3.7,4\n"  # beside a prefill: not used
        (folder / "skew_fit.csv").write_text(header + "".join(lines) + far)
    return folder


def write_experts(folder: Path) -> Path:
    """A mixture: experts in the place of the mlp, 50 us and 6 us an expert, 0.1 us a token."""
    write_tables(
        folder,
        dense={name: each for name, each in DENSE.items() if name not in ("gate_up_proj", "down_proj")},
    )  # fmt: skip
    rows = ["tokens,activated_experts,time_us"]
    for tokens, experts in product(TOKENS, EXPERTS):
        if experts <= 8 * tokens:
            rows.append(f"{tokens},{experts},{experts_us(tokens, experts)!r}")
    (folder / "moe.csv").write_text("\n".join(rows) + "\n")
    return folder


def experts_us(tokens: float, experts: float) -> float:
    return 50.0 + 6.0 * experts + 0.1 * tokens


def _sized(size: str, laws: Mapping[str, tuple[float, float]]) -> str:
    rows = [f"layer,{size},time_us"]
    for layer, (call, each) in laws.items():
        rows += [f"{layer},{at},{call + each * at!r}" for at in TOKENS]
    return "\n".join(rows) + "\n"
