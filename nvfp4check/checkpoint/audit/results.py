"""What the audit finds in one weight, in plain numbers.

Nothing here computes, and nothing imports torch: rules and reports read it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from nvfp4ref.formats import BLOCK_SIZE


class Way(StrEnum):
    """How a checkpoint came from its base."""

    DIRECT = "direct"
    FP8 = "fp8-128x128"
    FP8_UE8M0 = "fp8-128x128-ue8m0"
    SMOOTHED = "smoothed"
    SMOOTHED_BY_NORM = "smoothed-by-the-norm"
    SMOOTHED_BY_LINEAR = "smoothed-by-the-linear"


class Copied(StrEnum):
    """How a weight came from the base."""

    BYTES = "bytes"
    DEQUANTIZED = "dequantised"
    CAST = "cast"
    BY_FP8 = "by way of FP8"
    CONVERTED = "converted to FP8"
    SMOOTHED = "smoothed"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyAudit:
    """What the audit of one copied weight found."""

    name: str
    format: str
    base_format: str
    how: str
    elements: int
    #: Elements that differ, and the first of them; of FP8 with other scales, those scales.
    different: int = 0
    first: int | None = None
    #: The stored tensor that differs.
    tensor: str | None = None
    #: What else is to be said of the difference.
    remark: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON from which `from_json` makes the same."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Make one of what `to_json` gave."""
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAudit:
    """What the audit of one quantised weight counted."""

    name: str
    base_format: str
    #: How it came from the base: a `by_fp8.Way`.
    way: str
    #: Dtype in which the weight was quantised.
    dtype: str
    rows: int
    columns: int
    #: By the names of `kernel.Count` in lower case.
    counts: Mapping[str, int]
    #: By convention: scale bytes and codes that it makes otherwise.
    scale_differs: Mapping[str, int]
    code_differs: Mapping[str, int]
    #: First element, counted from 0, that is off, and that is beyond; None where none is.
    first_off: int | None
    first_beyond: int | None
    #: Largest distance, in block scale times global scale, of an element that is not nearest.
    worst: float
    amax: float
    #: The stored global scale, and the same as a multiplier.
    stored_scale: float
    global_decode: float
    #: Rows with enough signs, those with parts that are not the base's, and the first of these.
    judged_rows: int
    strange_rows: int
    first_strange: int | None
    #: Elements of which more than a quarter of all signs differ, where no row could be judged.
    strange_signs: bool
    #: Relative distance of the base's values, smoothed, from those that were quantised.
    slack: float = 0.0
    #: Whether its columns were divided by what the norm before was multiplied by.
    undoes_norm: bool = False

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.rows * self.columns // BLOCK_SIZE

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def wrong(self) -> int:
        """Elements whose code is not nearest, ties apart."""
        return self.counts["off"] + self.counts["beyond"]

    @property
    def nearest(self) -> int:
        """Elements whose code is exactly nearest; either side of an exact tie is."""
        void = BLOCK_SIZE * self.counts["void"]
        return self.elements - void - self.wrong - self.counts["other_side"]

    @property
    def is_strange(self) -> bool:
        """Whether some of it is not the base's."""
        return self.strange_signs or self.strange_rows > 0

    @property
    def is_mostly_strange(self) -> bool:
        """Whether more than half of its rows have parts that are not the base's."""
        return self.strange_signs or 2 * self.strange_rows > self.judged_rows

    def differs(self, convention: str) -> int:
        """Scale bytes and codes together that a convention makes otherwise."""
        return self.scale_differs[convention] + self.code_differs[convention]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON from which `from_json` makes the same."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Make one of what `to_json` gave."""
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """What a weight is instead of its base."""

    weight: str
    #: The weight of the base that it holds, where that was found.
    holds: str | None
    #: In words.
    how: str
    #: Rows that are not the base's, where only some are.
    rows: int | None = None

    @property
    def shown(self) -> str:
        """What the weight holds, in a few words."""
        if self.holds is None:
            return "no tensor of the base"
        if self.holds != self.weight:
            return self.holds
        change = self.how.removeprefix("it is the base's ")
        return f"{self.holds} {change}" if change != self.how else f"{self.holds}, but {self.how}"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)
