"""Evidence that stored block scales lie in 128x4 tiles, and not row-major as files must have them.

Contract:
    model     a scale's byte (near its logarithm) is a row effect plus a column effect plus noise
    reading   the bytes as they lie, against the same bytes taken out of 128x4 tiles
    score     what row and column means explain under the tiled reading, less what they explain
              under the linear one, in standard deviations of that difference under pure noise:
              each explains a sum of squares of variance 2 * noise**2 a degree of freedom

Row-major scales explain at least as much as they lie, for tiles mix rows. Scales that are pure
noise (random weights) read alike both ways, and a matrix of four columns has its rows permuted
and nothing else: then the score is small and nothing is concluded.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Rows and columns of a tile, and rows of its inner groups (cuBLAS, section 3.1.4.4.2).
_ROWS, _COLUMNS, _GROUP = 128, 4, 32
#: Scale bytes looked at: whole stripes of 128 rows, spread over the tensor.
_SAMPLE = 1 << 15
#: Standard deviations at which tiles are believed. Under noise alone a score of 8 has a
#: probability below 1e-14, for the hundred thousand weights of a checkpoint together below 1e-9.
MIN_SCORE = 8.0
#: The tiled reading must also explain this much more of all squares: far below what any real row
#: effect leaves, far above rounding.
_MIN_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class Tiling:
    """How much better the scales read as tiles than as rows; None where it cannot be told."""

    score: float | None = None
    linear_share: float | None = None
    tiled_share: float | None = None

    @property
    def is_tiled(self) -> bool:
        """Whether the bytes look tiled beyond doubt."""
        if self.score is None or self.tiled_share is None or self.linear_share is None:
            return False
        return self.score >= MIN_SCORE and self.tiled_share - self.linear_share >= _MIN_GAIN


def tiling_of(scales: npt.NDArray[np.uint8]) -> Tiling:
    """Weigh the two readings of block scales [rows, columns].

    Scales that do not fill whole tiles have another shape when tiled: a rule on shapes sees them.
    """
    rows, columns = scales.shape
    if not rows or rows % _ROWS or columns % _COLUMNS or columns == _COLUMNS:
        return Tiling()
    stripes = scales.reshape(-1, _ROWS, columns)
    wanted = max(1, _SAMPLE // (_ROWS * columns))
    step = -(-len(stripes) // wanted)
    linear = stripes[::step].astype(np.float64)
    # Tile, row within a group of 32, group, column: back to [128, columns].
    tiles = linear.reshape(-1, columns // _COLUMNS, _GROUP, _ROWS // _GROUP, _COLUMNS)
    tiled = tiles.transpose(0, 3, 2, 1, 4).reshape(linear.shape)
    centred = linear - linear.mean(axis=(1, 2), keepdims=True)
    everything = float((centred**2).sum())
    if everything == 0.0:
        return Tiling()
    linear_squares, tiled_squares = _explained(linear), _explained(tiled)
    structure = len(linear) * (_ROWS + columns - 2)
    noise = len(linear) * (_ROWS - 1) * (columns - 1)
    variance = (everything - max(linear_squares, tiled_squares)) / noise
    gain = tiled_squares - linear_squares
    # Without any noise, rounding errors must not decide: a trillionth of all squares is the least.
    deviation = max(variance, 1e-12 * everything) * math.sqrt(4 * structure)
    return Tiling(
        score=gain / deviation,
        linear_share=linear_squares / everything,
        tiled_share=tiled_squares / everything,
    )


def _explained(scales: npt.NDArray[np.float64]) -> float:
    """Sum of squares that row means and column means explain, stripe by stripe."""
    mean = scales.mean(axis=(1, 2), keepdims=True)
    by_row = (scales.mean(axis=2, keepdims=True) - mean) ** 2
    by_column = (scales.mean(axis=1, keepdims=True) - mean) ** 2
    squares = by_row.sum() * scales.shape[2] + by_column.sum() * scales.shape[1]
    return float(squares)
