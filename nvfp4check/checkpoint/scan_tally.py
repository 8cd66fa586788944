"""What the first sight of a weight's blocks gives: counts, and sums that are exact.

Contract:
    unit         a code is counted in halves: 0 1 2 3 4 6 8 12 and their negatives; a block scale
                 in steps of 2**-9: m where the exponent field is 0, else (8 + m) << (e - 1)
    joint        for each scale byte: blocks, sum of squared codes, sum of codes; all integers
    moments      sum of values and of squares of the whole weight as Python integers, in units of
                 2**-10 and 2**-20: nothing is rounded until the last division. A sum of 18 bits
                 times 144 for each element fits 63 bits for 2**37 elements, 64 GiB of codes
    NaN scales   counted, and left out of the moments
    -0.0         code 8 is a zero

`count_with_numpy` is the plain way; `nvfp4check.checkpoint.scan_numba` counts the same at the
speed of memory. Both give identical tallies.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

#: Magnitude of a code in halves, by its three low bits. OCP MX v1.0, table 5.
HALVES = (0, 1, 2, 3, 4, 6, 8, 12)

#: Bytes of packed codes in one block.
CODE_BYTES = 8

LOW_BITS = np.uint64(0x1111111111111111)
MAGNITUDE_BITS = np.uint64(0x7777777777777777)

_SIGNED = np.array([*HALVES, *(-half for half in HALVES)], dtype=np.int16)
_BYTE = np.arange(256)
#: By byte of packed codes: sum of its two codes, and of their squares.
_PAIR_SUM = _SIGNED[_BYTE & 15] + _SIGNED[_BYTE >> 4]
_PAIR_SQUARES = _SIGNED[_BYTE & 15] ** 2 + _SIGNED[_BYTE >> 4] ** 2

#: Blocks that the plain way takes at a time; its temporaries are some 100 bytes a block.
_PIECE = 1 << 16


def scale_steps(byte: int) -> int:
    """Return a scale byte's value in steps of 2**-9, with its sign; NaN is the caller's care."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    steps = (8 + mantissa) << (exponent - 1) if exponent else mantissa
    return -steps if byte & 0x80 else steps


def is_nan_scale(byte: int) -> bool:
    """Say whether a scale byte is one of E4M3's two NaNs."""
    return byte & 0x7F == 0x7F


#: By scale byte: 16 elements, or none of a NaN's; steps; squared steps in two parts of 18 bits.
_ELEMENTS = np.array([0 if is_nan_scale(byte) else 16 for byte in range(256)])
_STEPS = np.array([0 if is_nan_scale(byte) else scale_steps(byte) for byte in range(256)])
_PART = 18
_HIGH_SQUARES, _LOW_SQUARES = _STEPS**2 >> _PART, _STEPS**2 & ((1 << _PART) - 1)


@dataclass(slots=True)
class Tally:
    """Counts of the blocks seen so far."""

    #: How often each code from 0 to 15 stands there.
    codes: Counts = field(default_factory=lambda: np.zeros(16, np.int64))
    #: [256, 3] by scale byte: blocks, sum of squared codes, sum of codes.
    joint: Counts = field(default_factory=lambda: np.zeros((256, 3), np.int64))
    #: Whether some block has codes other than zero and none of them is +-6.
    has_unfilled: bool = False

    def moments(self) -> tuple[int, int, int]:
        """Return elements, sum of values in 2**-10, sum of squares in 2**-20."""
        blocks, squares, sums = self.joint.T
        high, low = int(_HIGH_SQUARES @ squares), int(_LOW_SQUARES @ squares)
        return int(_ELEMENTS @ blocks), int(_STEPS @ sums), (high << _PART) + low


#: Adds the blocks of packed codes [8 * n] and scale bytes [n] to a tally.
Counter = Callable[[Bytes, Bytes, Tally], None]


def words_of(codes: Bytes) -> npt.NDArray[np.uint64]:
    """View packed codes as one 64-bit word a block, the first code in the lowest nibble."""
    return codes.view("<u8")


def sixes_of(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return a word with bit 4i set where code i is +6 or -6."""
    sixes: npt.NDArray[np.uint64] = words & (words >> np.uint64(1)) & (words >> np.uint64(2))
    return sixes & LOW_BITS


def count_with_numpy(codes: Bytes, scales: Bytes, tally: Tally) -> None:
    """Add blocks to a tally, by byte tables."""
    for start in range(0, scales.size, _PIECE):
        piece = scales[start : start + _PIECE]
        packed = codes[CODE_BYTES * start : CODE_BYTES * (start + piece.size)]
        pairs = np.bincount(packed, minlength=256).reshape(16, 16)
        tally.codes += pairs.sum(axis=0) + pairs.sum(axis=1)
        rows = packed.reshape(-1, CODE_BYTES)
        squares = _PAIR_SQUARES[rows].sum(axis=1, dtype=np.int64)
        sums = _PAIR_SUM[rows].sum(axis=1, dtype=np.int64)
        # bincount adds in float64: exact, for a piece's sums stay below 2**53.
        for column, weights in enumerate((None, squares, sums)):
            counted = np.bincount(piece, weights=weights, minlength=256)
            tally.joint[:, column] += counted.astype(np.int64)
        words = words_of(packed)
        unfilled = (sixes_of(words) == 0) & (words & MAGNITUDE_BITS != 0)
        tally.has_unfilled |= bool(unfilled.any())
