"""E2M1 against the standard's table and an exact model in integers and fractions."""

from fractions import Fraction

import pytest
import torch

from nvfp4ref import e2m1

ALL_CODES = torch.arange(16, dtype=torch.uint8)
TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
INF, NAN = float("inf"), float("nan")


def nearest_code(value: Fraction) -> int:
    """Count in halves: 2|x| is rounded to even at the spacing of its range."""
    doubled = 2 * abs(value)
    if doubled < 4:
        halves = round(doubled)  # Python rounds a Fraction to even
    elif doubled < 8:
        halves = 2 * round(doubled / 2)
    else:
        halves = min(4 * round(doubled / 4), 12)
    return [0, 1, 2, 3, 4, 6, 8, 12].index(halves) + 8 * (value < 0)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype)


def test_the_codes_mean_what_the_standard_says() -> None:
    """OCP Microscaling Formats (MX) v1.0, table 5."""
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

    assert e2m1.decode(ALL_CODES).tolist() == positive + [-value for value in positive]
    assert e2m1.decode(ALL_CODES).signbit().tolist() == [False] * 8 + [True] * 8


def test_every_code_survives_decode_then_encode() -> None:
    assert torch.equal(e2m1.encode(e2m1.decode(ALL_CODES)), ALL_CODES)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("tie", "expected"), TIES.items())
def test_a_tie_goes_to_the_even_code(tie: float, expected: float, sign: int) -> None:
    assert e2m1.round_(torch.tensor(sign * tie)).item() == sign * expected


@pytest.mark.parametrize("tie", TIES)
def test_one_ulp_beside_a_tie_goes_to_the_nearer_code(tie: float) -> None:
    tensor = torch.tensor(tie)
    below = torch.nextafter(tensor, torch.tensor(0.0))
    above = torch.nextafter(tensor, torch.tensor(INF))

    assert e2m1.encode(above).item() == e2m1.encode(below).item() + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_half_precision_type_goes_to_the_nearest_code(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    values = values[values.isfinite()]
    expected = [
        8 if value == 0 and negative else nearest_code(Fraction(value))
        for value, negative in zip(values.tolist(), values.signbit().tolist(), strict=True)
    ]

    assert e2m1.encode(values).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_infinity_saturates_with_its_sign(dtype: torch.dtype) -> None:
    assert e2m1.encode(torch.tensor([INF, -INF], dtype=dtype)).tolist() == [7, 15]


def test_zero_and_what_rounds_to_it_keep_their_sign() -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 0.1, -0.1])

    assert e2m1.encode(values).tolist() == [0, 8, 0, 8, 0, 8]


def test_a_float64_beside_a_tie_is_not_rounded_to_float32_first() -> None:
    values = torch.tensor([0.25 + 2.0**-50, 0.75 - 2.0**-50], dtype=torch.float64)

    assert e2m1.encode(values).tolist() == [1, 1]


def test_nan_is_refused_with_its_index() -> None:
    values = torch.tensor([[1.0, 2.0], [NAN, 4.0]])

    with pytest.raises(ValueError, match=r"first at index \(1, 0\)"):
        e2m1.encode(values)


def test_a_code_of_five_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lies in 0\.\.15, found 16"):
        e2m1.decode(torch.tensor([3, 16], dtype=torch.uint8))


def test_an_empty_tensor_has_no_codes() -> None:
    empty = torch.empty(0, 16)

    assert e2m1.encode(empty).shape == (0, 16)
    assert e2m1.decode(e2m1.encode(empty)).shape == (0, 16)


def test_a_transposed_view_is_encoded_where_it_stands() -> None:
    values = torch.tensor([[0.5, 1.0, 1.5], [-0.5, -1.0, -1.5]])

    assert e2m1.encode(values.T).tolist() == [[1, 9], [2, 10], [3, 11]]
