"""One rounding from float64, where torch's own cast takes two."""

from fractions import Fraction

import pytest
import torch

from nvfp4ref.rounding import PRECISION, UNIT_ROUNDOFF, round_to, truncate_to

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_just_above_a_midpoint_rounds_up(dtype: torch.dtype) -> None:
    """1 + u + 2**-40: through float32 it would become the tie and go to the even 1."""
    step = 2.0 ** (1 - PRECISION[dtype])
    value = torch.tensor([1 + step / 2 + 2.0**-40], dtype=torch.float64)

    assert round_to(value, dtype).double().item() == 1 + step
    assert truncate_to(value, dtype).double().item() == 1
    assert truncate_to(-value, dtype).double().item() == -1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator, dtype=torch.float64)

    rounded = round_to(values, dtype).double()

    assert ((rounded - values).abs() <= UNIT_ROUNDOFF[dtype] * values.abs()).all()
    toward = truncate_to(values, dtype).double()
    assert (toward.abs() <= values.abs()).all()
    assert ((toward - values).abs() < 2 * UNIT_ROUNDOFF[dtype] * values.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_the_dtype_stays(dtype: torch.dtype) -> None:
    raw = torch.arange(-(2**15), 2**15, 7).to(torch.int16)
    values = raw.view(dtype) if dtype != torch.float32 else raw.float() / 3
    finite = values[~values.isnan()]

    assert torch.equal(round_to(finite.double(), dtype), finite)
    assert torch.equal(truncate_to(finite.double(), dtype), finite)


def test_overflow_gives_infinity_and_truncation_does_not() -> None:
    large = torch.tensor([1e300, -1e300, 65520.0], dtype=torch.float64)

    assert round_to(large, torch.float16).tolist() == [float("inf"), float("-inf"), float("inf")]
    assert truncate_to(large, torch.float16).tolist() == [65504.0, -65504.0, 65504.0]
    assert round_to(torch.tensor([65519.99], dtype=torch.float64), torch.float16).item() == 65504


def test_nan_stays() -> None:
    nan = torch.tensor([float("nan")], dtype=torch.float64)

    assert round_to(nan, torch.bfloat16).isnan().all()
    assert truncate_to(nan, torch.bfloat16).isnan().all()


def test_the_roundoffs_are_half_a_unit_of_the_last_place() -> None:
    for dtype, bits in PRECISION.items():
        assert Fraction(UNIT_ROUNDOFF[dtype]) == Fraction(2) ** -bits
