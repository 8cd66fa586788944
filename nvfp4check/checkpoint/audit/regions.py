"""Rows and columns of a weight that are not the base's, found by their signs, and named.

Contract:
    strange block  of 16 elements, four or more live ones with another sign than the base's: of 16
                   unrelated ones three or fewer differ with a probability of 1 %
    span           strange blocks of a row side by side, gaps of two closed; four of them or half a
                   row; where they are three quarters of the row, all of it
    region         spans of rows below one another, gaps of two rows closed, whose ends are two
                   blocks apart at most
    named          by up to 256 signs of its first row: they stand in the base in the same row at
                   other columns; or in other rows, of the own tensor or of what it is fused with;
                   or at the same place of another tensor of its shape. Of several places the one
                   counts that most rows below follow. Rows above and below that follow too belong
                   to it; those of its own that do not are a region again
    searched   the eight regions of most rows; those of a weight that is strange throughout would
               each take a look at all of the base's
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nvfp4check.checkpoint.audit.patterns import fused_with
from nvfp4check.checkpoint.audit.results import Foreign
from nvfp4check.checkpoint.audit.signs import Signs, can_be_read, sign_rows, signs_of
from nvfp4check.checkpoint.audit.sources import Reader, matrix_shape, row_pieces
from nvfp4check.checkpoint.naming import LogicalWeight, Part
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.rules.base import counted
from nvfp4ref.formats import BLOCK_SIZE

_STRANGE = 4
_GAP = 2
_LEAST_BLOCKS = 4
_PROBE_SIGNS = 256
#: Rows from which a region is foreign although it is found nowhere: fewer may be damage.
_LEAST_ROWS = 16
#: Weights that are looked for in all tensors of their shape.
_MOST_SEARCHED = 64
#: Regions of one weight that are searched, and that are told.
_MOST_REGIONS, _TOLD = 8, 3


@dataclass(slots=True)
class Region:
    """Rows `top` to `bottom` and columns `left` to `right`, the last ones not included."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.bottom - self.top


@dataclass(frozen=True, slots=True)
class _Place:
    """Where signs stand in the base."""

    name: str
    row: int
    column: int


def strange_regions(
    reader: Reader, weight: LogicalWeight, base_reader: Reader, base: LogicalWeight
) -> list[Region]:
    """Find the regions of an NVFP4 weight that are not the base's.

    Raises:
        StorageError: Bytes cannot be read.
    """
    rows, columns = matrix_shape(weight)
    found: list[Region] = []
    near: list[Region] = []
    for start, stop in row_pieces(rows, columns):
        codes = reader.rows(weight.parts[Part.CODES], start, stop, columns // 2)
        live = np.stack([codes & 7, codes >> 4 & 7], axis=-1).reshape(stop - start, columns) != 0
        mine = sign_rows(reader, weight, start, stop, 0, columns)
        theirs = sign_rows(base_reader, base, start, stop, 0, columns)
        differing = ((mine != theirs) & live).reshape(stop - start, -1, BLOCK_SIZE).sum(-1)
        for row in np.flatnonzero((differing >= _STRANGE).any(axis=1)):
            near = [region for region in near if start + int(row) <= region.bottom + _GAP]
            for first, last in _spans(differing[row] >= _STRANGE):
                new = _added(near, start + int(row), first * BLOCK_SIZE, last * BLOCK_SIZE)
                if new is not None:
                    near.append(new)
                    found.append(new)
    return found


def _spans(strange: Signs) -> Iterator[tuple[int, int]]:
    """Yield runs of strange blocks, first and end."""
    places = np.flatnonzero(strange)
    if 4 * len(places) >= 3 * len(strange):
        yield 0, len(strange)
        return
    for run in np.split(places, np.flatnonzero(np.diff(places) > _GAP + 1) + 1):
        first, last = int(run[0]), int(run[-1]) + 1
        if last - first >= _LEAST_BLOCKS or 2 * (last - first) >= len(strange):
            yield first, last


def _added(near: Sequence[Region], row: int, left: int, right: int) -> Region | None:
    """Add a span to one of the regions that end near above it, or begin a new one and return it."""
    most = _GAP * BLOCK_SIZE
    for region in reversed(near):
        alike = abs(region.left - left) <= most and abs(region.right - right) <= most
        if region.bottom <= row and alike:
            region.bottom = row + 1
            region.left, region.right = min(region.left, left), max(region.right, right)
            return None
    return Region(row, row + 1, left, right)


class RegionSearch:
    """Names regions by where they stand in the base."""

    def __init__(self, reader: Reader, base_reader: Reader, base: Checkpoint) -> None:
        self._reader = reader
        self._base_reader = base_reader
        self._base = base
        self._searched = 0

    def name(self, weight: LogicalWeight) -> Foreign | None:
        """Say which rows and columns are another's; None where damage would look the same.

        Raises:
            StorageError: Bytes cannot be read.
        """
        own = self._base.weights[weight.name]
        if not can_be_read(weight) or not can_be_read(own):
            return None
        regions = strange_regions(self._reader, weight, self._base_reader, own)
        regions.sort(key=lambda region: region.rows)
        self._searched += 1
        told: list[tuple[int, str]] = []
        holds: list[str] = []
        rows = tried = 0
        while regions and len(told) < _TOLD and tried < _MOST_REGIONS:
            region = regions.pop()
            tried += 1
            place, claimed = self._find(weight, region)
            if place is not None:
                regions = [*_without(regions, claimed), *_without([region], claimed)]
                regions.sort(key=lambda region: region.rows)
                region = claimed
            whole = region.right - region.left == own.shape[-1]
            if place is None and not whole and region.rows < _LEAST_ROWS:
                continue
            told.append((region.top, f"{_where(region, own)} {_what(own, region, place)}"))
            rows += region.rows
            if place is not None:
                holds.append(place.name)
        if not told:
            return None
        words = [words for _, words in sorted(told)]
        more = sum(region.rows for region in regions)
        if more:
            words.append(f"in {counted(more, 'more row')} other parts are foreign")
        return Foreign(
            weight=weight.name,
            holds=next(
                (name for name in holds if name != weight.name), holds[0] if holds else None
            ),
            how="; ".join(words),
            rows=rows + more,
        )

    def _find(self, weight: LogicalWeight, region: Region) -> tuple[_Place | None, Region]:
        """Find where a region's first row stands, and all the rows that follow it."""
        length = min(_PROBE_SIGNS, region.right - region.left)
        middle = region.left + (region.right - region.left - length) // 2
        left = middle // BLOCK_SIZE * BLOCK_SIZE
        probe = self._probe(weight, region.top, left, length)
        best: _Place | None = None
        claimed = region
        most = 0
        for name, row, column in self._candidates(weight, region.top, left, probe):
            other = self._base.weights[name]
            shift = row - region.top
            below = self._follow(weight, other, (region.top, left, length), (shift, column), 1)
            if below > most:
                most = below
                above = self._follow(
                    weight, other, (region.top - 1, left, length), (shift, column), -1
                )
                best = _Place(name, row - above, column - left + region.left)
                claimed = replace(region, top=region.top - above, bottom=region.top + below)
            if below >= region.rows:
                break
        return best, claimed

    def _follow(
        self,
        weight: LogicalWeight,
        other: LogicalWeight,
        probe: tuple[int, int, int],
        place: tuple[int, int],
        step: int,
    ) -> int:
        """Count rows on end, from one on down or up, that stand elsewhere and not in their own."""
        row, left, length = probe
        own = self._base.weights[weight.name]
        shift, column = place
        first = row
        while 0 <= row < matrix_shape(weight)[0]:
            signs = self._probe(weight, row, left, length)
            if not self._matches(other, row + shift, column, signs):
                break
            if self._matches(own, row, left, signs):
                break
            row += step
        return abs(row - first)

    def _probe(
        self, weight: LogicalWeight, row: int, column: int, length: int
    ) -> tuple[Signs, Signs]:
        """Read signs, and which of them are those of live codes."""
        codes = self._reader.rows(
            weight.parts[Part.CODES], row, row + 1, matrix_shape(weight)[1] // 2
        )[0, column // 2 : (column + length) // 2]
        live = np.stack([codes & 7, codes >> 4 & 7], axis=-1).reshape(length) != 0
        return signs_of(self._reader, weight, row, column, length), live

    def _matches(
        self, other: LogicalWeight, row: int, column: int, probe: tuple[Signs, Signs]
    ) -> bool:
        signs, live = probe
        rows, columns = matrix_shape(other)
        if not 0 <= row < rows or column + len(signs) > columns:
            return False
        there = signs_of(self._base_reader, other, row, column, len(signs))
        return not bool(((there != signs) & live).any())

    def _candidates(
        self, weight: LogicalWeight, row: int, left: int, probe: tuple[Signs, Signs]
    ) -> Iterator[tuple[str, int, int]]:
        """Yield places of the base where the signs stand."""
        signs, live = probe
        own = self._base.weights[weight.name]
        whole = sign_rows(self._base_reader, own, row, row + 1, 0, own.shape[-1])[0]
        windows = np.lib.stride_tricks.sliding_window_view(whole, len(signs))[::BLOCK_SIZE]
        for place in np.flatnonzero(~((windows != signs) & live).any(axis=1)):
            if int(place) * BLOCK_SIZE != left:
                yield own.name, row, int(place) * BLOCK_SIZE
        for name in (own.name, *fused_with(own.name)):
            other = self._base.weights.get(name)
            if other is not None and other.shape[1:] == own.shape[1:] and can_be_read(other):
                for at in self._rows_with(other, left, probe):
                    if (name, at) != (own.name, row):
                        yield name, at, left
        if self._searched <= _MOST_SEARCHED:
            for name in self._of_shape(own):
                if name != own.name:
                    yield name, row, left

    def _rows_with(
        self, other: LogicalWeight, left: int, probe: tuple[Signs, Signs]
    ) -> Sequence[int]:
        signs, live = probe
        rows, columns = matrix_shape(other)
        found: list[int] = []
        for start, stop in row_pieces(rows, columns):
            there = sign_rows(self._base_reader, other, start, stop, left, left + len(signs))
            same = ~((there != signs) & live).any(axis=1)
            found += (start + np.flatnonzero(same)).tolist()
        return found

    def _of_shape(self, own: LogicalWeight) -> Iterator[str]:
        for name, other in self._base.weights.items():
            if other.shape == own.shape and can_be_read(other):
                yield name


def _where(region: Region, weight: LogicalWeight) -> str:
    rows, columns = matrix_shape(weight)
    if region.rows == 1:
        shown = f"row {region.top:,}"
    elif region.rows == rows:
        shown = f"all {rows:,} rows"
    else:
        shown = f"rows {region.top:,} to {region.bottom - 1:,}"
    if region.right - region.left < columns:
        shown = f"columns {region.left:,} to {region.right - 1:,} of {shown}"
    return shown


def _without(regions: Sequence[Region], claimed: Region) -> list[Region]:
    """Take rows away that a region in the same columns has claimed."""
    left: list[Region] = []
    for region in regions:
        if region.right <= claimed.left or claimed.right <= region.left:
            left.append(region)
            continue
        if region.top < claimed.top:
            left.append(replace(region, bottom=min(region.bottom, claimed.top)))
        if region.bottom > claimed.bottom:
            left.append(replace(region, top=max(region.top, claimed.bottom)))
    return left


def _what(weight: LogicalWeight, region: Region, place: _Place | None) -> str:
    """Say what stands in a region."""
    columns = region.right - region.left
    be = "is" if region.rows == 1 and columns == weight.shape[-1] else "are"
    if place is None:
        return f"{be} not the base's, and found nowhere"
    if place.name != weight.name and (place.row, place.column) == (region.top, region.left):
        return f"{be} that of {place.name}" if be == "is" else f"{be} those of {place.name}"
    whose = "the base's" if place.name == weight.name else f"of {place.name} the"
    if place.row == region.top:
        return f"{be} {whose} columns {place.column:,} to {place.column + columns - 1:,}"
    if region.rows == 1:
        return f"{be} {whose} row {place.row:,}"
    return f"{be} {whose} rows {place.row:,} to {place.row + region.rows - 1:,}"
