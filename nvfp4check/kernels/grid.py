"""Which tile a program works on.

A grid has one dimension: the others hold 65,535 programs, too few for the rows of a model's
experts stacked, and the first holds 2**31 - 1.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(across):
    """Return the tile row and the tile column of a program, row by row, of so many across."""
    return tl.program_id(0) // across, tl.program_id(0) % across
