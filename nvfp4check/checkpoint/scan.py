"""The byte pass: every code and every scale byte of an NVFP4 weight, read once and counted.

Contract:
    counts, sums and positions are exact; `sd` is the one rounded square root of an exact ratio
    values   code * block scale * global scale, without the rounding of the product; blocks
             whose scale is NaN are left out of `mean`, `rms` and `sd` and counted by themselves

Mapped memory is read in pieces of a few MiB, never copied, and codes that come over a network in
pieces of that size too, one in memory at a time; a second look at a weight is taken
only where the first one saw a defect.
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, Self

import numpy as np

from nvfp4check.checkpoint.ahead import FileRange, RangedBytes, pieces_of
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.scan_locate import BlockDefects, Spot, locate
from nvfp4check.checkpoint.scan_tally import (
    CODE_BYTES,
    Bytes,
    Counter,
    Tally,
    count_with_numpy,
)
from nvfp4check.checkpoint.scan_tiling import Tiling, tiling_of
from nvfp4check.checkpoint.storage import LocalStorage

BLOCK = 2 * CODE_BYTES
#: Blocks read at a time: 4 MiB of codes.
_PIECE = 1 << 19
#: Scales compared at a time in search of an unequal pair: at first, and where none was found.
_FIRST_PAIR_PIECE, _PAIR_PIECE = 1 << 11, 1 << 16
_FINGERPRINT_BYTES = 16
#: From this scale byte on, all are NaN or negative.
_FIRST_BAD = 0x7F


@dataclass(frozen=True, slots=True)
class Pairs:
    """Neighbouring scales of a row: those at columns 2j and 2j+1, and those at 2j+1 and 2j+2.

    Counted in full only where all of the first kind are equal; otherwise up to the first piece
    with an unequal pair.
    """

    even: int = 0
    even_equal: int = 0
    odd: int = 0
    odd_equal: int = 0

    @property
    def all_equal(self) -> bool:
        """Whether there are pairs and every one at columns 2j and 2j+1 is equal."""
        return 0 < self.even == self.even_equal


@dataclass(frozen=True, slots=True)
class WeightScan:
    """What the byte pass counted in one weight. Offsets of blocks count from the first block."""

    name: str
    #: Rows, the leading dimensions multiplied, and blocks in a row.
    rows: int
    row_blocks: int
    #: How often each code from 0 to 15 stands there.
    code_counts: tuple[int, ...]
    #: How often each scale byte stands there, up to the largest there is; see `scale_count`.
    scale_counts: tuple[int, ...]
    #: Largest scale byte, and scale bytes, of blocks that are not all zero.
    live_scales: tuple[int, ...]
    #: Elements with a finite scale; sum in 2**-10 and sum of squares in 2**-20, without the
    #: global scale.
    finite: int
    total: int
    total_squares: int
    defects: BlockDefects
    pairs: Pairs
    tiling: Tiling
    #: Digest of all counts. Equal bytes have equal fingerprints.
    fingerprint: str

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.rows * self.row_blocks

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.blocks * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of codes and block scales that were read."""
        return self.blocks * (CODE_BYTES + 1)

    @property
    def is_zero(self) -> bool:
        """Whether every code is a zero."""
        return self.code_counts[0] + self.code_counts[8] == self.elements

    def scale_count(self, byte: int) -> int:
        """Return how often a scale byte stands there."""
        return self.scale_counts[byte] if byte < len(self.scale_counts) else 0

    @property
    def mean(self) -> float:
        """Mean of code times block scale; multiply by the global decode scale."""
        return float(Fraction(self.total, self.finite << 10)) if self.finite else 0.0

    @property
    def rms(self) -> float:
        """Root mean square of code times block scale; multiply by the global decode scale."""
        return _root(Fraction(self.total_squares, self.finite << 20)) if self.finite else 0.0

    @property
    def sd(self) -> float:
        """Standard deviation of code times block scale; multiply by the global decode scale."""
        if not self.finite:
            return 0.0
        spread = self.finite * self.total_squares - self.total**2
        return _root(Fraction(spread, self.finite**2 << 20))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON from which `from_json` makes the same scan."""
        document = {name: getattr(self, name) for name in self.__slots__}  # asdict copies counts
        for name in ("defects", "pairs", "tiling"):
            document[name] = asdict(document[name])
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Make a scan of what `to_json` gave, also after a journey through text."""
        fields = dict(document)
        for name in ("code_counts", "scale_counts", "live_scales"):
            fields[name] = tuple(fields[name])
        spots = {name: Spot(**spot) for name, spot in fields["defects"].items()}
        fields["defects"] = BlockDefects(**spots)
        fields["pairs"] = Pairs(**fields["pairs"])
        fields["tiling"] = Tiling(**fields["tiling"])
        return cls(**fields)


def why_not_scannable(weight: LogicalWeight) -> str | None:
    """Say why a weight's bytes cannot be scanned as NVFP4, or None when they can.

    What is wrong with such a weight, rules on structure report.
    """
    if weight.format is not WeightFormat.NVFP4:
        return f"stored as {weight.format}"
    for part in (Part.CODES, Part.BLOCK_SCALES):
        if part not in weight.parts:
            return f"has no {part}"
    codes, scales = weight.parts[Part.CODES], weight.parts[Part.BLOCK_SCALES]
    if len(weight.shape) < 2 or not codes.nbytes or weight.shape[-1] % BLOCK:
        return f"its shape {list(weight.shape)} is not that of whole blocks of {BLOCK}"
    if scales.nbytes * CODE_BYTES != codes.nbytes:
        return f"{codes.nbytes:,} bytes of codes with {scales.nbytes:,} block scales"
    return None


def scan(
    checkpoint: Checkpoint, weight: LogicalWeight, counter: Counter | None = None
) -> WeightScan:
    """Read and count one NVFP4 weight.

    Raises:
        ValueError: The weight cannot be scanned; `why_not_scannable` tells beforehand.
        StorageError: Its bytes cannot be read.
    """
    why = why_not_scannable(weight)
    if why is not None:
        raise ValueError(f"{weight.name}: {why}")
    entry = weight.parts[Part.CODES]
    codes: Bytes | RangedBytes
    if checkpoint.storage.view(entry.shard) is None:
        codes = RangedBytes(checkpoint.storage, entry)
    else:
        codes = checkpoint.tensor_bytes(entry)
    scales = checkpoint.tensor_bytes(weight.parts[Part.BLOCK_SCALES])
    return scan_bytes(weight.name, codes, scales, weight.shape[-1] // BLOCK, counter)


def ranges_of(weight: LogicalWeight) -> list[FileRange]:
    """List the ranges in which `scan` reads a weight whose files are not mapped, in order."""
    scales = weight.parts[Part.BLOCK_SCALES]
    whole = FileRange(scales.shard, scales.start, scales.stop)
    return [whole, *pieces_of(weight.parts[Part.CODES])]


def with_new_maps(checkpoint: Checkpoint) -> Checkpoint:
    """Return the same checkpoint with maps of its own, which go when it goes.

    Pages read through a map stay resident as long as the map does. What is not mapped is as it is.
    """
    if not isinstance(checkpoint.storage, LocalStorage):
        return checkpoint
    return replace(checkpoint, storage=copy.copy(checkpoint.storage))


def scan_bytes(
    name: str,
    codes: Bytes | RangedBytes,
    scales: Bytes,
    row_blocks: int,
    counter: Counter | None = None,
) -> WeightScan:
    """Count packed codes [8 * n] and scale bytes [n], `row_blocks` of them in a row."""
    count = counter or default_counter()
    tally = Tally()
    for start in range(0, scales.size, _PIECE):
        stop = min(start + _PIECE, scales.size)
        count(codes[CODE_BYTES * start : CODE_BYTES * stop], scales[start:stop], tally)
    blocks, squares, _ = (tally.joint[:, column] for column in range(3))
    present = np.flatnonzero(blocks)
    largest = int(present[-1]) if present.size else 0
    defective = tally.has_unfilled or largest >= _FIRST_BAD or bool(squares[0])
    finite, total, total_squares = tally.moments()
    matrix = scales.reshape(-1, row_blocks)
    digest = hashlib.blake2b(digest_size=_FINGERPRINT_BYTES)
    digest.update(tally.codes.tobytes())
    digest.update(tally.joint.tobytes())
    return WeightScan(
        name=name,
        rows=matrix.shape[0],
        row_blocks=row_blocks,
        code_counts=tuple(tally.codes.tolist()),
        scale_counts=tuple(blocks[: largest + 1].tolist()) if present.size else (),
        live_scales=tuple(np.flatnonzero(squares).tolist()),
        finite=finite,
        total=total,
        total_squares=total_squares,
        defects=locate(codes, scales) if defective else BlockDefects(),
        pairs=pairs_of(matrix),
        tiling=tiling_of(matrix),
        fingerprint=digest.hexdigest(),
    )


def pairs_of(scales: Bytes) -> Pairs:
    """Compare neighbouring scales of each row [rows, columns]."""
    rows, columns = scales.shape
    found = Pairs()
    start, size = 0, _FIRST_PAIR_PIECE
    while start < rows:
        step = max(1, size // max(columns, 1))
        piece = scales[start : start + step]
        start, size = start + step, _PAIR_PIECE
        even = piece[:, 0 : columns - 1 : 2] == piece[:, 1::2]
        odd = piece[:, 1 : columns - 1 : 2] == piece[:, 2::2]
        found = Pairs(
            found.even + even.size,
            found.even_equal + int(even.sum()),
            found.odd + odd.size,
            found.odd_equal + int(odd.sum()),
        )
        if found.even_equal < found.even:
            break
    return found


@cache
def default_counter() -> Counter:
    """Return the compiled counter where numba can be imported, else the plain one."""
    try:
        from nvfp4check.checkpoint.scan_numba import count_with_numba
    except ImportError:
        return count_with_numpy
    return count_with_numba


def _root(value: Fraction) -> float:
    """Square root of a fraction of any size, correct to a few units in the last place."""
    shift = max(0, 128 - value.numerator.bit_length() + value.denominator.bit_length())
    shift += shift % 2
    return math.ldexp(math.isqrt((value.numerator << shift) // value.denominator), -shift // 2)
