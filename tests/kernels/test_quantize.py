import pytest
import torch

from nvfp4check.kernels.numeric import CONVENTIONS
from nvfp4check.kernels.quantize import ScaleLayout, quantize
from nvfp4ref import e2m1, e4m3, layout, nvfp4

SHAPES = [(0, 32), (1, 16), (7, 48), (33, 208), (128, 256), (5, 1040), (130, 64)]


def bytes_of(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.uint8)


def agrees(x: torch.Tensor, decode: torch.Tensor, convention: str) -> bool:
    codes, scales = quantize(x, decode, convention)
    expected_codes, expected_scales = nvfp4.quantize(x, decode, convention)
    return torch.equal(codes, expected_codes) and torch.equal(
        bytes_of(scales), bytes_of(expected_scales)
    )


def wide(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    if x.numel():
        x[0, :16] = 0.0
        x[-1, -1] = -0.0
    return x


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_bitwise_the_reference(shape, dtype, convention, generator):
    assert agrees(wide(shape, generator).to(dtype), torch.tensor(0.01), convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("decode", [1.0, 1e-3, 0.0, float("inf"), float("nan"), 1e-40, 3e38, -0.5])
def test_any_float32_under_any_global_scale_is_bitwise_the_reference(decode, convention, generator):
    any_bits = torch.randint(-(2**31), 2**31, (64, 256), generator=generator)
    x = any_bits.to(torch.int32).view(torch.float32)
    x[0, :16] = float("nan")
    x[1, :16] = float("inf")

    assert agrees(x, torch.tensor(decode), convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_tie_and_its_neighbours_under_every_scale_is_bitwise_the_reference(convention):
    # A block whose largest element is 6 * scale has that scale; the others try the midpoints.
    scale = torch.tensor(e4m3.MAGNITUDES[1:], dtype=torch.float64).unsqueeze(1)
    ties = torch.tensor(e2m1.MIDPOINTS, dtype=torch.float64).unsqueeze(0)
    middle = (ties * scale).float()
    top = (6.0 * scale).float()
    for near in (middle, middle.nextafter(middle * 0), middle.nextafter(middle * 4)):
        x = torch.cat([top, near, -near, near[:, :1]], dim=1)  # 1 + 7 + 7 + 1
        assert agrees(x, torch.tensor(1.0), convention)
        assert agrees(x * 2.0**-20, torch.tensor(2.0**-20), convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(0, 32), (1, 16), (33, 208), (128, 64), (130, 1040)])
def test_the_swizzled_scales_are_the_linear_ones_in_tiles_padded_with_zero(
    shape, convention, generator
):
    x = wide(shape, generator)
    decode = torch.tensor(0.01)

    codes, flat = quantize(x, decode, convention, scale_layout=ScaleLayout.SWIZZLED)

    expected_codes, expected = nvfp4.quantize(x, decode, convention)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(bytes_of(flat), bytes_of(layout.swizzle(expected)))


def test_strided_and_transposed_inputs_are_read_where_they_lie(generator):
    base = torch.randn(64, 96, generator=generator)
    for x in (base[:, 16:80], base[::2], base[:32, :32].t(), base[1:, 3:51]):
        assert agrees(x, torch.tensor(0.01), "engine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, d: quantize(x[:, :30], d), "30 columns, expected a multiple of 16"),
        (lambda x, d: quantize(x.double(), d), "dtype torch.float64, expected float32"),
        (lambda x, d: quantize(x[0], d), r"shape \(32,\), expected \(\*, \*\)"),
        (lambda x, d: quantize(x, d.double()), "global_decode_scale: dtype torch.float64"),
        (lambda x, d: quantize(x, d.expand(2)), r"global_decode_scale: shape \(2,\)"),
        (lambda x, d: quantize(x, d, "torchao"), "the kernels know engine"),
    ],
)
def test_what_it_cannot_take_is_refused_in_words(change, message):
    with pytest.raises(ValueError, match=message):
        change(torch.zeros(4, 32), torch.tensor(1.0))
