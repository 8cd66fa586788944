import pytest
import torch

from nvfp4check.kernels.dequantize import dequantize
from nvfp4ref import nvfp4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def every_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """All 16 codes under all 256 scales: a row a scale."""
    codes = torch.tensor([2 * i | (2 * i + 1) << 4 for i in range(8)], dtype=torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1).view(torch.float8_e4m3fn)
    return codes.expand(256, 8), scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decode", [1.0, 0.0123, 3e38, 1e-38, 0.0, -1.0, float("nan")])
def test_every_code_under_every_scale_is_bitwise_the_reference(decode, dtype, same_bits):
    codes, scales = every_pair()
    g = torch.tensor(decode)

    assert same_bits(dequantize(codes, scales, g, dtype), nvfp4.dequantize(codes, scales, g, dtype))


@pytest.mark.parametrize("shape", [(0, 32), (1, 16), (7, 48), (33, 208), (129, 1040)])
def test_ragged_shapes_are_bitwise_the_reference(shape, same_bits, generator):
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), generator=generator).to(torch.uint8)
    raw = torch.randint(0, 256, (shape[0], shape[1] // 16), generator=generator)
    scales = raw.to(torch.uint8).view(torch.float8_e4m3fn)
    g = torch.tensor(0.7)

    assert same_bits(dequantize(codes, scales, g), nvfp4.dequantize(codes, scales, g))


def test_strided_codes_and_scales_are_read_where_they_lie(same_bits, generator):
    codes = torch.randint(0, 256, (16, 32), generator=generator).to(torch.uint8)[::2, 8:24]
    raw = torch.randint(0, 0x7F, (8, 8), generator=generator).to(torch.uint8)
    scales = raw.view(torch.float8_e4m3fn)[:, ::4]
    g = torch.tensor(1.0)

    found = dequantize(codes, scales, g)

    assert same_bits(found, nvfp4.dequantize(codes.contiguous(), scales.contiguous(), g))


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        ((4, 15), (4, 1), "30 codes a row, expected a multiple of 16"),
        ((4, 16), (4, 3), r"block_scales: shape \(4, 3\), expected \(4, 2\)"),
        ((4, 16), (3, 2), r"block_scales: shape \(3, 2\), expected \(4, 2\)"),
    ],
)
def test_scales_that_are_not_one_for_each_block_are_refused(codes, scales, message):
    with pytest.raises(ValueError, match=message):
        dequantize(
            torch.zeros(codes, dtype=torch.uint8),
            torch.zeros(scales, dtype=torch.float8_e4m3fn),
            torch.tensor(1.0),
        )


def test_a_dtype_that_is_no_float_is_refused():
    codes, scales = every_pair()
    with pytest.raises(ValueError, match=r"dtype torch\.int8"):
        dequantize(codes, scales, torch.tensor(1.0), torch.int8)
