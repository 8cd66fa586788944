"""Two NVFP4 weights held against each other in bytes, chunk by chunk.

Contract:
    sums, listed blocks   `kernel_sums`
    steps, bound          `kernel_steps`
    largest               |a - b| in float64, and its block, the first one that reaches it. Only
                          blocks are looked at that may hold more than the largest so far
    void                  blocks under a scale that is NaN on either side are in no sum and have no
                          steps; their elements are beyond the bound where one side alone is NaN

A chunk is gone through while it is in the first-level cache: once for the sums, where its codes are
laid out a byte each, once for the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvfp4check.checkpoint.audit.sources import frozen
from nvfp4check.checkpoint.diff.kernel_steps import BEYOND, FIRST_STEP, STEPS, count_steps
from nvfp4check.checkpoint.diff.kernel_sums import (
    CHANGED,
    CHANGED_SCALES,
    EMPTY_A,
    EMPTY_B,
    GROUPS,
    PART,
    ROUNDINGS,
    SUMS,
    add_up,
    largest_of,
)
from nvfp4check.checkpoint.diff.measured import Array
from nvfp4check.checkpoint.diff.scale_pairs import ScalePairs, aligned, make_entry
from nvfp4check.checkpoint.diff.vectors import GROUP
from nvfp4check.checkpoint.scan_packed import jit
from nvfp4check.checkpoint.scan_tally import CODE_BYTES, scale_steps
from nvfp4ref.formats import BLOCK_SIZE, E4M3

#: Places in the array of counts, after the others: blocks under a scale that is NaN, of a, of b,
#: and those where the other side's is not.
VOID_A, VOID_B, VOID_IN_ONE = (FIRST_STEP + len(STEPS) + place for place in range(3))
COUNTS = VOID_IN_ONE + 1

#: Blocks of a chunk.
CHUNK = GROUPS * GROUP
_NAN = 0x7F
#: Half of a scale's step: what n counts.
_UNIT = E4M3.smallest_subnormal / 2
_STEPS_OF_BYTES = np.array([scale_steps(byte) for byte in range(256)], np.float64)


@dataclass(frozen=True, slots=True)
class Found:
    """What was counted so far. `largest` and `block` hold one number each."""

    sums: Array = field(default_factory=lambda: np.zeros(2 * SUMS, np.int64))
    counts: Array = field(default_factory=lambda: np.zeros(COUNTS, np.int64))
    largest: Array = field(default_factory=lambda: np.zeros(1))
    block: Array = field(default_factory=lambda: np.zeros(1, np.int64))

    def total(self, place: int) -> int:
        """Give one of the sums: of n_a**2, n_a n_b, n_b**2."""
        high, low = self.sums[2 * place : 2 * place + 2]
        return (int(high) << PART) + int(low)


def compare_blocks(
    codes: Sequence[Array], scales: Sequence[Array], first: int, pairs: ScalePairs, found: Found
) -> None:
    """Compare blocks of flat packed codes and scale bytes, the first of which is number `first`."""
    size, begin = scales[0].size, 0
    flat = [frozen(side) for both in zip(codes, scales, strict=True) for side in both]
    held = found.sums, found.counts, found.largest, found.block
    while begin < size:
        begin += _take_chunks(*flat, begin, first, pairs, *held)
        if begin < size:
            stop = min(begin + CHUNK, size)
            cut = [side[CODE_BYTES * begin : CODE_BYTES * stop] for side in codes]
            under = [side[begin:stop] for side in scales]
            mended = _without_void(cut, under, found.counts)
            _take_chunks(*mended, 0, first + begin, pairs, *held)
            begin = stop


def _without_void(codes: list[Array], scales: list[Array], counts: Array) -> list[Array]:
    """Copy blocks with zeros for the void ones, which are counted, and for what a group lacks.

    Zeros are equal and add nothing but blocks of zeros.
    """
    void_a, void_b = (side & _NAN == _NAN for side in scales)
    void = void_a | void_b
    for place, mask in ((VOID_A, void_a), (VOID_B, void_b), (VOID_IN_ONE, void_a != void_b)):
        counts[place] += np.count_nonzero(mask)
    counts[BEYOND] += BLOCK_SIZE * np.count_nonzero(void_a != void_b)
    counts[CHANGED_SCALES] += np.count_nonzero(scales[0][void] != scales[1][void])
    lost = [side.reshape(-1, CODE_BYTES)[void] for side in codes]
    unequal = lost[0] ^ lost[1]
    counts[CHANGED] += np.count_nonzero(unequal & 15) + np.count_nonzero(unequal >> 4)
    lacking = -scales[0].size % GROUP
    made = []
    for place, empty in enumerate((EMPTY_A, EMPTY_B)):
        counts[empty] -= np.count_nonzero((lost[place] & 0x77).any(axis=1)) + lacking
        kept = np.where(void[:, None], 0, codes[place].reshape(-1, CODE_BYTES)).reshape(-1)
        under = np.where(void, 0, scales[place])
        for side, more in ((kept, CODE_BYTES * lacking), (under, lacking)):
            made.append(frozen(np.pad(side, (0, more)).astype(np.uint8)))
    return made


@jit
def _take_chunks(
    codes_a: Any,
    scales_a: Any,
    codes_b: Any,
    scales_b: Any,
    begin: int,
    first: int,
    pairs: ScalePairs,
    sums: Any,
    counts: Any,
    largest: Any,
    place: Any,
) -> int:
    """Take chunks of whole groups from block `begin` on, up to one where a scale is NaN.

    Returned is how many blocks were taken.
    """
    lanes = aligned(2 * CHUNK * BLOCK_SIZE)
    lanes_a, lanes_b = lanes[: CHUNK * BLOCK_SIZE], lanes[CHUNK * BLOCK_SIZE :]
    listed, unequal = np.empty(CHUNK + 1, np.int64), np.empty(GROUPS, np.int64)
    factor_a, factor_b = pairs.factors[0] * _UNIT, pairs.factors[1] * _UNIT
    apart = factor_b - factor_a
    start = begin
    while True:
        groups = min(CHUNK, scales_a.size - start) // GROUP
        end = 0
        if groups:
            end = add_up(
                codes_a,
                scales_a,
                codes_b,
                scales_b,
                _STEPS_OF_BYTES,
                lanes_a,
                lanes_b,
                unequal,
                listed,
                sums,
                counts,
                start,
                groups,
                factor_a * factor_a * ROUNDINGS,
                apart * apart * ROUNDINGS,
                2.0 * factor_a * apart,
                largest[0] * largest[0],
            )
        if groups == 0 or end < 0:
            return start - begin
        for index in range(end):
            block = listed[index]
            scale_a = pairs.scales[0, scales_a[block]] / 2
            scale_b = pairs.scales[1, scales_b[block]] / 2
            distance = largest_of(codes_a, codes_b, block, scale_a, scale_b)
            if distance > largest[0]:
                largest[0] = distance
                place[0] = first + block
        group = 0
        while group < groups:
            group = count_steps(
                lanes_a,
                lanes_b,
                scales_a,
                scales_b,
                pairs.is_made,
                pairs.entries,
                counts,
                unequal,
                start,
                group,
                groups,
                1 if apart == 0.0 else 0,
            )
            if group < groups:
                for block in range(start + group * GROUP, start + (group + 1) * GROUP):
                    make_entry(pairs, scales_a[block], scales_b[block])
        start += groups * GROUP
