"""E4M3, the 8-bit format of NVFP4's block scales and of FP8 weights.

Contract:
    byte      sign, four exponent bits (bias 7), three mantissa bits, one in a uint8
    values    mantissa * 2**-9 where the exponent is 0, else (8 + mantissa) * 2**(exponent - 10)
    rounding  to nearest, ties to the even byte
    overflow  above 464 (the midpoint of 448 and the 480 that is not there): 448 or NaN, as
              `Overflow` says; 448 < |x| <= 464 rounds to 448 under both
    sign      of the input, also where the magnitude rounds to zero
    NaN       0x7F with the sign of the input

Worked out from the fields of the byte, never borrowed: torch's own cast saturates from 2.13 on
and gave NaN above 464 before. SATURATE is bit-exact with CUDA's __nv_cvt_float_to_fp8 under
__NV_SATFINITE, NAN with __NV_NOSAT and ml_dtypes, but for the sign of NaN (CUDA drops it).
"""

import itertools
from enum import StrEnum

import torch

from nvfp4ref.formats import E4M3


class Overflow(StrEnum):
    """What becomes of a magnitude that rounds beyond 448."""

    SATURATE = "saturate"
    NAN = "nan"


def _value(byte: int) -> float:
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if (byte & 0x7F) == E4M3.nan_codes[0]:
        magnitude = float("nan")
    elif exponent == 0:
        magnitude = mantissa * 2.0**-9
    else:
        magnitude = (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if byte & E4M3.sign_bit else magnitude


#: Value of each byte from 0 to 255. OCP OFP8 v1.0, section 5.2.
VALUES = tuple(_value(byte) for byte in range(256))

#: The finite magnitudes, byte 0x00 to 0x7E.
MAGNITUDES = VALUES[:0x7F]

#: Where rounding changes from one byte to the next; the last, 464, is where overflow begins.
MIDPOINTS = (
    *((low + high) / 2 for low, high in itertools.pairwise(MAGNITUDES)),
    464.0,
)


def encode(values: torch.Tensor, overflow: Overflow = Overflow.SATURATE) -> torch.Tensor:
    """Return the byte nearest to each value, one per uint8, in the shape of `values`."""
    magnitudes = values.double().abs().contiguous()  # float64 holds every input dtype
    midpoints = torch.tensor(MIDPOINTS, dtype=torch.float64, device=values.device)
    below = torch.searchsorted(midpoints, magnitudes)  # a tie falls to the lower byte
    above = torch.searchsorted(midpoints, magnitudes, right=True)  # a tie rises
    nearest = torch.where(below % 2 == 0, below, above)
    if overflow is Overflow.SATURATE:
        nearest = nearest.clamp(max=len(MAGNITUDES) - 1)
    nearest = torch.where(values.isnan(), E4M3.nan_codes[0], nearest)
    return (nearest + E4M3.sign_bit * values.signbit()).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the float32 value of each byte (uint8, or the bits of torch.float8_e4m3fn)."""
    if codes.dtype == torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    return torch.tensor(VALUES, dtype=torch.float32, device=codes.device)[codes.long()]


def round_(values: torch.Tensor, overflow: Overflow = Overflow.SATURATE) -> torch.Tensor:
    """Return the E4M3 value nearest to each value, as float32."""
    return decode(encode(values, overflow))
