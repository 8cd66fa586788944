"""FP8 in 128 x 128 blocks, with edges that cut a block."""

from fractions import Fraction

import pytest
import torch

from nvfp4ref import e4m3, fp8_block
from nvfp4ref.fp8_block import ScaleFormat

SHAPES = [(1, 1), (128, 128), (129, 1), (1, 129), (127, 257), (256, 130), (576, 200)]


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed)) * 0.02


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_element_is_multiplied_by_the_scale_of_its_block(rows: int, columns: int) -> None:
    generator = torch.manual_seed(rows * columns)
    elements = torch.randint(0, 127, (rows, columns), generator=generator, dtype=torch.uint8)
    down, across = fp8_block.scale_shape(rows, columns)
    scales = torch.rand(down, across, generator=generator) + 0.5

    values = fp8_block.dequantize(elements.view(torch.float8_e4m3fn), scales)

    for row in range(0, rows, 61):
        for column in range(0, columns, 61):
            exact = Fraction(e4m3.VALUES[int(elements[row, column])]) * Fraction(
                scales[row // 128, column // 128].item()
            )
            assert values[row, column].double().item() == float(
                torch.tensor(float(exact), dtype=torch.float64).float()
            )


def test_every_byte_under_a_scale_is_the_rounded_product() -> None:
    elements = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scales = torch.tensor([[0.1, 0.3]])

    values = fp8_block.dequantize(elements.view(torch.float8_e4m3fn), scales)

    for byte, value in enumerate(values[0].tolist()):
        if byte & 0x7F == 0x7F:
            assert value != value
        else:
            product = Fraction(e4m3.VALUES[byte]) * Fraction(scales[0, byte // 128].item())
            assert value == torch.tensor(float(product), dtype=torch.float64).float().item()


@pytest.mark.parametrize("scale_format", ScaleFormat)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_an_element_lies_within_half_a_step_of_its_byte(
    rows: int, columns: int, scale_format: ScaleFormat
) -> None:
    w = weight(rows, columns)
    elements, scales = fp8_block.quantize(w, scale_format)
    back = fp8_block.dequantize(elements, scales).double()
    spread = scales.double().repeat_interleave(128, 0)[:rows]
    spread = spread.repeat_interleave(128, 1)[:, :columns]
    # half a unit of three mantissa bits, at least half the subnormal step, and two roundings
    half_step = torch.maximum(w.double().abs() / 16, spread * 2.0**-10)

    assert scales.shape == fp8_block.scale_shape(rows, columns)
    assert ((back - w.double()).abs() <= half_step + 2 * 2.0**-24 * w.double().abs()).all()


def test_the_largest_element_of_each_block_is_448() -> None:
    elements, scales = fp8_block.quantize(weight(576, 256))
    bytes_ = elements.view(torch.uint8) & 0x7F

    for row in range(5):
        for column in range(2):
            block = bytes_[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            assert int(block.max()) == 0x7E
    assert scales.shape == (5, 2)


def test_a_partial_block_has_the_scale_of_what_is_in_it() -> None:
    w = torch.ones(130, 128)
    w[128:] = 448.0

    _, scales = fp8_block.quantize(w)

    assert scales.flatten().tolist() == [torch.tensor(1.0).div(448).item(), 1.0]


def test_ue8m0_scales_are_powers_of_two_that_overflow_nothing() -> None:
    elements, scales = fp8_block.quantize(weight(256, 256), ScaleFormat.UE8M0)
    mantissas, _ = torch.frexp(scales)
    largest = elements.view(torch.uint8).bitwise_and(0x7F).max()

    assert mantissas.unique().tolist() == [0.5]
    assert 0x70 <= int(largest) <= 0x7E  # at least half of 448


def test_a_block_of_zeros_has_scale_one() -> None:
    elements, scales = fp8_block.quantize(torch.zeros(128, 256))

    assert scales.tolist() == [[1.0, 1.0]]
    assert not elements.view(torch.uint8).any()


def test_a_nan_makes_its_block_nan_and_no_other() -> None:
    w = weight(128, 256)
    w[3, 5] = float("nan")
    elements, scales = fp8_block.quantize(w)
    values = fp8_block.dequantize(elements, scales)

    assert values[:, :128].isnan().all()
    assert values[:, 128:].isfinite().all()


def test_bfloat16_values_are_the_float32_ones_rounded_once() -> None:
    elements, scales = fp8_block.quantize(weight(130, 140))

    narrow = fp8_block.dequantize(elements, scales, torch.bfloat16)

    assert torch.equal(narrow, fp8_block.dequantize(elements, scales).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (3, 2), (2, 3)])
def test_scales_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    elements = torch.zeros(200, 130, dtype=torch.uint8).view(torch.float8_e4m3fn)

    with pytest.raises(ValueError, match=r"takes scale_inv \[2, 2\], found"):
        fp8_block.dequantize(elements, torch.ones(shape))
