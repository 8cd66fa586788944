"""E8M0: every byte, and every rounding against an exact model in fractions."""

import math
from fractions import Fraction

import pytest
import torch

from nvfp4ref import e8m0
from nvfp4ref.e8m0 import Rounding

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def model(value: float, rounding: Rounding) -> int:
    if not math.isfinite(value) or value < 0:
        return 255
    if value == 0:
        return 0
    exact = Fraction(value)
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    power = Fraction(2) ** exponent
    while power > exact:
        exponent, power = exponent - 1, power / 2
    while 2 * power <= exact:
        exponent, power = exponent + 1, power * 2
    rises = {
        Rounding.UP: exact > power,
        Rounding.DOWN: False,
        Rounding.NEAREST: exact >= power * Fraction(3, 2),
    }[rounding]
    return min(max(exponent + rises + 127, 0), 254)


def test_every_byte_is_its_power_of_two() -> None:
    values = e8m0.decode(ALL_BYTES).double()

    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert values[255].isnan()


@pytest.mark.parametrize("rounding", Rounding)
def test_every_byte_survives_decode_then_encode(rounding: Rounding) -> None:
    assert torch.equal(e8m0.encode(e8m0.decode(ALL_BYTES), rounding), ALL_BYTES)


@pytest.mark.parametrize("rounding", Rounding)
def test_every_octave_is_rounded_as_named(rounding: Rounding) -> None:
    mantissas = torch.tensor([1.0, 1.0 + 2.0**-23, 1.25, 1.5 - 2.0**-23, 1.5, 1.75, 2 - 2.0**-23])
    octaves = torch.ldexp(torch.ones(255, dtype=torch.float64), torch.arange(-127, 128))
    values = (octaves.unsqueeze(1) * mantissas.double()).flatten()

    assert e8m0.encode(values, rounding).tolist() == [
        model(value, rounding) for value in values.tolist()
    ]


@pytest.mark.parametrize("rounding", Rounding)
def test_what_has_no_power_of_two_is_nan_and_zero_is_the_least(rounding: Rounding) -> None:
    inf = float("inf")
    values = torch.tensor([0.0, -0.0, -1.0, inf, -inf, float("nan"), 1e-45])

    assert e8m0.encode(values, rounding).tolist() == [0, 0, 255, 255, 255, 255, 0]
