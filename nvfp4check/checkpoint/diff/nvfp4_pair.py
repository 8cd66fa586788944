"""Two NVFP4 weights compared, at the speed of memory.

Contract:
    equal      exact. n a code times its block scale in units of 2**-10, at most 2**22 in
               magnitude, the values are n G / 1024 with G the global scale or its reciprocal, a
               rational number. With G_a / G_b = p / q in lowest terms they are equal exactly if
               p n_a = q n_b; where p or q exceeds 2**22 only zeros are
    sums       `kernel`; its tables are scaled by a power of two, so that no square of a float32
               leaves the range while both global scales are within 2**60 of one another
    NaN        elements under a NaN scale are counted and left out of every sum
"""

import math
from fractions import Fraction
from functools import cache

import numpy as np

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.audit.sources import frozen
from nvfp4check.checkpoint.diff.kernel import (
    BEYOND,
    CHANGED,
    COUNTS,
    EMPTY_A,
    EMPTY_B,
    FIRST_STEP,
    STEPS,
    SUMS,
    compare_rows,
    same_products,
)
from nvfp4check.checkpoint.diff.measured import Array, Measured
from nvfp4check.checkpoint.diff.operands import Stored, Values
from nvfp4check.checkpoint.diff.results import Worst
from nvfp4check.checkpoint.naming import Part
from nvfp4ref.formats import BLOCK_SIZE

#: Blocks compared at a time: 1 MiB of codes on either side.
_PIECE = 1 << 17
_NAN = 1 << 40
_LARGEST = 1 << 22


def compare_nvfp4(a: Stored, b: Stored) -> Measured:
    """Compare two weights of one shape.

    Raises:
        StorageError: Bytes cannot be read.
    """
    found = Measured(changed_scales=0)
    scale_a, scale_b = (side.decode_scale(Part.GLOBAL_SCALE) for side in (a, b))
    tables, unit = _tables(scale_a, scale_b)
    sums, counts = np.zeros(SUMS), np.zeros(COUNTS, np.int64)
    rows, row_blocks = a.operand.rows, a.operand.columns // BLOCK_SIZE
    largest = np.zeros(rows, np.float32)
    exact = _Exact(a, b)
    step = max(1, _PIECE // max(1, row_blocks))
    changed_scales = 0
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        codes = [frozen(side.codes(start, stop).reshape(-1)) for side in (a, b)]
        scales = [frozen(side.scales(start, stop).reshape(-1)) for side in (a, b)]
        compare_rows(
            codes[0],
            scales[0],
            codes[1],
            scales[1],
            tables,
            row_blocks,
            sums,
            counts,
            largest[start:stop],
        )
        changed_scales += int(np.count_nonzero(scales[0] != scales[1]))
        for place in (0, 1):
            void = int(np.count_nonzero((scales[place] & 0x7F) == 0x7F))
            found.not_finite[place] += void * BLOCK_SIZE
        if exact.holds and not largest[start:stop].any():
            exact.look(codes, scales)
        elif largest[start:stop].any():
            exact.holds = False
    found.energy_a, found.energy_b, found.energy_difference = (
        float(total) * unit * unit for total in sums
    )
    found.changed_codes, found.changed_scales = int(counts[CHANGED]), changed_scales
    found.beyond = int(counts[BEYOND])
    found.empty_blocks = int(counts[EMPTY_A]), int(counts[EMPTY_B])
    found.equal = exact.holds
    _steps(counts, found)
    if scale_a is None or scale_b is None or not (_is_sound(scale_a) and _is_sound(scale_b)):
        found.equal = False
        found.beyond = max(found.beyond, 1)
    elif largest.any():
        _worst(a, b, int(largest.argmax()), found)
    return found


def _is_sound(scale: float) -> bool:
    return math.isfinite(scale)


def _tables(scale_a: float | None, scale_b: float | None) -> tuple[Array, float]:
    """Make the kernel's tables, and the unit that they are in."""
    scales = [
        scale if scale is not None and _is_sound(scale) else 0.0 for scale in (scale_a, scale_b)
    ]
    largest = max(abs(scale) for scale in scales)
    unit = math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0
    units = bounds.nvfp4_units()
    values = [np.nan_to_num(units * (scale / unit), nan=0.0) for scale in scales]
    gaps = []
    for scale, held in zip(scales, values, strict=True):
        gap = np.nan_to_num(bounds.nvfp4_half_gaps(scale / unit), nan=0.0)
        gaps.append(gap + np.abs(held) * bounds.ZONE)
    return np.stack([*values, *gaps]).astype(np.float32), unit


@cache
def _products() -> Array:
    """Return code times block scale in units of 2**-10, `_NAN` under a scale that is NaN."""
    units = bounds.nvfp4_units() * 1024
    return np.where(np.isnan(units), _NAN, np.nan_to_num(units)).astype(np.int64)


class _Exact:
    """Whether the values are equal, in exact integers."""

    def __init__(self, a: Stored, b: Stored) -> None:
        ratios = []
        for side in (a, b):
            stored = side.scalar(Part.GLOBAL_SCALE)
            sound = stored is not None and math.isfinite(stored) and stored != 0
            value = Fraction(stored) if sound and stored is not None else None
            reciprocal = side.operand.weight.global_scale_is_reciprocal
            ratios.append(1 / value if value is not None and reciprocal else value)
        left, right = ratios
        self.holds = left is not None and right is not None
        ratio = left / right if left is not None and right is not None else Fraction(1)
        # Out of reach of any product: only zeros are equal then.
        fits = abs(ratio.numerator) <= _LARGEST and ratio.denominator <= _LARGEST
        self.p, self.q = (ratio.numerator, ratio.denominator) if fits else (_LARGEST * 2 + 1, 1)
        self.products = _products()

    def look(self, codes: list[Array], scales: list[Array]) -> None:
        """Compare a piece."""
        self.holds = bool(
            same_products(codes[0], scales[0], codes[1], scales[1], self.products, self.p, self.q)
        )


def _steps(counts: Array, found: Measured) -> None:
    at_least = [*(int(count) for count in counts[FIRST_STEP:]), 0]
    for place, step in enumerate(STEPS):
        count = at_least[place] - at_least[place + 1]
        if count:
            found.ulp_histogram[str(step)] = count


def _worst(a: Stored, b: Stored, row: int, found: Measured) -> None:
    """Find the element of a row that differs most, and the steps between its codes."""
    (left, _), (right, _) = (Values(side).rows(row, row + 1) for side in (a, b))
    distance = np.nan_to_num(np.abs(left[0] - right[0]), nan=0.0, posinf=0.0)
    column = int(distance.argmax())
    found.max_abs = float(distance[column])
    found.worst = Worst(row=row, column=column, a=float(left[0, column]), b=float(right[0, column]))
