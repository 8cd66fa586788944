"""E2M1, the 4-bit element format of NVFP4.

Contract:
    code      one sign bit, two exponent bits, one mantissa bit: 0 to 15, one in a uint8
    values    0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; code 8 is -0.0
    rounding  to nearest, ties to the even code
    overflow  saturates to 6 with the sign kept; infinities too
    sign      of the input, also where the magnitude rounds to zero: -0.1 and -0.0 give code 8
    NaN       refused with ValueError, for E2M1 has no code for it

Producers treat -0.0 and NaN in other ways: see `nvfp4ref.conventions`.
Bit-exact with CUDA's __nv_cvt_float_to_fp4 on every float32 that is not NaN.
"""

import itertools

import torch

from nvfp4ref.formats import E2M1

#: Magnitude of each code from 0 to 7. OCP MX v1.0, table 5.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

#: Where rounding changes from one code to the next; a value on a midpoint is a tie.
MIDPOINTS = tuple((low + high) / 2 for low, high in itertools.pairwise(MAGNITUDES))

#: Value of each code from 0 to 15.
VALUES = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)


def encode(values: torch.Tensor) -> torch.Tensor:
    """Return the code nearest to each value, one per uint8, in the shape of `values`.

    Raises:
        ValueError: A value is NaN.
    """
    if values.isnan().any():
        first = tuple(values.isnan().nonzero()[0].tolist())
        raise ValueError(f"cannot encode NaN as E2M1, first at index {first}")
    magnitudes = values.double().abs().contiguous()  # float64 holds every input dtype
    midpoints = torch.tensor(MIDPOINTS, dtype=torch.float64, device=values.device)
    below = torch.searchsorted(midpoints, magnitudes)  # a tie falls to the lower code
    above = torch.searchsorted(midpoints, magnitudes, right=True)  # a tie rises
    nearest = torch.where(below % 2 == 0, below, above)
    return (nearest + E2M1.sign_bit * values.signbit()).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the float32 value of each code, -0.0 for code 8.

    Raises:
        ValueError: A code is above 15.
    """
    if codes.numel() and int(codes.max()) >= len(VALUES):
        raise ValueError(f"an E2M1 code lies in 0..15, found {int(codes.max())}")
    return torch.tensor(VALUES, dtype=torch.float32, device=codes.device)[codes.long()]


def round_(values: torch.Tensor) -> torch.Tensor:
    """Return the E2M1 value nearest to each value, as float32.

    Raises:
        ValueError: A value is NaN.
    """
    return decode(encode(values))
