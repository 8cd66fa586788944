"""E4M3 against the standard's table and an exact model in fractions."""

from bisect import bisect_left
from fractions import Fraction

import pytest
import torch

from nvfp4ref import e4m3
from nvfp4ref.e4m3 import Overflow

ALL_BYTES = torch.arange(256, dtype=torch.uint8)
INF, NAN = float("inf"), float("nan")

#: Magnitudes in units of 2**-9, as integers: eight subnormal steps, then eight to each octave.
UNITS = [*range(8), *((8 + step) << octave for octave in range(15) for step in range(8))][:127]


def nearest_byte(value: Fraction, overflow: Overflow) -> int:
    """Search the integers, and go to the even byte where both are as near."""
    units = abs(value) * 512
    above = bisect_left(UNITS, units)
    if above == 0:
        byte = 0
    elif above == len(UNITS):
        limit = Fraction(464 * 512)
        byte = 0x7E if units <= limit or overflow is Overflow.SATURATE else 0x7F
    else:
        below = above - 1
        gap = (units - UNITS[below]) - (UNITS[above] - units)
        byte = below if gap < 0 or (gap == 0 and below % 2 == 0) else above
    return byte + 128 * (value < 0)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype)


def test_the_bytes_mean_what_the_standard_says() -> None:
    """OCP 8-bit Floating Point (OFP8) v1.0, table 2."""
    named = {0x00: 0.0, 0x01: 2.0**-9, 0x07: 0.875 * 2.0**-6, 0x08: 2.0**-6, 0x7E: 448.0}

    for byte, value in named.items():
        assert e4m3.decode(torch.tensor([byte, byte | 0x80], dtype=torch.uint8)).tolist() == [
            value,
            -value,
        ]


def test_every_byte_is_its_integer_number_of_units() -> None:
    values = e4m3.decode(ALL_BYTES).double() * 512

    assert values[:127].tolist() == UNITS
    assert values[128:255].tolist() == [-unit for unit in UNITS]
    assert values[[127, 255]].isnan().all()


def test_the_bits_of_torch_float8_are_read_as_they_are() -> None:
    assert torch.equal(
        e4m3.decode(ALL_BYTES.view(torch.float8_e4m3fn)).nan_to_num(),
        ALL_BYTES.view(torch.float8_e4m3fn).float().nan_to_num(),
    )


@pytest.mark.parametrize("overflow", Overflow)
def test_every_byte_survives_decode_then_encode(overflow: Overflow) -> None:
    assert torch.equal(e4m3.encode(e4m3.decode(ALL_BYTES), overflow) & 127, ALL_BYTES & 127)
    numbers = ALL_BYTES[(ALL_BYTES & 127) != 127]
    assert torch.equal(e4m3.encode(e4m3.decode(numbers), overflow), numbers)


@pytest.mark.parametrize("sign", [1, -1])
def test_every_tie_goes_to_the_even_byte(sign: int) -> None:
    ties = sign * torch.tensor(e4m3.MIDPOINTS[:-1])
    lower = torch.arange(126)

    assert torch.equal(e4m3.encode(ties).long() & 127, lower + lower % 2)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_ulp_beside_a_tie_goes_to_the_nearer_byte(sign: int) -> None:
    ties = torch.tensor(e4m3.MIDPOINTS[:-1])
    below = torch.nextafter(ties, torch.zeros_like(ties))
    above = torch.nextafter(ties, torch.full_like(ties, INF))
    sign_bit = 128 * (sign < 0)

    assert (e4m3.encode(sign * below).int() - sign_bit).tolist() == list(range(126))
    assert (e4m3.encode(sign * above).int() - sign_bit).tolist() == list(range(1, 127))


@pytest.mark.parametrize("overflow", Overflow)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_half_precision_type_goes_to_the_nearest_byte(
    dtype: torch.dtype, overflow: Overflow
) -> None:
    values = every_value(dtype)
    values = values[values.isfinite()]
    expected = [
        128 if value == 0 and negative else nearest_byte(Fraction(value), overflow)
        for value, negative in zip(values.tolist(), values.signbit().tolist(), strict=True)
    ]

    assert e4m3.encode(values, overflow).tolist() == expected


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("value", "saturated", "not_saturated"),
    [
        (448.0, 0x7E, 0x7E),
        (464.0, 0x7E, 0x7E),
        (464.00003, 0x7E, 0x7F),
        (480.0, 0x7E, 0x7F),
        (3.0e38, 0x7E, 0x7F),
        (INF, 0x7E, 0x7F),
    ],
)
def test_overflow_begins_above_464(
    value: float, saturated: int, not_saturated: int, sign: int
) -> None:
    x = torch.tensor(sign * value)
    sign_bit = 128 * (sign < 0)

    assert e4m3.encode(x, Overflow.SATURATE).item() == saturated | sign_bit
    assert e4m3.encode(x, Overflow.NAN).item() == not_saturated | sign_bit


@pytest.mark.parametrize("overflow", Overflow)
def test_nan_keeps_its_sign(overflow: Overflow) -> None:
    bits = torch.tensor([0x7FC00000, 0x7F800001, -0x400000, -0x7FFFFF], dtype=torch.int32)

    assert e4m3.encode(bits.view(torch.float32), overflow).tolist() == [127, 127, 255, 255]


def test_zero_and_what_rounds_to_it_keep_their_sign() -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2.0**-10, -(2.0**-10)])

    assert e4m3.encode(values).tolist() == [0, 128, 0, 128, 0, 128]


def test_a_float64_beside_a_tie_is_not_rounded_to_float32_first() -> None:
    values = torch.tensor([2.0**-10 + 2.0**-60], dtype=torch.float64)

    assert e4m3.encode(values).item() == 1


def test_rounding_is_encode_then_decode() -> None:
    values = torch.tensor([0.030395508, 300.0, 500.0])

    assert e4m3.round_(values).tolist() == [0.03125, 288.0, 448.0]
    assert e4m3.round_(values, Overflow.NAN)[2].isnan()
