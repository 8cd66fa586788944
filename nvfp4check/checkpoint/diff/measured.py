"""What the comparison of a pair counts, whatever its formats."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.diff.results import Worst

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Measured:
    """Sums and counts over the elements that are finite on both sides."""

    energy_a: float = 0.0
    energy_b: float = 0.0
    energy_difference: float = 0.0
    max_abs: float = 0.0
    worst: Worst | None = None
    beyond: int = 0
    #: Elements of a and of b that are NaN or infinite.
    not_finite: list[int] = field(default_factory=lambda: [0, 0])
    #: Whether every number is exactly equal.
    equal: bool = True
    changed_codes: int | None = None
    changed_scales: int | None = None
    #: Blocks of a and of b whose codes are all zero; counted in NVFP4 weights alone.
    empty_blocks: tuple[int, int] = 0, 0
    max_ulp: int | None = None
    ulp_histogram: dict[str, int] = field(default_factory=dict)
    #: Energy of a and of the difference by column; only where it was asked for.
    columns: tuple[Array, Array] | None = None

    @property
    def sqnr_db(self) -> float | None:
        """Mean energy of both sides over that of the difference, in decibels."""
        signal = (self.energy_a + self.energy_b) / 2
        if self.energy_difference <= 0 or signal <= 0:
            return None
        ratio = signal / self.energy_difference
        return 10 * math.log10(ratio) if 0 < ratio < math.inf else None

    @property
    def relative_error(self) -> float | None:
        """Root of the energy of the difference over that of a."""
        if self.energy_difference <= 0:
            return 0.0
        ratio = self.energy_difference / self.energy_a if self.energy_a > 0 else math.inf
        return math.sqrt(ratio) if math.isfinite(ratio) else None


def same_bytes(one: Array, two: Array) -> bool:
    """Whether two arrays of bytes of one size are equal, by pieces that stay in the cache."""
    piece = 1 << 17
    words = one.size - one.size % 8
    left, right = one[:words].view(np.uint64), two[:words].view(np.uint64)
    for start in range(0, left.size, piece // 8):
        stop = start + piece // 8
        if (left[start:stop] != right[start:stop]).any():
            return False
    return bool((one[words:] == two[words:]).all())


def by_powers(steps: Array) -> dict[str, int]:
    """Count steps by columns 1, 2, 3-4, 5-8, … whose key is the least step of the column."""
    present = steps[steps > 0]
    if not present.size:
        return {}
    # 1 -> 0, 2 -> 1, 3 and 4 -> 2, 5 to 8 -> 3: exact for all of int64.
    column = np.ceil(np.log2(present.astype(np.float64))).astype(np.int64)
    counts = np.bincount(column)
    return {
        str(1 if place == 0 else 2 ** (place - 1) + 1): int(count)
        for place, count in enumerate(counts)
        if count
    }


def add_histogram(total: dict[str, int], more: dict[str, int]) -> None:
    """Add the counts of one histogram to another."""
    for key, count in more.items():
        total[key] = total.get(key, 0) + count
