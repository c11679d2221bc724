"""Products of 16-bit whole numbers against float64 arithmetic, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.engine.torch import kernels
from penstock.engine.torch.kernels import build
from penstock.engine.torch.kernels.linear import PackedLinear
from penstock.engine.torch.kernels.shorts import (
    GROUPS,
    PackedShorts,
    ShortsLinear,
    wins_on_this_machine,
)
from penstock.engine.torch.linear import CompiledLinear, PlainLinear, QuantisingLinear, for_router
from penstock.engine.torch.ports import Linear, ShardSpec
from tests.engine.torch.test_kernels import ISAS, emulated

__all__ = ["emulated"]
pytestmark = pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_not()))
BF16 = torch.bfloat16
# (outputs, inputs): ends of panels and tiles, every size of a group, more inputs than a tile's depth
SHAPES = ((37, 96), (64, 256), (16, 1024), (7, 16), (33, 208), (130, 1152))


@pytest.fixture(params=ISAS)
def method(request: pytest.FixtureRequest) -> ShortsLinear:
    isa = request.param
    made = request.getfixturevalue("emulated") if isa == build.EMULATED_BF16.name else None
    return ShortsLinear(isa=isa, library=made)


def packed(method: ShortsLinear, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return method.pack(weight, bias, ShardSpec())


def lengths(x: Tensor) -> Tensor:
    """[rows, groups], of the groups that a layer of so many inputs has."""
    group = next(size for size in GROUPS if x.shape[1] % size == 0)
    return x.double().unflatten(1, (-1, group)).norm(dim=-1)


def bound(x: Tensor, weight: Tensor) -> Tensor:
    """What rounding surely stays below: half a step a number, a step being at most a length's 2,000th part."""
    group = next(size for size in GROUPS if x.shape[1] % size == 0)
    return lengths(x) @ lengths(weight).T * (2.05 * group**0.5 / 4000) + 1e-30


@pytest.mark.parametrize("shape", SHAPES)
def test_close_to_float64(method: ShortsLinear, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(shape).to(BF16), torch.randn(shape[0]).to(BF16)
    layer = packed(method, weight, bias)
    for count in (1, 2, 3, 5, 6, 7, 13, 125):
        x = torch.randn(count, shape[1]).to(BF16)
        wanted = x.double() @ weight.double().T + bias.double()
        size = (wanted - bias.double()).norm()
        assert (layer(x.float()).double() - wanted).norm() < 2.0**-14 * size
        rounded = layer(x)
        assert rounded.dtype == BF16
        torch.testing.assert_close(
            rounded.double(), wanted, rtol=2.0**-8, atol=2.0**-11 * shape[1] ** 0.5
        )


def test_numbers_of_seven_digits_are_multiplied_exactly(method: ShortsLinear) -> None:
    weight = torch.randint(-127, 128, (48, 256)).to(BF16)
    x = torch.randint(-127, 128, (9, 256)).float()
    layer = packed(method, weight / 1024)
    assert layer(x).double().equal(x.double() @ weight.double().T / 1024)


@settings(max_examples=60, deadline=None)
@given(
    num_out=st.integers(1, 90),
    num_in=st.integers(1, 40),
    rows=st.integers(1, 14),
    spread=st.floats(0, 12),
    size=st.sampled_from((1e-25, 1e-12, 1.0, 1e12, 1e16)),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_spread_of_numbers(
    num_out: int, num_in: int, rows: int, spread: float, size: float, seed: int
) -> None:
    """Numbers whose sizes differ by up to 2^(5 spread): whatever stands out in a group, the bound holds."""
    some = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Tensor:
        shape = (count, 16 * num_in)
        sizes = torch.exp2(spread * torch.randn(shape, generator=some).clamp(-3, 3))
        return torch.randn(shape, generator=some) * sizes

    x, weight = (drawn(rows) * size).to(BF16), drawn(num_out).to(BF16)
    wanted = x.double() @ weight.double().T
    got = packed(ShortsLinear(), weight)(x.float()).double()
    assert ((got - wanted).abs() <= bound(x, weight) + 1e-6 * wanted.abs()).all()


def test_the_greatest_sums_fit(method: ShortsLinear) -> None:
    """Rows that are multiples of a weight's rows: the sum is the product of the lengths, as great as can be."""
    torch.manual_seed(2)
    kinds = [torch.ones(256), torch.randn(256), torch.zeros(256), torch.arange(256.0) - 128]
    kinds[2][[0, 200]] = torch.tensor([1.0, -3.0])
    kinds += [torch.ones(256) * (-1.0) ** torch.arange(256), torch.full((256,), 255.0)]
    weight = torch.stack(kinds).to(BF16)
    x = torch.cat([weight * factor for factor in (1, -1, 3e7, 1e-9)])
    wanted = x.double() @ weight.double().T
    got = packed(method, weight)(x.float()).double()
    assert ((got - wanted).abs() <= bound(x, weight)).all()


def test_a_row_alone_and_among_others_is_the_same(method: ShortsLinear) -> None:
    layer = packed(method, torch.randn(150, 1280).to(BF16), torch.randn(150))
    x = torch.randn(250, 1280).to(BF16)
    whole = layer(x)
    for begin in (0, 1, 5, 119, 249):
        for count in (1, 2, 3, 4, 5, 6, 8, 30):
            part = slice(begin, begin + count)
            assert layer(x[part]).equal(whole[part])
    assert layer(x.repeat(1, 2)[:, :1280]).equal(whole), "rows inside wider rows"


def test_threads_change_nothing() -> None:
    layer = packed(ShortsLinear(), torch.randn(700, 256).to(BF16))
    x, before = torch.randn(130, 256).to(BF16), torch.get_num_threads()
    alone = layer(x)
    torch.set_num_threads(2)
    try:
        assert layer(x).equal(alone)
        assert packed(ShortsLinear(), torch.ones(700, 256).to(BF16))(x[:1]).shape == (1, 700)
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_none(method: ShortsLinear) -> None:
    layer = packed(method, torch.randn(20, 256).to(BF16))
    x = torch.randn(4, 256)
    x[1, 3], x[2, 40], x[3] = float("nan"), float("-inf"), 0
    for out in (layer(x), layer(x.to(BF16))):
        assert out[0].isfinite().all() and (out[3] == 0).all()
        assert out[1].isnan().all() and out[2].isnan().all()


def test_it_is_what_bf16_layers_are_packed_with_here_but_routers() -> None:
    method = CompiledLinear("packed", PlainLinear())
    weight = torch.randn(32, 64).to(BF16)
    kind = type(method.pack(weight, None, ShardSpec()))
    assert (kind is PackedShorts) == wins_on_this_machine()
    exact = type(PackedLinear().pack(weight, None, ShardSpec()))
    quantising = QuantisingLinear.__new__(QuantisingLinear)
    quantising.exact = method
    for one in (method, quantising):
        router = for_router(one)
        assert type(router.pack(weight, None, ShardSpec())) is exact
        assert for_router(router) is router
    assert "multiple of 16" in str(ShortsLinear.why_not_for(weight[:, :40]))
    assert "bfloat16" in str(ShortsLinear.why_not_for(weight.float()))
