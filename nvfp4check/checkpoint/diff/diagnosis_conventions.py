"""How the block scales of either side of an NVFP4 pair were chosen, from their codes.

Contract:
    largest element   scale = E4M3(amax / (6 G)): off by a sixteenth at most where E4M3 is normal,
                      so that the largest code of every block is 6: amax / (scale G) is at least
                      6 / (1 + 1/16) = 5.65, and 6 begins at 5
    four over six     all blocks of one side that have no code of 6 are under a scale that is 3/2 of
                      the other side's to two roundings of E4M3, or saturates; all of that have one
    searched          blocks of one side have no code of 6, all of the other's have: a scale larger
                      than the largest element asks for
    least scale       a block scale that stands at 2**-6 or 2**-9 where the other's is smaller

What is named is counted over all blocks; the first rows, and some of the middle, say whether there
is anything to count.
"""

from typing import Any

import numpy as np

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.audit.sources import row_pieces
from nvfp4check.checkpoint.diff.measured import Measured
from nvfp4check.checkpoint.diff.operands import Stored
from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.scan_packed import jit
from nvfp4ref.formats import E4M3

_SAMPLED_ROWS = 32
#: Places in the array of counts: blocks that are live, those without a code of 6 in a and in b,
#: four over six in a and in b, and scales at 2**-6 and at 2**-9 in a and in b.
_LIVE, _UNFILLED, _FOUR, _FLOOR, _LEAST, _COUNTS = 0, 1, 3, 5, 7, 9
#: Bytes of the smallest normal number of E4M3, and of the smallest of all.
_NORMAL, _SMALLEST = 1 << E4M3.mantissa_bits, 1
#: Byte of 448, at which a scale saturates.
_LARGEST = 0x7E
_NAN = 0x7F
#: The largest ratio of two roundings of one number to E4M3.
_TWO_ROUNDINGS = (1 + 2.0**-4) / (1 - 2.0**-4)
_SCALES = bounds.e4m3_values()
_ONES = np.uint64(0x1111111111111111)


def name_choice_of_scales(a: Stored, b: Stored, found: Measured) -> str | None:
    """Name how a and b chose their block scales, where that is what distinguishes them.

    Raises:
        StorageError: Bytes cannot be read.
    """
    one, two = (side.decode_scale(Part.GLOBAL_SCALE) for side in (a, b))
    if not one or not two or found.beyond or any(found.not_finite):
        return None
    rows = a.operand.rows
    starts = {0, rows // 2}
    sample = [(start, min(rows, start + _SAMPLED_ROWS)) for start in sorted(starts)]
    if _words(_counted(a, b, sample, two / one)) is None:
        return None
    return _words(_counted(a, b, row_pieces(rows, a.operand.columns), two / one))


def _counted(a: Stored, b: Stored, pieces: list[tuple[int, int]], ratio: float) -> list[int]:
    counts = np.zeros(_COUNTS, np.int64)
    for start, stop in pieces:
        words = [np.frombuffer(side.codes(start, stop).tobytes(), np.uint64) for side in (a, b)]
        scales = [side.scales(start, stop).reshape(-1) for side in (a, b)]
        _count(words[0], words[1], scales[0].copy(), scales[1].copy(), ratio, counts)
    return counts.tolist()


@jit
def _count(
    words_a: Any, words_b: Any, scales_a: Any, scales_b: Any, ratio: float, counts: Any
) -> None:
    for block in range(words_a.size):
        top_a, top_b = _top_of(words_a[block]), _top_of(words_b[block])
        byte_a, byte_b = scales_a[block] & _NAN, scales_b[block] & _NAN
        if top_a == 0 or top_b == 0:
            continue
        counts[_LIVE] += 1
        for side in range(2):
            own, other = (top_a, top_b) if side == 0 else (top_b, top_a)
            byte, its = (byte_a, byte_b) if side == 0 else (byte_b, byte_a)
            counts[_FLOOR + side] += byte == _NORMAL and its < _NORMAL
            counts[_LEAST + side] += byte == _SMALLEST and its == 0
            if own == 7 or byte < _NORMAL:
                continue
            counts[_UNFILLED + side] += 1
            if other == 7 and its >= _NORMAL:
                times = _SCALES[byte] / _SCALES[its] * (1 / ratio if side == 0 else ratio)
                at_least = 1.0 if byte == _LARGEST else 1.5 / _TWO_ROUNDINGS
                counts[_FOUR + side] += at_least <= times <= 1.5 * _TWO_ROUNDINGS


@jit
def _top_of(word: Any) -> int:
    """Give the largest magnitude of sixteen codes: 7, something less, or 0."""
    high, middle, low = word >> np.uint64(2), word >> np.uint64(1), word
    if high & middle & low & _ONES:
        return 7
    return 1 if (high | middle | low) & _ONES else 0


def _words(counts: list[int]) -> str | None:
    said = []
    for side, other, name in ((0, 1, "a"), (1, 0, "b")):
        if counts[_FLOOR + side]:
            said.append(
                f"{counts[_FLOOR + side]:,} block scales of {name} stand at 2**-6, the least "
                "that torchao gives"
            )
        if counts[_LEAST + side]:
            said.append(
                f"{counts[_LEAST + side]:,} block scales of {name} stand at 2**-9, the least "
                "that modelopt gives, and are 0 in the other"
            )
        unfilled, four = counts[_UNFILLED + side], counts[_FOUR + side]
        if not unfilled or counts[_UNFILLED + other]:
            continue
        if four == unfilled:
            said.append(
                f"{four:,} of {counts[_LIVE]:,} blocks of {name} are scaled to a largest code "
                "of 4: four over six"
            )
        else:
            said.append(
                f"{unfilled:,} of {counts[_LIVE]:,} blocks of {name} hold no code of 6: its "
                "scales were searched, the other's taken from the largest element"
            )
    return "; ".join(said) or None
