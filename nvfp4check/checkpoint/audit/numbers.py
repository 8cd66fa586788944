"""The tables and bounds that one weight is audited with.

Contract:
    ZONE    relative distance from a midpoint within which an element or a block is decided by
            exact arithmetic and not at a glance: 16 float32 roundings of 2**-24. Eight are those
            of the longest convention with reciprocals good to one ulp (`nvfp4ref.ties`), one is
            that of the glance's product, four are its addition of 1 at the smallest midpoint, 1/4
    glance  ZONE, and what smoothing leaves unknown of the values (`smoothing`)
    slack   relative error of the global scale beyond that: one ulp of float32; three roundings of
            the weight's dtype where the producer divides in it (compressed-tensors)
    bounds  amax of a block between which every convention gives its scale byte (`inside`), every
            one but compressed-tensors' in a dtype of 16 bits (`sure`), and beyond which none does
            (`outside`); float32 bits, which order as their numbers do
    largest scale, 448: its block's amax is at most 6 * 448 * global scale, but for the slack
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nvfp4ref import e2m1, e4m3
from nvfp4ref.conventions import RULES, Convention, ElementScaling, IdealScale, ZeroScale
from nvfp4ref.formats import E2M1

ZONE = 2.0**-20
_ULP = 2.0**-23

#: Scale bytes that are numbers: 0x00 to 0x7E.
SCALES = 127
_LARGEST = SCALES - 1

_LEAST_NORMAL = 0x08

#: Global scales for which every scale times it, and its reciprocal, are normal float32.
_LEAST_GLOBAL, _LARGEST_GLOBAL = 2.0**-117, 2.0**110

#: The conventions in the order of every table here.
CONVENTIONS = tuple(Convention)

#: The different ways to a scale byte, and which of them each convention takes.
_SCALE_WAYS = tuple(
    dict.fromkeys((r.ideal_scale, r.least_scale, r.zero_scale) for r in RULES.values())
)
SCALE_WAY_OF = tuple(
    _SCALE_WAYS.index((r.ideal_scale, r.least_scale, r.zero_scale))
    for r in (RULES[convention] for convention in CONVENTIONS)
)
_IDEALS = tuple(IdealScale)
_ZEROS = tuple(ZeroScale)

#: The different ways to an element. A capped reciprocal is as any other where it is finite.
_SCALINGS = (
    ElementScaling.DIVIDE_BY_PRODUCT,
    ElementScaling.DIVIDE_BY_QUOTIENT,
    ElementScaling.MULTIPLY_BY_QUOTIENT,
    ElementScaling.MULTIPLY_BY_RECIPROCAL,
)
SCALING_OF = tuple(
    _SCALINGS.index(
        ElementScaling.MULTIPLY_BY_RECIPROCAL
        if scaling is ElementScaling.MULTIPLY_BY_CAPPED_RECIPROCAL
        else scaling
    )
    for scaling in (RULES[convention].element_scaling for convention in CONVENTIONS)
)
#: Rows: the formula of the ideal scale, and what a zero becomes, as the kernel numbers them.
SCALE_WAYS = np.array(
    [[_IDEALS.index(ideal), _ZEROS.index(zero)] for ideal, _, zero in _SCALE_WAYS], np.int64
)
LEAST_SCALES = np.array([least or 0.0 for _, least, _ in _SCALE_WAYS], np.float32)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Unit roundoff: half the distance from 1 to the number above it.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """What the kernel is given for a weight."""

    #: Block scale times global scale; exact.
    units: Array
    #: One over them, a little too small and a little too large, float32.
    factors: Array
    inside: Array
    sure: Array
    outside: Array
    #: Global decode scale, global encode scale; float32.
    globals: Array
    #: Which dtype a compressed-tensors quotient is rounded to.
    dtype: int
    #: Whether products of scales leave the normal range of float32: the reference decides all.
    extreme: bool
    #: Relative distance from a midpoint within which an element is on either side.
    zone: float


def numbers_for(
    global_decode: torch.Tensor,
    global_encode: torch.Tensor,
    dtype: torch.dtype,
    *,
    in_dtype: bool,
    slack: float = 0.0,
) -> Numbers:
    """Make the tables of a weight of some dtype under its global scale, in both directions.

    `in_dtype` says that the producer divides in the dtype of the weight, `slack` how far, relative
    to an element, the values may be from those that were quantised.
    """
    glance = ZONE + slack
    decode = float(global_decode)
    scales = e4m3.decode(torch.arange(SCALES, dtype=torch.uint8)).double().numpy()
    units = scales * decode
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1.0 / units
        factors = np.stack([inverse * (1 - glance), inverse * (1 + glance)], axis=1)
        factors = factors.astype(np.float32)
    wide = 3 * ROUNDOFF[dtype] if in_dtype else 0.0
    # compressed-tensors rounds a sixth of the amax to the weight's dtype.
    zone = glance + ROUNDOFF[dtype]
    middle = np.array(e4m3.MIDPOINTS[:_LARGEST]) * E2M1.max * decode
    full = scales[_LARGEST] * E2M1.max * decode * (1 + glance + _ULP + wide)
    lower = np.append(0.0, middle)
    inside = _bits(lower * (1 + zone), np.append(middle * (1 - zone), full), inward=True)
    sure = _bits(lower * (1 + glance), np.append(middle * (1 - glance), full), inward=True)
    # Below 2**-6 conventions with a least scale differ from the others.
    for bounds in (sure, inside):
        bounds[:_LEAST_NORMAL] = np.iinfo(np.uint32).max, 0
    outside = _bits(lower * (1 - glance), np.append(middle * (1 + glance), full), inward=False)
    return Numbers(
        units=units,
        factors=factors,
        inside=inside,
        sure=sure,
        outside=outside,
        globals=np.array([decode, float(global_encode)], np.float32),
        dtype=_DTYPES[dtype],
        extreme=not _LEAST_GLOBAL <= decode <= _LARGEST_GLOBAL,
        zone=glance,
    )


def _bits(lower: Array, upper: Array, *, inward: bool) -> Array:
    """Round an interval to float32 bits, inward or outward."""
    low, high = (_rounded(lower, up=inward), _rounded(upper, up=not inward))
    return np.stack([low, high], axis=1).view(np.uint32)


def _rounded(values: Array, *, up: bool) -> Array:
    """Round to float32, towards infinity or towards zero."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    wrong = nearest < values if up else nearest > values
    towards = np.float32(np.inf) if up else np.float32(0)
    return np.where(wrong, np.nextafter(nearest, towards), nearest).astype(np.float32)


#: Midpoints between magnitudes of E2M1, and the magnitudes.
MIDPOINTS = np.array(e2m1.MIDPOINTS)
MAGNITUDES = e2m1.decode(torch.arange(8, dtype=torch.uint8)).double().numpy()
