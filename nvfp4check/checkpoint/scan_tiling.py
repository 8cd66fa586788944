"""Evidence that stored block scales lie in 128x4 tiles, and not row-major as files must have them.

Contract:
    sums of squares are integers and exact; shares and score are quotients of them
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

#: Rows and columns of a tile: 128 words of four columns (cuBLAS, section 3.1.4.4.2).
_ROWS, _COLUMNS = 128, 4
#: Scale bytes looked at: whole stripes of 128 rows, spread over the tensor.
_SAMPLE = 1 << 15
#: Standard deviations at which tiles are believed. Under noise alone a score of 8 has a
#: probability below 1e-14, for the hundred thousand weights of a checkpoint together below 1e-9.
MIN_SCORE = 8.0
#: The tiled reading must also explain this much more of all squares: far below what any real row
#: effect leaves, far above rounding.
_MIN_GAIN = 0.01

#: Every second byte, and the lower half, of a word of four scales.
_BYTES, _HALF = np.uint32(0x00FF00FF), np.uint32(0xFFFF)


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
    sample = stripes[::step]
    total, linear_squares, tiled_squares = _squares(sample)
    if total == 0:
        return Tiling()
    structure = len(sample) * (_ROWS + columns - 2)
    noise = len(sample) * (_ROWS - 1) * (columns - 1)
    variance = (total - max(linear_squares, tiled_squares)) / noise
    gain = tiled_squares - linear_squares
    # Without any noise, nearly nothing must not decide: a trillionth of all squares is the least.
    deviation = max(variance, 1e-12 * total) * math.sqrt(4 * structure)
    return Tiling(
        score=gain / deviation,
        linear_share=linear_squares / total,
        tiled_share=tiled_squares / total,
    )


def _squares(stripes: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
    """Sums of squares about the means of stripes [n, 128, columns], times 128 * columns.

    Of all, and of what row means and column means explain, stripe by stripe: under the linear
    reading and under the tiled one. Four bytes are added at once, as two pairs of 16 bits.
    """
    columns = stripes.shape[2]
    words = stripes.view("<u4")
    even, odd = words & _BYTES, (words >> np.uint32(8)) & _BYTES
    pairs = even + odd
    fours = (pairs & _HALF) + (pairs >> np.uint32(16))
    # A tile is 128 words, one for each of its rows; in what order does not matter to sums.
    tiles = (len(stripes), columns // _COLUMNS, _ROWS)
    rows = fours.sum(axis=2, dtype=np.uint32), fours.reshape(tiles).sum(axis=1, dtype=np.uint32)
    by_column = [
        [packed.reshape(shape).sum(axis=axis, dtype=np.uint32) for packed in (even, odd)]
        for shape, axis in ((words.shape, 1), (tiles, 2))
    ]
    values = stripes.astype(np.float64).ravel()
    mean_squares = _dot(rows[0].sum(axis=1))
    total = _ROWS * columns * int(np.dot(values, values)) - mean_squares
    linear, tiled = (
        _ROWS * _dot(sums)
        + columns * sum(_dot(packed & _HALF) + _dot(packed >> np.uint32(16)) for packed in pair)
        - 2 * mean_squares
        for sums, pair in zip(rows, by_column, strict=True)
    )
    return total, linear, tiled


def _dot(sums: npt.NDArray[np.unsignedinteger]) -> int:
    """Sum of squares; all squares that arise here stay far below 2**53."""
    values = sums.astype(np.float64).ravel()
    return int(np.dot(values, values))
