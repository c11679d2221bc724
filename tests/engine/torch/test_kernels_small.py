"""The small operations, in every instruction set of this machine, against transformers and plain torch, whose rounding
they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch import kernels
from penstock.engine.torch.kernels import library

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=kernels.isas() or ["none"])
def best(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instruction set that is taken."""
    if request.param != "none":
        loaded = library.load()
        monkeypatch.setattr(loaded, "tables", {request.param: loaded.tables[request.param]})


def assert_rounded_alike(got: Tensor, wanted: Tensor) -> None:
    """float32: equal to rounding. bfloat16: the same bits, but for a few values that lay on the edge."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if got.dtype == FP32:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        return
    assert (got == wanted).float().mean() > 0.999
    torch.testing.assert_close(got, wanted, rtol=2.0**-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("rows", (1, 7, 300))
def test_norms_agree_with_llama(dtype: torch.dtype, rows: int) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, residual = (torch.randn(rows, 208).mul(3).to(dtype) for _ in range(2))
    norm = llama.LlamaRMSNorm(208, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    weight = norm.weight.detach()
    with torch.no_grad():
        assert_rounded_alike(kernels.rms_norm(x, weight, 1e-5), norm(x))
        assert_rounded_alike(kernels.rms_norm(x[None], weight, 1e-5), norm(x[None]))
        out, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
        assert total.equal(x + residual)
        assert_rounded_alike(out, norm(x + residual))


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_norms_agree_with_gemma(dtype: torch.dtype) -> None:
    """Weights of one plus something, in fp32: multiplied in before the result is rounded."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    x, residual = (torch.randn(9, 208).mul(3).to(dtype) for _ in range(2))
    norm = gemma.Gemma2RMSNorm(208, eps=1e-5)
    norm.weight.data.normal_()
    weight = norm.weight.detach() + 1
    with torch.no_grad():
        assert_rounded_alike(kernels.rms_norm(x, weight, 1e-5), norm(x))
        out, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
        assert total.equal(x + residual)
        assert_rounded_alike(out, norm(total))
        head, other = (part.view(9, 2, 104)[..., :96].contiguous() for part in (x, x.clone()))
        still = torch.cat((torch.ones(1, 48), torch.zeros(1, 48)), 1)  # turned by nothing
        positions = torch.zeros(9, dtype=torch.int64)
        norm.weight.data = norm.weight.data[:96]
        wanted = norm(head)
        kernels.qk_norm_rope_(head, other, (weight[:96], weight[:96], 1e-5), still, positions)
        assert_rounded_alike(head, wanted)
        assert_rounded_alike(other, wanted)


def rotation(num_positions: int, rotary_dim: int) -> Tensor:
    angle = torch.outer(
        torch.arange(num_positions), 1e4 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    )
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("tokens", (1, 65))
def test_rotation_agrees_with_llama(dtype: torch.dtype, tokens: int) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    qkv = torch.randn(tokens, 10, 64).to(dtype)
    q, k, v = qkv.split((6, 2, 2), dim=1)
    positions, cos_sin = torch.randint(500, (tokens,)), rotation(500, 64)
    cos, sin = (x.repeat(1, 2).to(dtype)[None] for x in cos_sin[positions].chunk(2, dim=-1))
    wanted = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    untouched = v.clone()
    kernels.rope_(q, k, cos_sin, positions)
    for got, want in zip((q, k), wanted, strict=True):
        assert_rounded_alike(got, want[0].transpose(0, 1))
    assert v.equal(untouched)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("rotary_dim", (64, 32, 24))
def test_head_norms_and_partial_rotation(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rotary_dim: int
) -> None:
    q, k = (torch.randn(9, n, 64).to(dtype) for n in (4, 2))
    norm = (torch.randn(64).to(dtype), torch.randn(64).to(dtype), 1e-6)
    positions, cos_sin = torch.randint(100, (9,)), rotation(100, rotary_dim)
    fast = [q.clone(), k.clone()]
    kernels.qk_norm_rope_(*fast, norm, cos_sin, positions)
    monkeypatch.setattr(library, "available", lambda: False)
    plain = [q.clone(), k.clone()]
    kernels.qk_norm_rope_(*plain, norm, cos_sin, positions)
    for got, want in zip(fast, plain, strict=True):
        assert_rounded_alike(got, want)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("shape", ((1, 64), (3, 5, 96), (700, 128), (4, 40)))
def test_gated_activation(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).mul(4).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    assert_rounded_alike(kernels.silu_mul(x), F.silu(gate) * up)
    got, near = kernels.gelu_mul(x), F.gelu(gate, approximate="tanh") * up
    if gate.shape[-1] % 16:
        assert got.equal(near)
        return
    # 1 + tanh(z) = 2 sigmoid(2z): torch's own form loses the far tail to rounding, so it is held to loosely
    torch.testing.assert_close(got, near, rtol=2e-2 if dtype == BF16 else 1e-5, atol=1e-5)
    wide = gate.double()
    turned = torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))
    wanted = (wide * turned).to(dtype) * up
    seen = wanted.abs() > 1e-30  # the exponential stops at the smallest normal number
    assert (got[~seen].abs() < 1e-30).all()
    assert_rounded_alike(got[seen], wanted[seen])


def test_gradients_take_the_plain_way() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    kernels.silu_mul(kernels.rms_norm(x, torch.ones(32), 1e-6)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
