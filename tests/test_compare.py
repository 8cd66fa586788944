"""Comparison by bit pattern and within a tolerance; what a mismatch says."""

import json
import math

import pytest
import torch

from nvfp4check import compare
from nvfp4check.compare import Nans, Zeros
from nvfp4check.tolerance import Tolerance, output_terms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tolerance(
    expected: list[float], allowed: float, dtype: torch.dtype = torch.float32, exact: bool = False
) -> Tolerance:
    real = torch.tensor(expected, dtype=torch.float64)
    return Tolerance(
        expected=real,
        terms={"part": torch.full_like(real, allowed / 4), "rest": torch.tensor(allowed * 0.75)},
        exact=torch.full(real.shape, exact),
        dtype=dtype,
        why="made for this test",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tensors_hold_and_one_flipped_bit_does_not(dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 24).to(dtype).view(4, 6)
    flipped = values.clone()
    flipped.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])[2, 5] ^= 1

    assert compare.bits(values, values.clone()).holds
    found = compare.bits(flipped, values)
    assert (found.count, found.total) == (1, 24)
    assert found.first is not None
    assert found.first.index == (2, 5)


def test_the_sign_of_a_zero_counts_unless_it_is_free() -> None:
    plus, minus = torch.zeros(3), -torch.zeros(3)

    assert not compare.bits(minus, plus).holds
    assert compare.bits(minus, plus, zeros=Zeros.UNSIGNED).holds


def test_a_nan_equals_any_nan_unless_its_bits_count() -> None:
    quiet = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([-1], dtype=torch.int32).view(torch.float32)

    assert compare.bits(quiet, other).holds
    assert not compare.bits(quiet, other, nans=Nans.SAME_BITS).holds
    assert not compare.bits(quiet, torch.tensor([1.0])).holds


def test_infinities_count_by_position_and_sign() -> None:
    one = torch.tensor([math.inf, 1.0])

    assert compare.bits(one, one.clone()).holds
    assert not compare.bits(one, torch.tensor([-math.inf, 1.0])).holds
    assert not compare.bits(one, one.flip(0)).holds


@pytest.mark.parametrize(
    ("actual", "form"),
    [
        (torch.zeros(2, 3), r"shape \(2, 3\), expected \(3, 2\)"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), "dtype torch.bfloat16, expected torch.float32"),
        (None, "a NoneType, expected a tensor"),
    ],
)
def test_another_form_is_said(actual: torch.Tensor, form: str) -> None:
    found = compare.bits(actual, torch.zeros(3, 2))

    assert not found.holds
    with pytest.raises(AssertionError, match=form):
        found.require()


def test_scales_compare_as_bytes() -> None:
    raw = torch.tensor([[0x38, 0x7F]], dtype=torch.uint8)
    scales = raw.view(torch.float8_e4m3fn)

    assert compare.bits(scales, scales.clone()).holds
    found = compare.bits((raw + 1).view(torch.float8_e4m3fn), scales, what="block scales")
    assert "0x39 (1.125)   0x38 (1)" in str(found)


def test_inside_the_bound_holds_and_outside_does_not() -> None:
    allowed = tolerance([1.0, 2.0, 4.0], 2.0**-10)

    assert compare.within(torch.tensor([1.0, 2.0 + 2.0**-10, 4.0 - 2.0**-10]), allowed).holds
    found = compare.within(torch.tensor([1.0, 2.0 + 2.0**-9, 4.0]), allowed)
    assert found.count == 1
    assert found.worst is not None
    assert found.worst.terms == {"part": 2.0**-12, "rest": 0.75 * 2.0**-10}
    assert "error   2 times what is allowed there: part" in str(found)
    assert "made for this test" in str(found)


def test_where_bits_are_due_the_bound_does_not_help() -> None:
    near = torch.tensor([1.0 + 2.0**-20])

    assert compare.within(near, tolerance([1.0], 1e-3)).holds
    assert not compare.within(near, tolerance([1.0], 1e-3, exact=True)).holds
    assert compare.within(-torch.zeros(1), tolerance([0.0], 0.0, exact=True)).holds


def test_the_rounded_end_of_the_interval_is_allowed() -> None:
    """A bfloat16 result cannot lie inside an interval narrower than its step."""
    allowed = tolerance([1.0 + 2.0**-9], 2.0**-12, torch.bfloat16)

    assert compare.within(torch.tensor([1.0], dtype=torch.bfloat16), allowed).holds
    beyond = torch.tensor([1.0 + 2.0**-6], dtype=torch.bfloat16)
    assert not compare.within(beyond, allowed).holds


def test_an_infinity_is_right_only_where_the_interval_overflows() -> None:
    infinite = torch.tensor([math.inf], dtype=torch.float16)

    assert compare.within(infinite, tolerance([65519.0], 2.0, torch.float16)).holds
    assert not compare.within(infinite, tolerance([65500.0], 2.0, torch.float16)).holds


def test_nan_is_right_exactly_where_the_result_is_nan() -> None:
    allowed = tolerance([math.nan, 1.0], 0.1)

    assert compare.within(torch.tensor([math.nan, 1.0]), allowed).holds
    assert not compare.within(torch.tensor([1.0, math.nan]), allowed).holds


def test_first_and_worst_are_told_apart() -> None:
    found = compare.within(torch.tensor([1.01, 2.0, 9.0]), tolerance([1.0, 2.0, 4.0], 1e-3))

    assert found.first is not None
    assert found.worst is not None
    assert (found.first.index, found.worst.index) == ((0,), (2,))


def test_a_mismatch_is_plain_json_with_nan_too() -> None:
    found = compare.bits(torch.tensor([math.nan]), torch.tensor([1.0]))

    assert found.worst is not None
    written = json.dumps(found.worst.to_json(), allow_nan=False)
    assert json.loads(written)["actual"] == "nan"
    assert json.loads(written)["expected_bits"] == "0x3f800000"


def test_a_result_that_holds_says_how_much_was_bitwise() -> None:
    found = compare.within(torch.tensor([1.0]), tolerance([1.0], 1e-3))

    assert str(found) == "values: all 1 hold, 0 bit for bit, 1 within the bound"


def test_the_output_is_rounded_once_and_that_is_not_allowed_twice() -> None:
    """1.25 rounds to itself in bfloat16: without error before it, no neighbour is allowed."""
    real = torch.tensor([1.25, 1.25 + 2.0**-9], dtype=torch.float64)
    allowed = Tolerance(
        expected=real,
        terms=output_terms(real, torch.bfloat16),
        exact=torch.zeros(2, dtype=torch.bool),
        dtype=torch.bfloat16,
        why="made for this test",
    )
    right = torch.tensor([1.25, 1.25]).to(torch.bfloat16)
    next_ = torch.nextafter(right, torch.full_like(right, 2.0))

    assert compare.within(right, allowed).holds
    assert compare.within(next_, allowed).count == 2


def test_a_number_where_nan_is_due_is_a_mismatch_and_nan_is_not() -> None:
    allowed = tolerance([math.nan, 1.0], 0.5)

    assert compare.within(torch.tensor([math.nan, 1.0]), allowed).holds
    assert compare.within(torch.tensor([0.0, 1.0]), allowed).count == 1
    assert compare.within(torch.tensor([math.nan, math.nan]), allowed).count == 1
