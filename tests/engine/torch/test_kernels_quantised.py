"""Products of bytes against float64 arithmetic on the same codes, on every instruction set and on VNNI emulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.engine.torch import kernels
from penstock.engine.torch.kernels import build, library
from penstock.engine.torch.kernels.quantised import PackedQuantised
from penstock.engine.torch.linear import CompiledQuantised, ExpandedQuantised, PlainLinear
from penstock.engine.torch.quantised import Bits, Quantised, quantise
from tests.engine.torch.test_kernels import ISAS, emulated

__all__ = ["emulated"]
pytestmark = pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_not()))
EXACT = 2e-6  # of the largest output: what sums over groups in float32 lose
WIDTHS: tuple[Bits, ...] = (8, 4)
# (outputs, inputs, group): ends of panels and of chunks, groups that are split, one group of odd length
SHAPES = (
    (37, 96, 32),
    (64, 256, 128),
    (16, 1024, 1024),
    (50, 40, 40),
    (33, 192, 96),
    (7, 512, 256),
)


@pytest.fixture(params=ISAS)
def method(request: pytest.FixtureRequest) -> PackedQuantised:
    isa = request.param
    made = request.getfixturevalue("emulated") if isa == build.EMULATED_BF16.name else None
    return PackedQuantised(isa=isa, library=made)


def drawn(bits: Bits, shape: tuple[int, int, int], *, has_zeros: bool, seed: int = 0) -> Quantised:
    """Any codes at all, scales as float16 has them, the order shuffled."""
    num_out, num_in, group = shape
    some = torch.Generator().manual_seed(seed)
    size = (num_out, num_in // group)
    return Quantised(
        bits=bits,
        codes=torch.randint(2**bits, (num_out, num_in), dtype=torch.uint8, generator=some),
        scales=(torch.rand(size, generator=some) * 0.1 - 0.03).half().float(),
        group=group,
        zeros=torch.randint(2**bits, size, dtype=torch.uint8, generator=some)
        if has_zeros
        else None,
        order=torch.randperm(num_in, generator=some),
    )


def rows_of_bytes(weight: Quantised, count: int) -> Tensor:
    """Rows that bytes hold exactly: each group of 32 has its 127."""
    num_in = weight.shape[1]
    x = torch.randint(-127, 128, (count, num_in)).float()
    inverse = torch.arange(num_in) if weight.order is None else weight.order
    x[:, inverse[::32]] = -127
    return x / 32


def product(x: Tensor, weight: Quantised, bias: Tensor | None) -> Tensor:
    wide = x.double() @ weight.expand().double().T
    return wide if bias is None else wide + bias.double()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_same_codes_in_float64(
    method: PackedQuantised, bits: Bits, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(1)
    for has_zeros in (False, True):
        weight, bias = drawn(bits, shape, has_zeros=has_zeros), torch.randn(shape[0])
        layer = method.pack_quantised(weight, bias)
        for count in (1, 2, 3, 4, 5, 9, 70):
            x = rows_of_bytes(weight, count)
            wanted = product(x, weight, bias)
            assert (layer(x).double() - wanted).abs().max() <= EXACT * wanted.abs().max()
            rounded = layer(x.bfloat16())
            assert rounded.dtype == torch.bfloat16
            wanted = product(x.bfloat16(), weight, bias.bfloat16())
            torch.testing.assert_close(rounded.double(), wanted, rtol=2.0**-7, atol=0.2)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    num_out=st.integers(1, 80),
    groups=st.integers(1, 6),
    group=st.sampled_from((32, 64, 96, 128, 256)),
    rows=st.integers(1, 12),
    seed=st.integers(0, 2**20),
)
def test_any_shape(bits: Bits, num_out: int, groups: int, group: int, rows: int, seed: int) -> None:
    weight = drawn(bits, (num_out, groups * group, group), has_zeros=seed % 2 == 0, seed=seed)
    x = rows_of_bytes(weight, rows)
    wanted = product(x, weight, None)
    got = PackedQuantised().pack_quantised(weight, None)(x).double()
    assert (got - wanted).abs().max() <= EXACT * wanted.abs().max().clamp_min(1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_worst_sums_fit(method: PackedQuantised, bits: Bits) -> None:
    """All codes and all bytes at their ends, where 16 bits would overflow first."""
    for code in (0, 2**bits - 1):
        weight = Quantised(
            bits=bits,
            codes=torch.full((16, 128), code, dtype=torch.uint8),
            scales=torch.ones(16, 1),
            group=128,
        )
        x = torch.full((5, 128), 127.0)
        x[1::2] = -127
        wanted = product(x, weight, None)
        torch.testing.assert_close(
            method.pack_quantised(weight, None)(x).double(), wanted, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_row_alone_and_among_others_is_the_same(
    method: PackedQuantised, bits: Bits, dtype: torch.dtype
) -> None:
    # more inputs than many rows pass at once, whatever the instruction set
    layer = method.pack_quantised(quantise(torch.randn(150, 1344), bits, 32), torch.randn(150))
    x = torch.randn(67, 1344).to(dtype)
    whole = layer(x)
    for begin in (0, 1, 5, 63, 66):
        for count in (1, 2, 3, 4, 6):
            part = slice(begin, begin + count)
            assert layer(x[part]).equal(whole[part])
    assert layer(x.repeat(1, 2)[:, :1344]).equal(whole), "rows inside wider rows"


@pytest.mark.parametrize("bits", WIDTHS)
def test_threads_change_nothing(bits: Bits) -> None:
    layer = PackedQuantised().pack_quantised(quantise(torch.randn(700, 256), bits, 128), None)
    x, before = torch.randn(130, 256), torch.get_num_threads()
    alone = layer(x)
    torch.set_num_threads(2)
    try:
        assert layer(x).equal(alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("bits", "group", "error"), ((8, 128, 0.01), (4, 32, 0.11)))
def test_close_to_the_weights_it_was_made_of(bits: Bits, group: int, error: float) -> None:
    """Of normal numbers: what rounding by half a step leaves, rows' bytes included."""
    weight, x = torch.randn(512, 1024), torch.randn(16, 1024)
    layer = PackedQuantised().pack_quantised(quantise(weight, bits, group), None)
    exact = x @ weight.T
    assert (layer(x) - exact).norm() < error * exact.norm()


def test_four_bits_lose_less_than_the_plain_rule() -> None:
    weight = torch.randn(64, 256)
    weight[3], weight[4, :32] = 0, 0
    found = quantise(weight, 4, 32).expand()
    grouped = weight.view(64, 8, 32)
    plain_scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7
    plain = ((grouped / plain_scale).round() * plain_scale).view(64, 256)
    assert (found - weight).square().sum() < 0.8 * (plain - weight).square().sum()
    assert (found[3] == 0).all() and (found[4, :32] == 0).all()


def test_what_is_no_number_stays_none(method: PackedQuantised) -> None:
    layer = method.pack_quantised(quantise(torch.randn(20, 64), 8, 32), None)
    x = torch.randn(4, 64)
    x[1, 3], x[2, 40], x[3] = float("nan"), float("inf"), 0
    out = layer(x)
    assert out[0].isfinite().all() and (out[3] == 0).all()
    assert out[1].isnan().all() and out[2].isnan().all()


def test_tiny_and_huge_scales_keep_their_digits(method: PackedQuantised) -> None:
    for size in (1e-9, 1e6):
        weight = quantise(torch.randn(32, 64) * size, 8, 64)
        x = rows_of_bytes(weight, 3)
        wanted = product(x, weight, None)
        got = method.pack_quantised(weight, None)(x).double()
        assert (got - wanted).abs().max() < 2.0**-10 * wanted.abs().max()


def test_what_does_not_fit_is_expanded() -> None:
    weight = quantise(torch.randn(24, 48), 8, 24)
    assert "multiples of 32" in str(PackedQuantised.why_not_for(weight))
    other = ExpandedQuantised(PlainLinear(), torch.float32)
    x = torch.randn(3, 48)
    layer = CompiledQuantised(PackedQuantised(), other).pack_quantised(weight, None)
    torch.testing.assert_close(layer(x), x @ weight.expand().T)
    assert library.load().quantised is not None
