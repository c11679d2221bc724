"""Attention over split keys equals attention over all of them (torch's own, in fp64)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.engine.torch.attention import GatherAttention, KvLayout
from penstock.engine.torch.kernels import CpuPagedAttention
from penstock.engine.torch.kernels.combine import combine
from penstock.engine.torch.ports import AttentionBackend, Mask, StepMeta

D, SIZE = 32, 16
SCHEMES = {"mha": (4, 4), "gqa": (8, 2), "mqa": (4, 1)}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [T, H, D], k and v [S, K, D], all keys seen."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(
        0, 1
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ways", [1, 2, 3, 8])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_any_split_gives_the_whole(
    scheme: str, ways: int, dtype: torch.dtype, bound: float
) -> None:
    heads, kv_heads = SCHEMES[scheme]
    chance = torch.Generator().manual_seed(ways)
    q = torch.randn(3, heads, D, generator=chance).to(dtype)
    k, v = torch.randn(2, 411, kv_heads, D, generator=chance).to(dtype)
    parts = []
    for keys, values in zip(k.chunk(ways), v.chunk(ways), strict=True):
        grouped = keys.float().repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("thd,shd->ths", q.float(), grouped) / D**0.5
        parts.append((exact(q, keys, values).to(dtype), scores.logsumexp(-1)))
    out, lse = combine(parts)
    assert out.dtype == dtype
    assert (out.double() - exact(q, k, v)).abs().max() <= bound
    grouped = k.float().repeat_interleave(heads // kv_heads, 1)
    whole = torch.einsum("thd,shd->ths", q.float(), grouped) / D**0.5
    assert torch.allclose(lse, whole.logsumexp(-1), atol=1e-4)


def test_who_has_no_keys_adds_nothing() -> None:
    out, lse = torch.randn(2, 4, D), torch.randn(2, 4)
    nothing = torch.zeros(2, 4, D), torch.full((2, 4), -torch.inf)
    found, total = combine([(out, lse), nothing])
    assert torch.equal(found, out) and torch.equal(total, lse)
    found, total = combine([nothing, nothing])
    assert not found.any() and torch.isinf(total).all()


def backend(kind: str, heads: int, stored: torch.dtype | None) -> AttentionBackend:
    told = {"num_layers": 1, "num_blocks": 40, "block_size": SIZE, "num_kv_heads": heads}
    if kind == "gather":
        layout = KvLayout(
            **told, head_dim=D, dtype=torch.float32, device=torch.device("cpu"), stored=stored
        )  # type: ignore[arg-type]
        return GatherAttention(layout)
    return CpuPagedAttention(**told, head_dim=D, dtype=torch.float32, stored=stored)  # type: ignore[arg-type]


def meta_of(count: int, context: int, blocks: list[int], slots: Tensor) -> StepMeta:
    return StepMeta(
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
        torch.tensor([blocks], dtype=torch.int32),
        slots,
        count,
        context,
    )


@pytest.mark.parametrize("kind", ["gather", "kernels"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("count", [1, 24])
def test_blocks_of_a_backend_split_in_two(
    kind: str, scheme: str, stored: torch.dtype | None, count: int
) -> None:
    """A chunk behind 160 positions, of which `away` are attended over apart, as DistAttention does."""
    if kind == "kernels" and not CpuPagedAttention.available_for(D, SIZE, torch.float32):
        pytest.skip("no compiled kernels here")
    heads, kv_heads = SCHEMES[scheme]
    before, away = 160, 96
    chance = torch.Generator().manual_seed(count)
    tokens = before + count
    q = torch.randn(tokens, heads, D, generator=chance)
    k, v = torch.randn(2, tokens, kv_heads, D, generator=chance)
    attention = backend(kind, kv_heads, stored)
    attention.want_lse(True)
    blocks, scale, causal = list(range(-(-tokens // SIZE))), D**-0.5, Mask()
    slots = torch.arange(tokens)
    attention(0, q, k, v, meta_of(tokens, tokens, blocks, slots), causal, scale)
    rows = slice(before, tokens)
    told = (q[rows], k[rows], v[rows])
    whole, _ = attention(0, *told, meta_of(count, tokens, blocks, slots[rows]), causal, scale)
    ours = meta_of(count, tokens - away, blocks[away // SIZE :], slots[rows])
    trash = torch.full((count,), 39 * SIZE)
    theirs = meta_of(count, away, blocks[: away // SIZE], trash)
    near, far = (
        attention(0, *told, ours, causal, scale),
        attention(0, *told, theirs, Mask(kind="full"), scale),
    )
    assert near[1] is not None and far[1] is not None
    out, _ = combine([(near[0], near[1]), (far[0], far[1])])
    assert (out - whole).abs().max() <= 1e-5
