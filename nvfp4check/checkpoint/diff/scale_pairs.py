"""What a pair of block scales makes of every pair of codes, in tables of sixteen bytes.

Contract:
    place      of a value of E2M1 in their order, 0 for -6 to 14 for 6; 0 and -0 are place 7
    steps      the grid of a block is its scale times these values. The coarser grid of two, that of
               the larger scale in magnitude, holds the values of the other up to a rounding to
               nearest, ties to even; an element's steps are from place to place on it. Of two equal
               scales that is the distance of the codes; two scales of 0 are no distance apart
    bound      for each code of a, the places of b's codes that are within the sum of both half gaps
               (`nvfp4check.checkpoint.bounds`). Both ends of what a code may stand for rise with
               its place, so that these are one range
    entry      four tables for a's codes, least place, 14 - most place, own place, 14 - own place,
               and four for b's, own place, 14 - it, and on the coarser grid both again: where the
               first exceed the second is what counts

An entry is made when its pair of scales is first met. Scales that are NaN have none.
"""

from typing import Any, NamedTuple

import numpy as np

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.diff.measured import Array
from nvfp4check.checkpoint.scan_packed import jit
from nvfp4ref import e2m1

#: Bytes of an entry, and of a half.
ENTRY, HALF = 128, 64
#: Place of 0, and the last place.
_ZERO, _LAST = 7, 14
#: Place of each code, and the code of each place.
_PLACES = np.array([*range(7, 15), *range(7, -1, -1)])
_CODES = np.array([*range(15, 8, -1), *range(8)])
_MIDPOINTS = np.array(e2m1.MIDPOINTS)
_VALUES = bounds.e2m1_values()


class ScalePairs(NamedTuple):
    """Entries, one after another, by scale byte of a times 256 plus that of b."""

    factors: Array
    scales: Array
    gaps: Array
    is_made: Array
    entries: Array


@jit
def aligned(size: int) -> Any:
    """Make room that begins where a line of the cache does."""
    room = np.empty(size + HALF, np.uint8)
    return room[-room.ctypes.data % HALF :][:size]


def scale_pairs(factor_a: float, factor_b: float) -> ScalePairs:
    """Prepare tables for two global scales, or any two numbers that are one to the other so."""
    scales, gaps = [], []
    for factor in (factor_a, factor_b):
        scales.append(bounds.e4m3_values() * factor)
        granted = np.abs(bounds.nvfp4_units() * factor) * bounds.ZONE
        gaps.append(bounds.nvfp4_half_gaps(factor) + granted)
    pairs = 1 << 16
    return ScalePairs(
        np.array([factor_a, factor_b]),
        np.stack(scales),
        np.stack(gaps),
        np.zeros(pairs, np.uint8),
        aligned(pairs * ENTRY),
    )


@jit
def make_entry(pairs: ScalePairs, byte_a: int, byte_b: int) -> None:
    """Make the entry of a pair of scales that are numbers."""
    pair = np.int64(byte_a) << 8 | np.int64(byte_b)
    pairs.is_made[pair] = 1
    scale_a, scale_b = pairs.scales[0, byte_a], pairs.scales[1, byte_b]
    gaps_a, gaps_b = pairs.gaps[0, byte_a], pairs.gaps[1, byte_b]
    entry, at = pairs.entries, pair * ENTRY
    for code in range(16):
        place_a = place_b = _PLACES[code]
        if scale_a == scale_b == 0:
            place_a = place_b = 0
        elif abs(scale_a) < abs(scale_b):
            place_a = _rounded(_VALUES[code] * scale_a, scale_b)
        else:
            place_b = _rounded(_VALUES[code] * scale_b, scale_a)
        least, most = _LAST + 1, 0
        for place in range(_LAST + 1):
            other = _CODES[place]
            distance = abs(_VALUES[code] * scale_a - _VALUES[other] * scale_b)
            if distance <= gaps_a[code] + gaps_b[other]:
                least, most = min(least, place), max(most, place)
        entry[at + code] = least
        # Where no place is in the range, every one is below it, and none above.
        entry[at + 16 + code] = _LAST - most if least <= most else 0
        entry[at + 32 + code], entry[at + 48 + code] = place_a, _LAST - place_a
        own = _PLACES[code]
        entry[at + HALF + code], entry[at + HALF + 16 + code] = own, _LAST - own
        entry[at + HALF + 32 + code], entry[at + HALF + 48 + code] = place_b, _LAST - place_b


@jit
def _rounded(value: float, scale: float) -> int:
    """Give the place nearest to a value on the grid of a scale; a tie goes to the even code."""
    size, steps = abs(value), 0
    for step in range(_MIDPOINTS.size):
        middle = _MIDPOINTS[step] * abs(scale)
        steps += size > middle or (size == middle and step % 2 == 1)
    return _ZERO - steps if (value < 0) != (scale < 0) else _ZERO + steps
