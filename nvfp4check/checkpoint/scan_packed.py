"""Three counts of a block in one number, and the tables by scale byte to which numbers are added.

Contract:
    number    from bit 0: a count of squares, at most 16 * 144 for a block; from `SUM_SHIFT`: sum
              of codes in halves, made positive by `BIAS` for each; from `COUNT_SHIFT`: the block
    tables    `FLUSH` blocks, an equal share for each table, overflow no field
"""

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np

from nvfp4check.checkpoint.scan_tally import HALVES

SUM_SHIFT = 26
COUNT_SHIFT = 49
#: Numbers are added to eight tables in turn: a scale byte that comes twice in a row does not wait
#: for its own store.
TABLES = 8
#: Numbers from one table to the next. The processor takes addresses 4 KiB apart for the same when
#: it orders loads after stores; so the tables begin at eight places evenly spread over 4 KiB.
TABLE_PITCH = 256 + 64
FLUSH = TABLES << 14
BIAS = max(HALVES)
#: Codes in halves, and made positive.
SIGNED = [*HALVES, *(-half for half in HALVES)]
BIASED = [BIAS + half for half in SIGNED]

_U = np.uint64


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the machine code on disk where there is a place for it."""
    try:
        made = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no writable cache directory
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return cast("Callable[..., Any]", made)


@jit
def flush(tables: Any, joint: Any) -> None:
    """Add tables [8, pitch] to counts [256, 3] of blocks, squares and sums; clear them."""
    for table in range(TABLES):
        for byte in range(256):
            number = tables[table, byte]
            blocks = np.int64(number >> _U(COUNT_SHIFT))
            total = np.int64((number >> _U(SUM_SHIFT)) & _U((1 << 23) - 1))
            joint[byte, 0] += blocks
            joint[byte, 1] += np.int64(number & _U((1 << SUM_SHIFT) - 1))
            joint[byte, 2] += total - blocks * 16 * BIAS
            tables[table, byte] = _U(0)
