"""Quantise and dequantise whole tensors, against fractions and against the format's own bounds."""

from fractions import Fraction

import pytest
import torch

from nvfp4ref import e2m1, e4m3, nvfp4, packing
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE

ALL_CODES = torch.arange(16, dtype=torch.uint8)
GLOBAL_SCALES = [1.0, 2.0**-149, 1.0 / 2688, 0.0008544921875, 3.3e-5, 7.0e30]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed))


def float32(exact: Fraction) -> float:
    """Round through float64 only where that is exact: 24-bit products of 4- and 24-bit numbers."""
    return torch.tensor(float(exact), dtype=torch.float64).float().item()


@pytest.mark.parametrize("scale", GLOBAL_SCALES)
def test_every_scale_byte_under_every_code_is_the_rounded_product(scale: float) -> None:
    decode = torch.tensor(scale)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    packed = packing.pack(ALL_CODES).expand(256, 8)

    values = nvfp4.dequantize(packed, scales.view(torch.float8_e4m3fn), decode)

    for byte in range(256):
        if byte & 0x7F == 0x7F:
            assert values[byte].isnan().all()
            continue
        step = float32(Fraction(e4m3.VALUES[byte]) * Fraction(decode.item()))
        expected = torch.tensor([float32(Fraction(v) * Fraction(step)) for v in e2m1.VALUES])
        assert torch.equal(values[byte], expected)
        negative = torch.tensor([(code >= 8) != (byte >= 128) for code in range(16)])
        assert torch.equal(values[byte].signbit(), negative)


@pytest.mark.parametrize("scale", GLOBAL_SCALES)
def test_bfloat16_values_are_the_float32_ones_rounded_once(scale: float) -> None:
    scales = torch.arange(127, dtype=torch.uint8).view(127, 1).view(torch.float8_e4m3fn)
    packed = packing.pack(ALL_CODES).expand(127, 8)
    wide = nvfp4.dequantize(packed, scales, torch.tensor(scale))

    narrow = nvfp4.dequantize(packed, scales, torch.tensor(scale), torch.bfloat16)

    bits = wide.view(torch.int32).long()
    half = 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
    assert torch.equal(narrow.view(torch.int16).long() & 0xFFFF, (bits + half) >> 16 & 0xFFFF)


@pytest.mark.parametrize("convention", Convention)
def test_an_element_lies_within_half_a_step_of_its_code(convention: Convention) -> None:
    x = gaussian(64, 256)
    decode = nvfp4.global_decode_scale(x.abs().amax(), convention)
    packed, scales = nvfp4.quantize(x, decode, convention)
    step = (e4m3.decode(scales).double() * decode.double()).repeat_interleave(BLOCK_SIZE, -1)
    quotients = x.double() / step
    codes = packing.unpack(packed)
    distance = (quotients - e2m1.decode(codes).double()).abs()
    magnitude = e2m1.decode(codes).abs()
    # Half the gap above a code; the gap below is never the larger one. 6 takes what overflows:
    # E4M3 rounds a scale down by at most 1/16, so that q reaches 6 * 16 / 15.
    half_gap = torch.where(magnitude < 2, 0.25, torch.where(magnitude < 4, 0.5, 1.0)).double()
    roundings = 6 * 2.0**-24 * quotients.abs()

    assert (distance <= half_gap + roundings).all()


@pytest.mark.parametrize("convention", Convention)
def test_the_block_with_the_largest_element_takes_the_largest_scale(convention: Convention) -> None:
    x = gaussian(8, 64)
    decode = nvfp4.global_decode_scale(x.abs().amax(), convention)
    _, scales = nvfp4.quantize(x, decode, convention)
    row, column = divmod(int(x.abs().argmax()), 64)

    assert scales.view(torch.uint8)[row, column // 16] == 0x7E


@pytest.mark.parametrize("convention", Convention)
def test_quantising_what_was_dequantised_changes_nothing(convention: Convention) -> None:
    """Scales that are powers of two, and a 6 in each block, make every step exact."""
    codes = torch.randint(0, 16, (32, 64), generator=torch.manual_seed(1), dtype=torch.uint8)
    codes[:, ::16] = 7
    codes[codes == 8] = 9
    scales = torch.full((32, 4), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed, decode = packing.pack(codes), torch.tensor(2.0**-5)

    again, scales_again = nvfp4.quantize(
        nvfp4.dequantize(packed, scales, decode), decode, convention
    )

    assert torch.equal(again, packed)
    assert torch.equal(scales_again.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize(
    "convention", [c for c in Convention if c is not Convention.COMPRESSED_TENSORS]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantised_as_its_float32_values(
    dtype: torch.dtype, convention: Convention
) -> None:
    x = gaussian(16, 64).to(dtype)
    decode = nvfp4.global_decode_scale(x.abs().amax().float(), convention)
    packed, scales = nvfp4.quantize(x, decode, convention)
    wide_packed, wide_scales = nvfp4.quantize(x.float(), decode, convention)

    assert torch.equal(packed, wide_packed)
    assert torch.equal(scales.view(torch.uint8), wide_scales.view(torch.uint8))


def test_compressed_tensors_divides_by_six_in_the_dtype_of_the_weight() -> None:
    x = gaussian(256, 64).to(torch.bfloat16)
    decode = torch.tensor(0.0019)
    narrow = nvfp4.quantize_block_scales(x, decode, Convention.COMPRESSED_TENSORS)
    wide = nvfp4.quantize_block_scales(x.float(), decode, Convention.COMPRESSED_TENSORS)
    steps = narrow.view(torch.uint8).int() - wide.view(torch.uint8).int()

    assert steps.unique().tolist() == [-1, 0, 1]


def test_a_transposed_view_is_quantised_as_it_reads() -> None:
    x = gaussian(64, 32).T
    decode = torch.tensor(0.001)
    packed, scales = nvfp4.quantize(x, decode, Convention.MODELOPT)
    copied, scales_copied = nvfp4.quantize(x.contiguous(), decode, Convention.MODELOPT)

    assert torch.equal(packed, copied)
    assert torch.equal(scales.view(torch.uint8), scales_copied.view(torch.uint8))


def test_a_stored_reciprocal_is_used_as_stored() -> None:
    """The reciprocal of a rounded reciprocal is another number, and moves what lies on a tie."""
    candidates = torch.linspace(1024, 2048, 1000)
    encode = candidates[candidates.reciprocal().reciprocal() != candidates][0]
    ties = torch.tensor(e4m3.MIDPOINTS[64:]).double() * 6 / encode.double()
    amax = torch.cat(
        [ties.float(), *(ties.float().nextafter(ties.float() + side) for side in (-1, 1))]
    )
    x = torch.zeros(amax.numel(), BLOCK_SIZE)
    x[:, 0] = amax
    expected = e4m3.encode(encode * (amax * torch.tensor(6.0).reciprocal()))

    stored = nvfp4.quantize_block_scales(
        x, encode.reciprocal(), Convention.ENGINE, global_encode_scale=encode
    )
    derived = nvfp4.quantize_block_scales(x, encode.reciprocal(), Convention.ENGINE)

    assert torch.equal(stored.view(torch.uint8).flatten(), expected)
    assert not torch.equal(stored.view(torch.uint8), derived.view(torch.uint8))


def test_no_rows_give_no_codes() -> None:
    packed, scales = nvfp4.quantize(torch.empty(0, 32), torch.tensor(1.0), Convention.ENGINE)

    assert packed.shape == (0, 16)
    assert scales.shape == (0, 2)
    assert nvfp4.dequantize(packed, scales, torch.tensor(1.0)).shape == (0, 32)


def test_a_width_that_is_no_multiple_of_16_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16, found 24"):
        nvfp4.quantize(torch.zeros(2, 24), torch.tensor(1.0), Convention.MODELOPT)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        nvfp4.quantize(torch.zeros(2, 16).double(), torch.tensor(1.0), Convention.MODELOPT)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 3), (4, 1)])
def test_block_scales_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    packed = torch.zeros(2, 16, dtype=torch.uint8)
    scales = torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)

    with pytest.raises(ValueError, match=r"take block scales \(2, 2\), found"):
        nvfp4.dequantize(packed, scales, torch.tensor(1.0))
