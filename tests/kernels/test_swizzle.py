import pytest
import torch

from nvfp4check.kernels.swizzle import swizzle, unswizzle
from nvfp4ref import layout

SHAPES = [(0, 4), (1, 1), (7, 3), (33, 5), (128, 4), (129, 16), (256, 65), (300, 13)]


def ids(shape: tuple[int, int]) -> torch.Tensor:
    """Bytes that name their place, NaN and -0.0 among them."""
    return (torch.arange(shape[0] * shape[1]) % 255 + 1).to(torch.uint8).view(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzled_bytes_are_the_reference_with_zero_padding(shape):
    scales = ids(shape).view(torch.float8_e4m3fn)

    found = swizzle(scales)

    assert found.dtype == torch.float8_e4m3fn
    assert torch.equal(found.view(torch.uint8), layout.swizzle(ids(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_unswizzle_returns_every_scale_whatever_the_padding_holds(shape):
    flat = layout.swizzle(ids(shape))
    flat = torch.where(flat == 0, 0x7F, flat).to(torch.uint8)

    assert torch.equal(unswizzle(flat, *shape), ids(shape))


def test_strided_scales_are_read_where_they_lie():
    base = ids((64, 24))
    for scales in (base[::2, 4:20], base[:, ::3], base.t()):
        assert torch.equal(swizzle(scales), layout.swizzle(scales.contiguous()))


def test_a_buffer_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"flat: shape \(511,\), expected \(512\)"):
        unswizzle(torch.zeros(511, dtype=torch.uint8), 3, 4)
    with pytest.raises(ValueError, match=r"block_scales: shape \(4,\), expected \(\*, \*\)"):
        swizzle(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"dtype torch.float32, expected float8_e4m3fn or uint8"):
        swizzle(torch.zeros(4, 4))
