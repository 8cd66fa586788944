"""The values of one side of a pair, by rows, and how far an original may lie from them.

Contract:
    values     float64 and exact: code * block scale * global scale, element * scale of its
               128 x 128 block, its row or all, or the number as stored. Under a reciprocal
               global scale the one rounding of the division; a quotient that differs from a
               number of another format differs by more (their product has at most 52 bits), so
               that equal means equal
    half gaps  `nvfp4check.checkpoint.bounds`, with the producers' own roundings granted
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint import bounds
from nvfp4check.checkpoint.audit.sources import FP8_FORMATS, Reader, read_scales, why_not_fp8
from nvfp4check.checkpoint.header import DTYPE_BITS, TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.scan import why_not_scannable
from nvfp4check.checkpoint.storage import StorageError
from nvfp4ref.formats import BLOCK_SIZE, FP8_BLOCK

Array = npt.NDArray[Any]

_PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Operand:
    """A weight, or the rows of a fused weight that are one of its members."""

    weight: LogicalWeight
    first_row: int = 0
    row_count: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows that are meant."""
        shape = self.weight.shape
        return shape if self.row_count is None else (self.row_count, shape[-1])

    @cached_property
    def rows(self) -> int:
        """Rows, the leading dimensions multiplied; a vector is one row."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the stored weight."""
        return self.row_count is None

    @property
    def nbytes(self) -> int:
        """Bytes that are read of it."""
        whole = self.weight.nbytes
        if self.row_count is None or not self.weight.shape:
            return whole
        rows = 1
        for size in self.weight.shape[:-1]:
            rows *= size
        return whole * self.row_count // max(1, rows)

    @property
    def format(self) -> WeightFormat:
        """How the elements are stored."""
        return self.weight.format

    @property
    def plain(self) -> TensorEntry | None:
        """The one tensor of a weight that is stored as numbers."""
        entries = self.weight.entries
        if self.weight.format is WeightFormat.KV_SCALE or Part.PLAIN in self.weight.parts:
            entry = self.weight.parts.get(Part.PLAIN) or entries[0]
            return entry if entry.dtype in _PLAIN_DTYPES else None
        return None

    def why_not(self) -> str | None:
        """Say why the values cannot be read, or None when they can."""
        weight = self.weight
        if weight.format is WeightFormat.NVFP4:
            if Part.GLOBAL_SCALE not in weight.parts:
                return "it has no global scale"
            return why_not_scannable(weight)
        if weight.format in FP8_FORMATS and Part.PLAIN not in weight.parts:
            tiled = weight.format is WeightFormat.FP8_BLOCK
            cut = tiled and self.first_row % FP8_BLOCK.block_shape[0] != 0
            return why_not_fp8(weight) or ("it cuts a block" if cut else None)
        if self.plain is not None:
            return None
        return f"it is stored as {weight.format}"


@dataclass(slots=True)
class Stored:
    """An operand with its checkpoint: what is read from it."""

    reader: Reader
    operand: Operand

    def part(self, part: Part) -> TensorEntry | None:
        """Find a stored tensor."""
        return self.operand.weight.parts.get(part)

    def scalar(self, part: Part) -> float | None:
        """Read a scale of one element as stored; None where there is none that can be read."""
        entry = self.part(part)
        if entry is None:
            return None
        try:
            return float(self.reader.checkpoint.scalar(entry))
        except (ValueError, StorageError):
            return None

    def decode_scale(self, part: Part) -> float | None:
        """Read a scale as the number that multiplies."""
        value = self.scalar(part)
        if value is None or not self.operand.weight.global_scale_is_reciprocal:
            return value
        return float(np.float64(1.0) / np.float64(value)) if value else float("inf")

    def codes(self, start: int, stop: int) -> Array:
        """Give rows of packed codes [rows, K/2], or FP8 bytes [rows, K]."""
        entry = self.operand.weight.parts[Part.CODES]
        half = 2 if self.operand.format is WeightFormat.NVFP4 else 1
        return self._rows(entry, start, stop, self.operand.columns // half)

    def scales(self, start: int, stop: int) -> Array:
        """Give rows of block scales [rows, K/16] as bytes."""
        entry = self.operand.weight.parts[Part.BLOCK_SCALES]
        return self._rows(entry, start, stop, self.operand.columns // BLOCK_SIZE)

    def _rows(self, entry: TensorEntry, start: int, stop: int, row_bytes: int) -> Array:
        first = self.operand.first_row
        return self.reader.rows(entry, first + start, first + stop, row_bytes)

    def numbers(self, start: int, stop: int) -> tuple[Array, Array]:
        """Give plain rows as stored, and as float64."""
        entry = self.operand.plain
        if entry is None:
            raise ValueError(f"{self.operand.weight.name}: not stored as numbers")
        size = DTYPE_BITS[entry.dtype] // 8
        raw = self._rows(entry, start, stop, self.operand.columns * size)
        raw = raw if raw.ctypes.data % size == 0 else raw.copy()
        if entry.dtype == "BF16":
            words = raw.view(np.uint16)
            wide = (words.astype(np.uint32) << 16).view(np.float32)
            return words, wide.astype(np.float64)
        words = raw.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[size])
        held = raw.view({2: np.float16, 4: np.float32, 8: np.float64}[size])
        with np.errstate(invalid="ignore"):
            return words, held.astype(np.float64)


class Values:
    """Decodes an operand to values and half gaps."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        form = stored.operand.format
        if form is WeightFormat.NVFP4:
            decode = stored.decode_scale(Part.GLOBAL_SCALE)
            scale = float("nan") if decode is None else decode
            units = bounds.nvfp4_units()
            reciprocal = stored.operand.weight.global_scale_is_reciprocal
            with np.errstate(all="ignore"):
                raw = stored.scalar(Part.GLOBAL_SCALE)
                self._values = units / raw if reciprocal and raw else units * scale
                self._gaps = bounds.nvfp4_half_gaps(scale)
        elif form in FP8_FORMATS:
            self._values = bounds.e4m3_values()
            self._gaps = bounds.E4M3_HALF_GAPS

    def rows(self, start: int, stop: int) -> tuple[Array, Array]:
        """Give values and half gaps [rows, K] in float64."""
        stored, form = self.stored, self.stored.operand.format
        if form is WeightFormat.NVFP4:
            packed = stored.codes(start, stop)
            codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(stop - start, -1)
            place = np.repeat(stored.scales(start, stop).astype(np.int32) * 16, BLOCK_SIZE, axis=1)
            place += codes
            return self._values.reshape(-1)[place], self._gaps.reshape(-1)[place]
        if form in FP8_FORMATS:
            bytes_ = stored.codes(start, stop)
            spread = (
                self._tiles(start, stop)
                if form is WeightFormat.FP8_BLOCK
                else self._of_rows(start, stop)
            )
            return self._values[bytes_] * spread, self._gaps[bytes_] * np.abs(spread)
        _, values = stored.numbers(start, stop)
        entry = stored.operand.plain
        if entry is None:
            raise ValueError(f"{stored.operand.weight.name}: not stored as numbers")
        return values, bounds.plain_half_gaps(values, entry.dtype)

    def _tiles(self, start: int, stop: int) -> Array:
        """Give the scale of each element [rows, K]."""
        entry = self.stored.operand.weight.parts[Part.SCALE_INV]
        height, width = FP8_BLOCK.block_shape
        first = self.stored.operand.first_row
        top, bottom = (first + start) // height, -(-(first + stop) // height)
        scales = read_scales(self.stored.reader, entry, top, bottom).double().numpy()
        rows = (first + np.arange(start, stop)) // height - top
        columns = np.arange(self.stored.operand.columns) // width
        return np.asarray(scales[rows][:, columns])

    def _of_rows(self, start: int, stop: int) -> Array:
        """Give the scale of each row [rows, 1], or of all [1, 1]."""
        entry = self.stored.operand.weight.parts[Part.SCALE]
        first = self.stored.operand.first_row
        place = (0, 1) if entry.numel == 1 else (first + start, first + stop)
        return read_scales(self.stored.reader, entry, *place).double().numpy().reshape(-1, 1)


def within(one: Array, two: Array, gaps: Array) -> bool:
    """Whether all values are within some gaps of one another, and the producers' roundings."""
    with np.errstate(invalid="ignore"):
        return bool((np.abs(one - two) <= gaps + bounds.ZONE * (np.abs(one) + np.abs(two))).all())
