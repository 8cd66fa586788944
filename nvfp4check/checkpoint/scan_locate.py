"""Where in a weight the defective blocks are: gone through only where the counts say there are any.

Contract:
    live        some code is not a zero (code 8, -0.0, is a zero)
    full        every code is +-6
    nan         scale byte 0x7F or 0xFF
    negative    any other scale byte with the sign bit
    lost        scale byte 0x00 over a live block that is not full
    underflowed scale byte 0x00 over a full block
    underfilled scale byte 0x09 to 0x7E over a live block without a +-6. 2**-6 (0x08) is left out,
                for a quantiser that clamps its scales there (torchao) underfills blocks rightly,
                and subnormal scales round too coarsely to fill theirs
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.ahead import RangedBytes
from nvfp4check.checkpoint.scan_tally import (
    CODE_BYTES,
    LOW_BITS,
    MAGNITUDE_BITS,
    Bytes,
    sixes_of,
    words_of,
)

_PIECE = 1 << 16
_FIRST_FILLED, _LARGEST = 0x09, 0x7E


@dataclass(frozen=True, slots=True)
class Spot:
    """How many blocks have a defect, and which of them, counted from 0, is the first."""

    count: int = 0
    first: int | None = None


@dataclass(frozen=True, slots=True)
class BlockDefects:
    """The defects of a weight's blocks."""

    nan: Spot = Spot()
    negative: Spot = Spot()
    lost: Spot = Spot()
    underflowed: Spot = Spot()
    underfilled: Spot = Spot()


def locate(codes: Bytes | RangedBytes, scales: Bytes) -> BlockDefects:
    """Count and find the defective blocks of packed codes [8 * n] and scale bytes [n]."""
    found = BlockDefects()
    for start in range(0, scales.size, _PIECE):
        piece = scales[start : start + _PIECE]
        words = words_of(codes[CODE_BYTES * start : CODE_BYTES * (start + piece.size)])
        sixes = sixes_of(words)
        live = words & MAGNITUDE_BITS != 0
        full = sixes == LOW_BITS
        nan = piece & 0x7F == 0x7F
        masks = {
            "nan": nan,
            "negative": (piece >= 0x80) & ~nan,
            "lost": (piece == 0) & live & ~full,
            "underflowed": (piece == 0) & full,
            "underfilled": live & (sixes == 0) & (piece >= _FIRST_FILLED) & (piece <= _LARGEST),
        }
        changes = {
            name: _grown(getattr(found, name), mask, start)
            for name, mask in masks.items()
            if mask.any()
        }
        found = replace(found, **changes)
    return found


def _grown(spot: Spot, mask: npt.NDArray[np.bool_], start: int) -> Spot:
    first = spot.first if spot.first is not None else start + int(mask.argmax())
    return Spot(spot.count + int(mask.sum()), first)
