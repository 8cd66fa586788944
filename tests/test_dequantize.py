"""The fast dequantisation equals the reference bit for bit, on every code under every scale."""

import numpy as np
import pytest
import torch

from nvfp4check import dequantize
from nvfp4ref import fp8_block, nvfp4

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BYTES = np.arange(256, dtype=np.uint8)

#: One, an ordinary scale, one whose products are subnormal, one that overflows, and a negative.
GLOBAL_SCALES = [1.0, 4.6e-5, 3e-41, 1e36, -0.0371]


def every_pair_of_codes_under_every_scale() -> tuple[np.ndarray, np.ndarray]:
    """256 rows, one a scale byte; each holds all 256 bytes of packed codes."""
    codes = np.tile(BYTES, (256, 1))
    scales = np.repeat(BYTES[:, None], codes.shape[1] * 2 // 16, axis=1)
    return codes, scales


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(actual[number].view(integer), expected[number].view(integer))


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_under_every_scale_has_the_bits_of_the_reference(
    dtype: torch.dtype, global_scale: float
) -> None:
    codes, scales = every_pair_of_codes_under_every_scale()
    expected = nvfp4.dequantize(
        torch.from_numpy(codes),
        torch.from_numpy(scales).view(torch.float8_e4m3fn),
        torch.tensor(global_scale),
        dtype,
    )

    assert_same(dequantize.nvfp4(codes, scales, global_scale, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_of_a_ragged_fp8_weight_has_the_bits_of_the_reference(
    dtype: torch.dtype,
) -> None:
    elements = np.resize(BYTES, (130, 259))
    scales = np.array([[1.0, 0.37, 3e-41], [1e36, -2.5, 0.0]], dtype=np.float32)
    expected = fp8_block.dequantize(
        torch.from_numpy(elements).view(torch.float8_e4m3fn), torch.from_numpy(scales), dtype
    )

    assert_same(dequantize.fp8_block(elements, scales, dtype), expected)


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F808000, 0x3F80),  # a tie goes to the even neighbour, here down
        (0x3F818000, 0x3F82),  # and here up
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 becomes infinity
        (0x80000000, 0x8000),  # -0.0
        (0x00008000, 0x0000),  # half the smallest subnormal
    ],
)
def test_bfloat16_rounds_once_more_to_nearest_even(bits: int, rounded: int) -> None:
    scale = torch.tensor([[bits]], dtype=torch.uint32).view(torch.float32).numpy()
    one = np.full((1, 1), 0x38, dtype=np.uint8)

    value = dequantize.fp8_block(one, scale, torch.bfloat16)

    assert value.view(torch.uint16).item() == rounded


def test_scales_of_another_shape_are_refused() -> None:
    codes, scales = every_pair_of_codes_under_every_scale()

    with pytest.raises(ValueError, match="take block scales"):
        dequantize.nvfp4(codes, scales[:, :-1], 1.0)
    with pytest.raises(ValueError, match="take scale_inv"):
        dequantize.fp8_block(codes, np.ones((2, 1), dtype=np.float32))


def test_a_dtype_that_was_not_tried_is_refused() -> None:
    codes, scales = every_pair_of_codes_under_every_scale()

    with pytest.raises(ValueError, match=r"torch\.float16"):
        dequantize.nvfp4(codes, scales, 1.0, torch.float16)


def test_a_flipped_nibble_is_seen() -> None:
    codes, scales = every_pair_of_codes_under_every_scale()
    right = dequantize.nvfp4(codes, scales, 1.0)
    codes[0x38, 5] = (codes[0x38, 5] >> 4) | (codes[0x38, 5] << 4)  # under the scale 1.0

    assert (dequantize.nvfp4(codes, scales, 1.0) != right).sum() - right.isnan().sum() == 2
