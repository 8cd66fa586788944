"""How far an original may lie from what is stored of it: half a gap of the format.

Contract:
    half gap     of a code: half of the wider step beside it; of the largest: half the step below it
    nvfp4        half gap of the code times block scale times global scale. A code of +-6 may stand
                 for more: rounding the block scale to E4M3 moves amax / (6 scale) by half an E4M3
                 step, so at least 6 half steps of the scale are granted. Under scale 0 every
                 element up to 6 * 2**-10 (half of the smallest scale) was lost
    fp8          half gap of the byte times the scale of its 128 x 128 block
    plain        half a unit in the last place; of zero and subnormals half the smallest number
    common       two stored numbers a, b can come from one original only if |a - b| is at most the
                 sum of their half gaps. `ZONE` more is granted for the producers' float32 roundings

All in float64, where every product here is exact.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nvfp4ref import e2m1, e4m3
from nvfp4ref.formats import E2M1, E4M3

Array = npt.NDArray[Any]

#: Relative error of float32 arithmetic in any convention: 16 roundings of 2**-24.
ZONE = 2.0**-20

#: Bits of the significand, and the exponent of the smallest number, of plain dtypes.
_PLAIN = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149), "F64": (53, -1074)}


def _half_gaps(magnitudes: Array) -> Array:
    steps = np.diff(magnitudes)
    wider = np.maximum(np.append(steps[0], steps), np.append(steps, steps[-1]))
    return np.asarray(wider / 2)


#: Half gap of each E2M1 code, in units of its scales.
E2M1_HALF_GAPS = np.tile(_half_gaps(np.array(e2m1.MAGNITUDES)), 2)

_E4M3_MAGNITUDES = np.array(e4m3.MAGNITUDES)
_E4M3_GAPS = np.append(_half_gaps(_E4M3_MAGNITUDES), np.nan)

#: Half gap of each E4M3 byte; NaN for the bytes that are NaN.
E4M3_HALF_GAPS = np.tile(_E4M3_GAPS, 2)

#: Half of the smallest block scale: what E4M3 rounds to zero.
_LOST_SCALE = E4M3.smallest_subnormal / 2


def _constant(values: Array) -> Array:
    """Forbid writing to what is computed once."""
    values.flags.writeable = False
    return values


@cache
def e2m1_values() -> Array:
    """Return the value of each of the 16 codes, read-only."""
    return _constant(e2m1.decode(torch.arange(16, dtype=torch.uint8)).double().numpy())


@cache
def e4m3_values() -> Array:
    """Return the value of each of the 256 bytes, read-only."""
    return _constant(e4m3.decode(torch.arange(256, dtype=torch.uint8)).double().numpy())


@cache
def nvfp4_units() -> Array:
    """Return the value of every code under every scale byte [256, 16], read-only."""
    return _constant(e4m3_values()[:, None] * e2m1_values()[None, :])


def nvfp4_half_gaps(global_decode_scale: float) -> Array:
    """Return the half gap of every code under every scale byte [256, 16]."""
    return np.asarray(_unit_half_gaps() * abs(global_decode_scale))


@cache
def _unit_half_gaps() -> Array:
    scales = np.abs(e4m3_values())
    gaps = scales[:, None] * E2M1_HALF_GAPS[None, :]
    top = E2M1.max * E4M3_HALF_GAPS
    for code in (7, 15):
        gaps[:, code] = np.maximum(gaps[:, code], top)
    for byte in (0, E4M3.sign_bit):
        gaps[byte] = E2M1.max * _LOST_SCALE
    return _constant(gaps)


def plain_half_gaps(values: Array, dtype: str) -> Array:
    """Return the half gap of float64 values that a plain dtype holds."""
    bits, least = _PLAIN[dtype]
    _, exponent = np.frexp(values)
    exponent = np.where(values == 0, least + bits, exponent)
    return np.asarray(np.ldexp(0.5, np.maximum(exponent - bits, least)))
