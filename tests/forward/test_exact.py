"""The product that never holds the weight, against the reference's, bit for bit."""

import pytest
import torch

from nvfp4check.forward.exact import (
    FEW_ROWS,
    engine_operand,
    product_of_few,
    squares_of_few,
)
from nvfp4ref import e2m1, e4m3, matmul, nvfp4
from nvfp4ref.conventions import Convention


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same values; +0.0 and -0.0, whose products are the same, count as one."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def reference_operand(x: torch.Tensor, encode: torch.Tensor) -> torch.Tensor:
    codes, scales = nvfp4.quantize(
        x.float(), 1 / encode, Convention.ENGINE, global_encode_scale=encode
    )
    return matmul.operand(codes, scales)


@pytest.mark.parametrize("encode", [1.0, 2688.0, 3e-7, 5e8])
def test_activations_of_every_magnitude_have_the_bits_of_the_reference(encode: float) -> None:
    generator = torch.Generator().manual_seed(3)
    exponents = torch.linspace(-40, 30, 500).exp2().unsqueeze(1)
    x = torch.randn(500, 64, generator=generator) * exponents
    x[::2] = x[::2].bfloat16().float()

    scale = torch.tensor(encode)
    assert_same(engine_operand(x, scale), reference_operand(x, scale))


def test_every_tie_of_elements_and_of_scales_has_the_bits_of_the_reference() -> None:
    scales = torch.tensor(e4m3.MAGNITUDES[1:], dtype=torch.float32)
    midpoints = torch.tensor(e4m3.MIDPOINTS, dtype=torch.float32)
    tops = torch.cat((scales, midpoints)) * 6  # the block's maximum, so its ideal scale
    ties = torch.tensor([0.0, *e2m1.MIDPOINTS, *e2m1.MAGNITUDES])[:15]
    near = torch.cat((ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(-9.0))))
    x = torch.stack([near * top / 6 for top in tops])  # (253, 45)
    x = torch.cat((x, tops.unsqueeze(1) * torch.tensor([1.0, -1.0, 0.5])), dim=1)  # (253, 48)

    one = torch.tensor(1.0)
    assert_same(engine_operand(x, one), reference_operand(x, one))


def test_zeros_infinities_and_nan_have_the_bits_of_the_reference() -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    x[0, :16] = 0
    x[1, :16] = -0.0
    x[2, 3] = float("inf")
    x[3, 20] = -float("inf")
    x[4, 7] = float("nan")
    x[5, :16] = float("nan")

    scale = torch.tensor(50.0)
    assert_same(engine_operand(x, scale), reference_operand(x, scale))


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS])
def test_the_product_has_the_bits_of_the_exact_one(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    a = engine_operand(torch.randn(rows, 512, generator=generator), torch.tensor(600.0))
    codes = torch.randint(0, 256, (130, 256), dtype=torch.uint8, generator=generator)
    bytes_ = torch.randint(0, 0x7F, (130, 32), dtype=torch.uint8, generator=generator)
    scales = bytes_.view(torch.float8_e4m3fn)

    expected = matmul.exact_of_elements(a, matmul.operand(codes, scales))

    assert expected.exact
    assert torch.equal(product_of_few(a, codes, scales), expected.value)


def test_a_nan_scale_makes_its_row_nan() -> None:
    codes = torch.zeros(3, 8, dtype=torch.uint8)
    scales = torch.tensor([[0x38], [0x7F], [0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn)

    product = product_of_few(torch.ones(1, 16, dtype=torch.float64), codes, scales)

    assert product.isnan().tolist() == [[False, True, False]]


def test_squares_of_few_rows_are_those_of_the_dequantised_weight() -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (96, 128), generator=generator, dtype=torch.uint8)
    bits = torch.randint(0, 0x7F, (96, 16), generator=generator, dtype=torch.uint8)
    scales, rows = bits.view(torch.float8_e4m3fn), torch.rand(7, 256, generator=generator)

    found = squares_of_few(rows, codes, scales)

    expected = rows.double() @ matmul.operand(codes, scales).square().T
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= 256 * 2**-24 * expected).all()
