"""Two NVFP4 weights compared, at the speed of memory.

Contract:
    sums       exact. n a code times its block scale in units of 2**-10, an integer, the values are
               n G / 1024 with G the global scale or its reciprocal, a rational number. What is
               divided and rounded to float64 is G_a**2 S_aa, and with it the energy of a - b,
               G_a**2 S_aa - 2 G_a G_b S_ab + G_b**2 S_bb: it cannot cancel
    equal      exact: that energy is 0, and both sides are NaN in the same places
    NaN        elements under a NaN scale are counted and left out of every sum
    max_ulp    steps on the coarser grid of both blocks (`scale_pairs`). None under a global scale
               that is not a number: there is no grid
"""

import math
from fractions import Fraction

import numpy as np

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.diff.kernel import (
    VOID_A,
    VOID_B,
    VOID_IN_ONE,
    Found,
    compare_blocks,
)
from nvfp4check.checkpoint.diff.kernel_steps import BEYOND, FIRST_STEP, MOST_STEPS, STEPS
from nvfp4check.checkpoint.diff.kernel_sums import CHANGED, CHANGED_SCALES, EMPTY_A, EMPTY_B
from nvfp4check.checkpoint.diff.measured import Measured
from nvfp4check.checkpoint.diff.operands import Stored
from nvfp4check.checkpoint.diff.results import Worst
from nvfp4check.checkpoint.diff.scale_pairs import scale_pairs
from nvfp4check.checkpoint.naming import Part
from nvfp4ref.formats import BLOCK_SIZE

#: Blocks compared at a time: 1 MiB of codes on either side.
_PIECE = 1 << 17
#: What n counts.
_UNIT = Fraction(1, 1024)


def compare_nvfp4(a: Stored, b: Stored) -> Measured:
    """Compare two weights of one shape.

    Raises:
        StorageError: Bytes cannot be read.
    """
    scales = [_exact_scale(side) for side in (a, b)]
    found = Found()
    pairs = scale_pairs(*_factors(scales))
    rows, row_blocks = a.operand.rows, a.operand.columns // BLOCK_SIZE
    step = max(1, _PIECE // max(1, row_blocks))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        codes = [side.codes(start, stop).reshape(-1) for side in (a, b)]
        block_scales = [side.scales(start, stop).reshape(-1) for side in (a, b)]
        compare_blocks(codes, block_scales, start * row_blocks, pairs, found)
    measured = _measured(found)
    if scales[0] is None or scales[1] is None:
        measured.equal = False
        measured.beyond = max(measured.beyond, 1)
        measured.max_ulp = None
        return measured
    _energies(found, scales[0] * _UNIT, scales[1] * _UNIT, measured)
    measured.equal = measured.equal and measured.energy_difference == 0
    if found.largest[0]:
        _worst(a, b, int(found.block[0]), [scales[0], scales[1]], measured)
    return measured


def _exact_scale(side: Stored) -> Fraction | None:
    """Give the global scale that multiplies; None where it is not a number."""
    stored = side.scalar(Part.GLOBAL_SCALE)
    if stored is None or not math.isfinite(stored):
        return None
    if not side.operand.weight.global_scale_is_reciprocal:
        return Fraction(stored)
    return 1 / Fraction(stored) if stored else None


def _factors(scales: list[Fraction | None]) -> list[float]:
    """Give float64 numbers that are to one another as the scales are, the larger of them near 1."""
    largest = max((abs(scale) for scale in scales if scale is not None), default=0)
    unit = Fraction(2) ** math.frexp(float(largest))[1] if largest else Fraction(1)
    return [float(scale / unit) if scale is not None else 0.0 for scale in scales]


def _measured(found: Found) -> Measured:
    counts = [int(count) for count in found.counts]
    measured = Measured(changed_codes=counts[CHANGED], changed_scales=counts[CHANGED_SCALES])
    measured.equal = counts[VOID_IN_ONE] == 0
    measured.not_finite = [counts[VOID_A] * BLOCK_SIZE, counts[VOID_B] * BLOCK_SIZE]
    measured.beyond = counts[BEYOND]
    measured.empty_blocks = counts[EMPTY_A], counts[EMPTY_B]
    at_least = [*counts[FIRST_STEP : FIRST_STEP + len(STEPS)], 0]
    measured.max_ulp = max(counts[MOST_STEPS], min(1, at_least[0]))
    for place, step in enumerate(STEPS):
        count = at_least[place] - at_least[place + 1]
        if count:
            measured.ulp_histogram[str(step)] = count
    return measured


def _energies(found: Found, unit_a: Fraction, unit_b: Fraction, measured: Measured) -> None:
    of_a, mixed, of_b = (found.total(place) for place in range(3))
    energy_a, energy_b = unit_a**2 * of_a, unit_b**2 * of_b
    measured.energy_a, measured.energy_b = float(energy_a), float(energy_b)
    measured.energy_difference = float(energy_a - 2 * unit_a * unit_b * mixed + energy_b)


def _worst(a: Stored, b: Stored, block: int, scales: list[Fraction], measured: Measured) -> None:
    """Look up the element of a block that differs most, the first one."""
    row, column = divmod(block, a.operand.columns // BLOCK_SIZE)
    first = column * BLOCK_SIZE
    values = []
    for side, scale in zip((a, b), scales, strict=True):
        packed = side.codes(row, row + 1)[0, first // 2 : (first + BLOCK_SIZE) // 2]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)
        held = bounds.nvfp4_units()[side.scales(row, row + 1)[0, column], codes]
        values.append(held * float(scale))
    distances = np.abs(values[0] - values[1])
    place = int(distances.argmax())
    measured.max_abs = float(distances[place])
    one, two = (float(side[place]) for side in values)
    measured.worst = Worst(row=row, column=first + place, a=one, b=two)
