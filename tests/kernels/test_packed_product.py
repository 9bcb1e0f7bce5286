"""Packed products against float64: every kernel that this processor has, for few rows and many, and what is not a number."""

import pytest
import torch
from torch import Tensor

from genai_pl.kernels.int4 import GROUP, from_int4, to_int4
from genai_pl.kernels.int8 import from_int8, to_int8
from genai_pl.kernels.packed_product import Product, _is_exact, _split, fastest_product, products_of

# relative errors: activations keep 15 bits beside integers, 8 bits in bfloat16
ERRORS = {
    "int8 by FBGEMM": 3e-4,
    "int8 by torch": 1e-2,
    "bfloat16": 1e-2,
    "bfloat16 by oneDNN": 1e-2,
    "bfloat16 compiled": 1e-2,
    "int8 compiled": 1e-2,  # of more rows than FEW, by bfloat16 where that is faster
}
EXACT = [limb for limb in (127, 63) if _is_exact(limb)]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def usable(product: Product, weight: Tensor) -> bool:
    try:
        product.multiply(inputs(1, weight.shape[1]), product.pack(weight))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that the codes or bits of a dtype stand for, in float64."""
    if dtype is torch.int4:
        return from_int4(to_int4(weight), weight.shape[1]).double()
    if dtype is torch.int8:
        codes, scales = to_int8(weight)
        return codes.double() * scales.double()[:, None]
    return weight.to(dtype).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.int4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 40)])
def test_every_product_equals_float64_up_to_its_rounding(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = 0.05 * inputs(70, 48)
    weight = weight if dtype in (torch.int8, torch.int4) else weight.to(dtype)
    x = inputs(*shape, 48) * torch.logspace(-4, 4, shape[1])[:, None]  # rows of very unequal size
    expected = x.double() @ rounded(weight, dtype).t()
    products = [product for product in products_of(dtype) if usable(product, weight)]
    assert products
    for product in products:
        y = product.multiply(x, product.pack(weight))
        assert y.dtype == torch.float32
        error = ((y - expected).abs().amax(-1) / expected.abs().amax(-1)).max()
        assert error < ERRORS.get(product.name, 1e-5), product.name


@pytest.mark.skipif(not EXACT, reason="this torch has no FBGEMM")
def test_products_in_integers_are_exact_where_activations_are_integers() -> None:
    limb = EXACT[0]
    weight = torch.randint(-127, 128, (33, 64), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 0] = 127.0  # every scale is 1
    x = torch.randint(-limb, limb + 1, (4, 64), generator=torch.Generator().manual_seed(2)).float()
    x[:, 0] = limb
    product = _split(limb)
    torch.testing.assert_close(product.multiply(x, product.pack(weight)), x @ weight.t(), rtol=1e-6, atol=0)


@pytest.mark.skipif(not EXACT, reason="this torch has no FBGEMM")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_zeros_give_zeros_and_what_is_no_number_stays_in_its_row(bad: float) -> None:
    product = _split(EXACT[0])
    packed = product.pack(inputs(20, 16))
    x = inputs(3, 16)
    alone = product.multiply(x[2:], packed)
    x[0], x[1, 3] = 0.0, bad
    y = product.multiply(x, packed)
    assert torch.equal(y[0], torch.zeros(20))
    assert not y[1].isfinite().any()
    torch.testing.assert_close(y[2:], alone)


def test_int8_rounds_to_half_a_step_of_each_channel() -> None:
    weight = inputs(9, 30) * torch.logspace(-3, 3, 9)[:, None]
    codes, scales = to_int8(weight)
    error = (from_int8(codes, scales, weight.shape) - weight).abs()
    assert (error <= 0.5001 * scales[:, None]).all()
    torch.testing.assert_close(scales, weight.abs().amax(1) / 127)


@pytest.mark.parametrize("width", [1, 31, 32, 96])
def test_int4_keeps_what_its_codes_can_hold_and_errs_less_than_rounding_to_nearest(width: int) -> None:
    weight = inputs(9, width) * torch.logspace(-3, 3, 9)[:, None]
    found = from_int4(to_int4(weight), width)
    assert found.shape == weight.shape
    torch.testing.assert_close(from_int4(to_int4(found), width), found)  # values on a grid stay
    # the plain way in float64: 15 steps from the least to the largest weight of each group
    for group, of_group in zip(weight.double().split(GROUP, 1), found.double().split(GROUP, 1), strict=True):
        low, high = group.aminmax(dim=1, keepdim=True)
        step = (high - low).clamp_min(1e-30) / 15
        plain = low + ((group - low) / step).round() * step
        rounding = 2**-7 * group.abs().amax(1)  # of scale and minimum in bfloat16, for 32 weights
        assert ((of_group - group).norm(dim=1) <= (plain - group).norm(dim=1) + rounding).all()


@pytest.mark.parametrize("value", [0.0, 0.75])
def test_int4_of_equal_weights_is_exact(value: float) -> None:
    weight = torch.full((3, 40), value)
    assert torch.equal(from_int4(to_int4(weight), 40), weight)


def test_the_probe_takes_a_product_that_runs_and_gives_the_engine_back() -> None:
    before = torch.backends.quantized.engine
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.int4):
        product = fastest_product(products_of(dtype), [inputs(32, 24), inputs(24, 32)], rows=2)
        assert product.name in [candidate.name for candidate in products_of(dtype)]
        assert product.multiply(inputs(2, 24), product.pack(inputs(32, 24))).shape == (2, 32)
    assert torch.backends.quantized.engine == before


def test_a_weight_beyond_float16_takes_another_product() -> None:
    product = fastest_product(products_of(torch.bfloat16), [torch.full((8, 8), 1e6)], rows=1)
    assert product.name != "float16 by FBGEMM"
    y = product.multiply(torch.ones(1, 8), product.pack(torch.full((8, 8), 1e6).bfloat16()))
    torch.testing.assert_close(y, torch.full((1, 8), 8e6), rtol=1e-2, atol=0)
