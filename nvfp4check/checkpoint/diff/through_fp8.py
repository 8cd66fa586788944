"""Whether a passage of one side through FP8 128 x 128 explains what differs.

Contract:
    x          the original, in the interval of half gaps around a; a was made from it
    y          what FP8 makes of it: scale * nearest of E4M3 to x / scale, a tie either way; b was
               made from y, or from y rounded to bfloat16, so y lies in the interval around b, to
               half a unit of bfloat16
    scale      of a block of 128 x 128: the largest |x| / 448 in float32, or the next power of two.
               That largest |x| keeps its magnitude in y (448 is a number of E4M3), so it lies in
               both intervals of the largest elements. It is one of the bfloat16 numbers there, or
               the largest element of a itself

An element is explained under a scale if some number of E4M3 is nearest to some x of a's interval
and, times the scale, lies in b's. A block is explained if one scale explains all its elements that
are beyond the bound; a weight if every block is, all in the same direction. Half a gap of FP8
alone, a sixteenth of the value, would excuse most wrong codes beside the right one, which no scale
of the block makes together with the others. Elements within the bound are not asked: where both
intervals overlap, they are wider than the gaps of E4M3.
"""

from typing import Any

import numpy as np
import torch

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.audit.results import Way
from nvfp4check.checkpoint.audit.sources import FP8_FORMATS, Source, row_pieces
from nvfp4check.checkpoint.diff.measured import Measured
from nvfp4check.checkpoint.diff.operands import Stored, Values, within
from nvfp4check.checkpoint.naming import WeightFormat
from nvfp4check.checkpoint.scan_packed import jit
from nvfp4ref import e4m3
from nvfp4ref.formats import E4M3, FP8_BLOCK

_HEIGHT, _WIDTH = FP8_BLOCK.block_shape
_POSITIVE = np.array(e4m3.MAGNITUDES)
#: The numbers of E4M3 in order, and the middles between neighbours.
_NUMBERS = np.concatenate([-_POSITIVE[:0:-1], _POSITIVE])
_MIDDLES = (_NUMBERS[:-1] + _NUMBERS[1:]) / 2
_MAX = E4M3.max
#: Half a unit of bfloat16 over the number, at most: that of a power of two.
_BFLOAT16 = 2.0**-8
_BY_BFLOAT16 = "within rounding of one original, to bfloat16 on the way to one side"
#: Rows that are looked at before all.
_FIRST_ROWS = 4
#: Mantissa bits that float32 has and bfloat16 has not.
_DROPPED = 16


def explain_by_roundings(a: Stored, b: Stored, found: Measured) -> str | None:
    """Say what other rounding, on the way to one of both sides, explains what is beyond the bound.

    A bfloat16 side is taken through FP8 and held to the bound, or to equality; of other weights the
    original is not known, and intervals are asked.

    Raises:
        StorageError: Bytes cannot be read.
    """
    if any(found.not_finite):
        return None
    if a.operand.format in FP8_FORMATS or b.operand.format in FP8_FORMATS:
        # compressed-tensors divides by the scale in the dtype of the model, then rounds to FP8.
        return _BY_BFLOAT16 if _within_bfloat16(Values(a), Values(b)) else None
    both_nvfp4 = a.operand.format is b.operand.format is WeightFormat.NVFP4
    for this, that, name in ((a, b, "b"), (b, a, "a")):
        is_bf16 = this.operand.format is WeightFormat.BF16 and this.operand.is_whole
        if not is_bf16 or len(this.operand.shape) != 2:
            continue
        for way in (Way.FP8, Way.FP8_UE8M0):
            if _holds_through(this, that, way):
                other = "b" if name == "a" else "a"
                return f"{name} was made from {other} by way of FP8 128x128"
    if a.operand.format is b.operand.format and not both_nvfp4:
        return None  # two plain weights: any small change would be within half a gap of FP8
    sides = Values(a), Values(b)
    if _within_bfloat16(*sides):
        return _BY_BFLOAT16
    for name, direct, through in (("b", *sides), ("a", *sides[::-1])):
        if _explained(direct, through):
            return (
                f"{name} went through FP8 128x128: some scale of each block explains every element"
            )
    return None


def _holds_through(this: Stored, that: Stored, way: Way) -> bool:
    source, values = Source(this.reader, this.operand.weight, way), Values(that)
    exact = this.operand.format is that.operand.format
    for start, stop in row_pieces(this.operand.rows, this.operand.columns):
        through = source.tensor(start, stop, torch.float64).numpy()
        held, gaps = values.rows(start, stop)
        if exact and not np.array_equal(through, held):
            return False
        if not exact and not within(through, held, gaps):
            return False
    return True


def _within_bfloat16(left: Values, right: Values) -> bool:
    operand = left.stored.operand
    first = 0, min(operand.rows, _FIRST_ROWS)
    for start, stop in [first, *row_pieces(operand.rows, operand.columns)]:
        (one, gap_a), (two, gap_b) = left.rows(start, stop), right.rows(start, stop)
        # Between two intervals that do not meet, no number is larger than the larger value.
        more = _BFLOAT16 * np.maximum(np.abs(one), np.abs(two))
        if not within(one, two, gap_a + gap_b + more):
            return False
    return True


def _explained(direct: Values, through: Values) -> bool:
    rows = direct.stored.operand.rows
    for top in range(0, rows, _HEIGHT):
        bottom = min(rows, top + _HEIGHT)
        (a, gap_a), (b, gap_b) = direct.rows(top, bottom), through.rows(top, bottom)
        if not strip_is_explained(a, gap_a, b, gap_b):
            return False
    return True


@jit
def strip_is_explained(a: Any, gap_a: Any, b: Any, gap_b: Any) -> bool:
    """Whether FP8 on the way to b explains 128 rows, or fewer, of values and half gaps."""
    rows, columns = a.shape
    room = np.empty((_HEIGHT * _WIDTH, 4))
    for left in range(0, columns, _WIDTH):
        count = 0
        least = most_a = most_b = largest = 0.0
        for row in range(rows):
            for column in range(left, min(columns, left + _WIDTH)):
                one, two = a[row, column], b[row, column]
                half_a = gap_a[row, column] + bounds.ZONE * abs(one)
                half_b = gap_b[row, column] + bounds.ZONE * abs(two)
                least = max(least, abs(one) - half_a, abs(two) - half_b * (1 + _BFLOAT16))
                most_a, most_b = max(most_a, abs(one) + half_a), max(most_b, abs(two) + half_b)
                largest = max(largest, abs(one))
                if abs(one - two) > half_a + half_b:
                    room[count] = one - half_a, one + half_a, two - half_b, two + half_b
                    count += 1
        most = min(most_a, most_b * (1 + 2 * _BFLOAT16))
        if count and not _some_scale_explains(room[:count], least, most, largest):
            return False
    return True


@jit
def _some_scale_explains(elements: Any, least: float, most: float, largest: float) -> bool:
    """Whether one of the scales that a block may have explains all its elements."""
    if _explains(elements, np.float64(np.float32(largest / _MAX))):
        return True
    exponent = np.ceil(np.log2(least / _MAX)) if least > 0 else -126.0
    while 2.0 ** (exponent - 1) * _MAX <= most:
        if _explains(elements, 2.0**exponent):
            return True
        exponent += 1
    # The bfloat16 numbers from `least` to `most`.
    ends = np.array([least, most], np.float32).view(np.uint32) >> np.uint32(_DROPPED)
    for bits in range(np.int64(ends[0]), np.int64(ends[1]) + 2):
        word = np.array([bits << _DROPPED], np.uint32)
        amax = np.float64(word.view(np.float32)[0])
        if least <= amax <= most and _explains(elements, np.float64(np.float32(amax / _MAX))):
            return True
    return False


@jit
def _explains(elements: Any, scale: float) -> bool:
    if not 0 < scale < np.inf:
        return False
    for place in range(elements.shape[0]):
        from_a, to_a, from_b, to_b = elements[place] / scale
        rounded = _BFLOAT16 * max(abs(from_b), abs(to_b))
        first = max(np.searchsorted(_MIDDLES, from_a), np.searchsorted(_NUMBERS, from_b - rounded))
        last = min(
            np.searchsorted(_MIDDLES, to_a, side="right"),
            np.searchsorted(_NUMBERS, to_b + rounded, side="right") - 1,
        )
        if first > last:
            # It is asked first of the next scale.
            if place:
                for part in range(4):
                    held = elements[0, part]
                    elements[0, part] = elements[place, part]
                    elements[place, part] = held
            return False
    return True
