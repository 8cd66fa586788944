"""The fast dequantisation has the bits of the reference."""

import pytest
import torch

from nvfp4check.dequantize import dequantize_fp8_block, dequantize_nvfp4
from nvfp4ref import fp8_block, nvfp4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [1.0, 2.0**-149, 0.0008544921875, 3.3e-5, 7.0e30, float("nan")]


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether two tensors are equal, -0.0 told from 0.0, any NaN equal to any."""
    nan = expected.isnan()
    words = torch.int32 if expected.element_size() == 4 else torch.int16
    return bool(
        actual.dtype == expected.dtype
        and torch.equal(actual.isnan(), nan)
        and torch.equal(actual.view(words)[~nan], expected.view(words)[~nan])
    )


def nvfp4_weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.manual_seed(rows + columns)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (rows, columns // 16), generator=generator, dtype=torch.uint8)
    return codes, scales.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_byte_under_every_pair_of_codes(scale: float, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, 32)
    arguments = codes, scales.view(torch.float8_e4m3fn), torch.tensor(scale), dtype

    assert same_bits(dequantize_nvfp4(*arguments), nvfp4.dequantize(*arguments))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (7, 48), (0, 32), (1030, 2064)])
def test_every_row_is_reached_by_one_of_the_threads(rows: int, columns: int, threads: int) -> None:
    codes, scales = nvfp4_weight(rows, columns)
    scale = torch.tensor(0.001)
    out = torch.full((rows, columns), 7.0)

    values = dequantize_nvfp4(codes, scales, scale, out=out, threads=threads)

    assert values is out
    assert same_bits(values, nvfp4.dequantize(codes, scales, scale))


def test_a_swapped_pair_of_codes_does_not_pass() -> None:
    codes, scales = nvfp4_weight(4, 64)
    swapped = (codes << 4) | (codes >> 4)
    scale = torch.tensor(0.001)

    assert not same_bits(
        dequantize_nvfp4(swapped, scales, scale), nvfp4.dequantize(codes, scales, scale)
    )


def test_a_transposed_view_is_read_as_it_stands() -> None:
    codes, scales = nvfp4_weight(32, 64)
    scale = torch.tensor(0.001)
    views = codes.T.contiguous().T, scales.T.contiguous().T

    assert same_bits(dequantize_nvfp4(*views, scale), nvfp4.dequantize(codes, scales, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (128, 128), (129, 255), (576, 130), (1100, 2000)]
)
def test_fp8_blocks_have_the_bits_of_the_reference(
    rows: int, columns: int, threads: int, dtype: torch.dtype
) -> None:
    generator = torch.manual_seed(rows)
    w = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(fp8_block.scale_shape(rows, columns), generator=generator) * 0.01
    arguments = w.view(torch.float8_e4m3fn), scales, dtype

    assert same_bits(
        dequantize_fp8_block(*arguments, threads=threads), fp8_block.dequantize(*arguments)
    )


def test_block_scales_of_another_shape_are_refused() -> None:
    codes, scales = nvfp4_weight(4, 64)

    with pytest.raises(ValueError, match=r"take block scales \[4, 4\]"):
        dequantize_nvfp4(codes, scales[:, :2], torch.tensor(1.0))


def test_fp8_scales_of_another_shape_are_refused() -> None:
    w = torch.zeros(130, 130, dtype=torch.uint8).view(torch.float8_e4m3fn)

    with pytest.raises(ValueError, match=r"takes scale_inv \[2, 2\], found \[1, 2\]"):
        dequantize_fp8_block(w, torch.ones(1, 2))


@pytest.mark.parametrize(
    "out", [torch.empty(4, 32), torch.empty(4, 64).bfloat16(), torch.empty(64, 4).T]
)
def test_an_out_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    codes, scales = nvfp4_weight(4, 64)

    with pytest.raises(ValueError, match=r"out takes torch\.float32 \[4, 64\], contiguous"):
        dequantize_nvfp4(codes, scales, torch.tensor(1.0), out=out)


def test_float64_is_refused() -> None:
    codes, scales = nvfp4_weight(4, 64)

    with pytest.raises(ValueError, match="2 or 4 bytes"):
        dequantize_nvfp4(codes, scales, torch.tensor(1.0), torch.float64)
