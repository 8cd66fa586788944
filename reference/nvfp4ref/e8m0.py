"""E8M0, the power-of-two scale of the MX formats and of DeepSeek's ue8m0 scales.

Contract:
    byte      the exponent: value = 2**(byte - 127), no sign, no zero; 0xFF is NaN
    rounding  named by `Rounding`, for OCP MX v1.0 leaves it open: UP is what CUDA does
    range     below 2**-127 (zero too) gives byte 0; above 2**127 gives 0xFE
    NaN       and infinity and negative values give 0xFF
"""

from enum import StrEnum

import torch

from nvfp4ref.formats import E8M0


class Rounding(StrEnum):
    """Which power of two a scale between two of them becomes."""

    UP = "up"
    DOWN = "down"
    #: The nearer one; half-way, which is 1.5 times the lower, goes up.
    NEAREST = "nearest"


def encode(values: torch.Tensor, rounding: Rounding = Rounding.UP) -> torch.Tensor:
    """Return the byte of each value, one per uint8, in the shape of `values`."""
    mantissas, exponents = torch.frexp(
        values.double()
    )  # value = mantissa * 2**exponent, in [.5, 1)
    floor = exponents.long() - 1
    rises = {
        Rounding.UP: mantissas > 0.5,
        Rounding.DOWN: torch.zeros_like(mantissas, dtype=torch.bool),
        Rounding.NEAREST: mantissas >= 0.75,
    }[rounding]
    codes = (floor + rises + E8M0.bias).clamp(0, E8M0.nan_codes[0] - 1)
    codes = torch.where(values == 0, 0, codes)
    invalid = ~values.isfinite() | (values < 0)
    return torch.where(invalid, E8M0.nan_codes[0], codes).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the float32 value of each byte; 2**-127 is a float32 subnormal."""
    values = torch.ldexp(torch.ones_like(codes, dtype=torch.float64), codes.long() - E8M0.bias)
    return torch.where(codes == E8M0.nan_codes[0], torch.nan, values).float()
