"""Float64 values rounded once to a narrower dtype.

Contract:
    round_to     to nearest, ties to even, in one rounding; overflow gives infinity, NaN stays NaN
    truncate_to  toward zero; a finite value stays finite

torch's own cast of float64 to bfloat16 or float16 goes through float32 and rounds twice. Here the
step through float32 rounds to odd, which a second rounding to fewer bits cannot notice.
"""

import torch

#: Roundoff of a rounding to nearest: half the distance from 1 to the next value.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

#: Significant bits, the leading one counted.
PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

#: Smallest magnitude above zero.
SMALLEST_SUBNORMAL = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}


def _toward_zero(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the nearest value of a dtype that is not larger in magnitude, from float64."""
    near = values.to(dtype)
    too_large = near.double().abs() > values.abs()
    inward = torch.nextafter(near, torch.zeros_like(near))
    return torch.where(too_large, inward, near)


def _to_odd(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values, the last bit set wherever float32 does not hold the value."""
    inward = _toward_zero(values, torch.float32)
    inexact = (inward.double() != values) & ~values.isnan()
    bits = inward.view(torch.int32)
    return torch.where(inexact, bits | 1, bits).view(torch.float32)


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float64 values in a dtype, rounded once to nearest even."""
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    return _to_odd(values).to(dtype)


def truncate_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float64 values in a dtype, rounded once toward zero."""
    if dtype in (torch.float64, torch.float32):
        return _toward_zero(values, dtype)
    return _toward_zero(_to_odd(values).double(), dtype)
