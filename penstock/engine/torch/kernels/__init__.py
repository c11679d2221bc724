"""C++ kernels for CPUs: paged attention, packed linear layers, and the small operations between them.

Theory. Reading a paged cache with stock operations first gathers it, and decodes at a few percent of memory speed;
here the kernel walks the block table and reads each key and value once for all query heads that share it. The small
operations cost more in launches than in arithmetic, so each is one pass. On processors without bfloat16 instructions
stock bfloat16 products crawl; `PackedLinear` does not, and where there are some it keeps to them
(`linear.wins_on_this_machine(dtype)`).

Rules.
- Nothing is compiled when the package is installed or imported: the first use compiles (seconds, cached).
- Nobody needs a compiler: `available()` says whether the kernels can be used and `why_not()` why they cannot. The
  functions then compute the same with torch; for attention, take another backend.
- One source serves every instruction set; the best one that this processor has, and that passes a check against
  plain torch, is taken (`isas()[0]`).
"""

from penstock.engine.torch.kernels.attention import CpuPagedAttention
from penstock.engine.torch.kernels.draw import pick_tokens
from penstock.engine.torch.kernels.fused import (
    add_rms_norm,
    gelu_mul,
    qk_norm_rope_,
    rms_norm,
    rope_,
    silu_mul,
)
from penstock.engine.torch.kernels.library import available, build_with, isas, why_not
from penstock.engine.torch.kernels.linear import PackedLinear

__all__ = [
    "CpuPagedAttention",
    "PackedLinear",
    "add_rms_norm",
    "available",
    "build_with",
    "gelu_mul",
    "isas",
    "pick_tokens",
    "qk_norm_rope_",
    "rms_norm",
    "rope_",
    "silu_mul",
    "why_not",
]
