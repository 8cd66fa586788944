"""Any two weights of one shape compared by their values, in float64.

Contract:
    equal   exact: see `operands`. Two NaN are equal, and so are 0 and -0
    beyond  |a - b| above the sum of both half gaps and the producers' float32 roundings
    ulp     steps from number to number of the stored dtype, where both sides have the same: -0 and
            0 are one place; of FP8 bytes likewise
"""

from collections.abc import Callable

import numpy as np

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.audit.sources import FP8_FORMATS
from nvfp4check.checkpoint.diff.measured import Array, Measured, add_histogram, by_powers
from nvfp4check.checkpoint.diff.operands import Stored, Values
from nvfp4check.checkpoint.diff.results import Worst
from nvfp4check.checkpoint.scan_packed import jit

#: Elements compared at a time.
_PIECE = 1 << 18


def compare_values(a: Stored, b: Stored, *, columns: bool = False) -> Measured:
    """Compare two weights of one shape; with `columns`, also sum energies by column.

    Raises:
        StorageError: Bytes cannot be read.
    """
    found = Measured()
    values = Values(a), Values(b)
    rows, width = a.operand.rows, a.operand.columns
    ordinals = _ordinals_of(a, b)
    if columns:
        found.columns = np.zeros(width), np.zeros(width)
    step = max(1, _PIECE // max(1, width))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        (left, gap_a), (right, gap_b) = (side.rows(start, stop) for side in values)
        _piece(left, right, gap_a + gap_b, start, found)
        if ordinals is not None:
            _steps(ordinals(a, start, stop), ordinals(b, start, stop), found)
        if found.columns is not None:
            finite = np.isfinite(left) & np.isfinite(right)
            energy = np.where(finite, left, 0.0) ** 2
            noise = np.where(finite, left - right, 0.0) ** 2
            found.columns[0][:] += energy.sum(axis=0)
            found.columns[1][:] += noise.sum(axis=0)
    return found


def _piece(left: Array, right: Array, gaps: Array, start: int, found: Measured) -> None:
    sums, counts = np.zeros(4), np.zeros(4, np.int64)
    place = _measure(
        left.reshape(-1), right.reshape(-1), gaps.reshape(-1), bounds.ZONE, sums, counts
    )
    found.energy_a += float(sums[0])
    found.energy_b += float(sums[1])
    found.energy_difference += float(sums[2])
    found.beyond += int(counts[0])
    found.equal = found.equal and not counts[1]
    found.not_finite[0] += int(counts[2])
    found.not_finite[1] += int(counts[3])
    if place >= 0 and sums[3] > found.max_abs:
        row, column = divmod(int(place), left.shape[1])
        found.max_abs = float(sums[3])
        found.worst = Worst(
            row=start + row,
            column=column,
            a=float(left[row, column]),
            b=float(right[row, column]),
        )


@jit
def _measure(
    left: Array, right: Array, gaps: Array, zone: float, sums: Array, counts: Array
) -> int:
    """Measure a piece; return the place of the largest difference, -1 where there is none."""
    place = -1
    largest = 0.0
    energy_a = energy_b = energy = 0.0
    beyond = unequal = infinite_a = infinite_b = 0
    for i in range(left.size):
        one, two = left[i], right[i]
        difference = one - two
        if np.isfinite(one) and np.isfinite(two):
            distance = abs(difference)
            energy_a += one * one
            energy_b += two * two
            energy += difference * difference
            if distance > 0.0:
                unequal += 1
                if distance > gaps[i] + zone * (abs(one) + abs(two)):
                    beyond += 1
                if distance > largest:
                    largest = distance
                    place = i
        else:
            infinite_a += not np.isfinite(one)
            infinite_b += not np.isfinite(two)
            if not (one == two or (one != one and two != two)):
                unequal += 1
                beyond += 1
    sums[0], sums[1], sums[2], sums[3] = energy_a, energy_b, energy, largest
    counts[0], counts[1], counts[2], counts[3] = beyond, unequal, infinite_a, infinite_b
    return place


def _ordinals_of(a: Stored, b: Stored) -> Callable[[Stored, int, int], Array] | None:
    """Choose how elements are put in order, or None where the sides have different dtypes."""
    if a.operand.format is not b.operand.format:
        return None
    if a.operand.format in FP8_FORMATS:
        return _fp8_ordinals
    if a.operand.plain is None or b.operand.plain is None:
        return None
    return _plain_ordinals if a.operand.plain.dtype == b.operand.plain.dtype else None


def _plain_ordinals(side: Stored, start: int, stop: int) -> Array:
    words, _ = side.numbers(start, stop)
    return ordinals(words)


def _fp8_ordinals(side: Stored, start: int, stop: int) -> Array:
    return ordinals(side.codes(start, stop))


def ordinals(words: Array) -> Array:
    """Number the bit patterns of a sign-magnitude format in the order of their values."""
    bits = 8 * words.itemsize
    mask = (1 << (bits - 1)) - 1
    size = (words & words.dtype.type(mask)).astype(np.int64)
    negative = (words >> words.dtype.type(bits - 1)) != 0
    return np.asarray(np.where(negative, -size, size))


def _steps(left: Array, right: Array, found: Measured) -> None:
    # In float64 the distance of two 64-bit ordinals cannot overflow.
    steps = np.abs(left - right) if left.itemsize < 8 else np.abs(left.astype(np.float64) - right)
    add_histogram(found.ulp_histogram, by_powers(steps))
    found.max_ulp = max(found.max_ulp or 0, int(steps.max(initial=0)))
    if found.changed_codes is None:
        found.changed_codes = 0
    found.changed_codes += int(np.count_nonzero(left != right))
