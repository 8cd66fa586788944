"""The descriptors agree with the tables that the codecs are built from."""

import math

import pytest

from nvfp4ref import e2m1, e4m3, formats
from nvfp4ref.formats import BLOCK_SIZE, E2M1, E4M3, E8M0, FP8_BLOCK, NVFP4, ElementFormat

CODECS = [(E2M1, e2m1.VALUES), (E4M3, e4m3.VALUES)]


def fields_to_value(element: ElementFormat, code: int) -> float:
    """IEEE 754's reading of sign, exponent and mantissa, from the descriptor alone."""
    mantissa = code & ((1 << element.mantissa_bits) - 1)
    exponent = (code >> element.mantissa_bits) & ((1 << element.exponent_bits) - 1)
    magnitude = (
        math.ldexp(mantissa, 1 - element.bias - element.mantissa_bits)
        if exponent == 0
        else math.ldexp(
            (1 << element.mantissa_bits) + mantissa, exponent - element.bias - element.mantissa_bits
        )
    )
    return -magnitude if code & element.sign_bit else magnitude


@pytest.mark.parametrize(("element", "values"), CODECS, ids=lambda item: getattr(item, "name", ""))
def test_every_code_is_worth_what_its_fields_say(
    element: ElementFormat, values: tuple[float, ...]
) -> None:
    assert len(values) == 1 << element.bits
    for code, value in enumerate(values):
        if code in element.nan_codes:
            assert math.isnan(value)
        else:
            assert (value, math.copysign(1, value)) == (
                fields_to_value(element, code),
                -1 if code & element.sign_bit else 1,
            )


@pytest.mark.parametrize(("element", "values"), CODECS, ids=lambda item: getattr(item, "name", ""))
def test_the_limits_of_a_descriptor_are_those_of_its_values(
    element: ElementFormat, values: tuple[float, ...]
) -> None:
    positive = sorted(value for value in values if value > 0)

    assert element.max == positive[-1]
    assert element.smallest_subnormal == positive[0]
    assert element.smallest_normal == positive[(1 << element.mantissa_bits) - 1]
    assert element.bits == 1 + element.exponent_bits + element.mantissa_bits


def test_e8m0_has_no_sign() -> None:
    assert E8M0.sign_bit == 0
    assert E8M0.bits == E8M0.exponent_bits


def test_full_scale_is_the_largest_code_under_the_largest_block_scale() -> None:
    assert NVFP4.full_scale == 6 * 448 == 2688
    assert FP8_BLOCK.full_scale == 448


def test_block_sizes_are_the_products_of_their_shapes() -> None:
    assert BLOCK_SIZE == NVFP4.block_size == 16
    assert FP8_BLOCK.block_size == 128 * 128
    assert (formats.SCALE_TILE_ROWS, formats.SCALE_TILE_COLUMNS) == (128, 4)
