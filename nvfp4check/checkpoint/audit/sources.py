"""The values of a base weight, by rows, in the dtype in which a producer quantises them.

Contract:
    bf16, f16, f32  as stored; float16 is widened to float32, which is exact
    smoothed        float32: each element divided by its column's factor (`smoothing`)
    by way of FP8   bfloat16 taken through FP8 128 x 128 (`by_fp8`), for a checkpoint that was made
                    from an FP8 conversion of its base
    fp8-block       element * scale of its 128 x 128 block, rounded to float32, then to bfloat16,
                    as DeepSeek's own weight_dequant and ModelOpt's examples do

Mapped memory stays resident as long as its map: `Reader` makes new maps after a while, so that what
is resident stays bounded for weights of any size.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nvfp4check.checkpoint.audit.by_fp8 import by_way_of_fp8
from nvfp4check.checkpoint.audit.results import Way
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.scan import with_new_maps
from nvfp4check.dequantize import dequantize_fp8_block
from nvfp4ref import fp8
from nvfp4ref.formats import FP8_BLOCK
from nvfp4ref.fp8_block import scale_shape

Array = npt.NDArray[Any]

#: Elements read at a time: their bfloat16 values stay in a second-level cache.
_PIECE = 1 << 20
#: Bytes read through one set of maps.
_MAPPED_BYTES = 48 << 20

#: What the system maps around one page that is touched, at least.
_FAULT_BYTES = 1 << 16

PLAIN_DTYPES = {
    WeightFormat.BF16: torch.bfloat16,
    WeightFormat.F16: torch.float16,
    WeightFormat.F32: torch.float32,
}
#: Forms with an element of E4M3 a byte; they differ in what a scale is for.
FP8_FORMATS = (WeightFormat.FP8_BLOCK, WeightFormat.FP8)
#: What scales of FP8 may be stored in.
SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: numpy's words for the stored elements of each.
_WORDS = {torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.uint32}


@dataclass(slots=True)
class Reader:
    """Reads tensors of one checkpoint, and lets go of what it has read."""

    checkpoint: Checkpoint
    _mapped: Checkpoint | None = field(default=None, init=False)
    _read: int = field(default=0, init=False)

    def rows(self, entry: TensorEntry, start: int, stop: int, row_bytes: int) -> Array:
        """Give the bytes [rows, row_bytes] of some rows.

        Raises:
            StorageError: They cannot be read.
        """
        if self._mapped is None or self._read > _MAPPED_BYTES:
            self._mapped, self._read = with_new_maps(self.checkpoint), 0
        data = self._mapped.tensor_bytes(entry, start * row_bytes, stop * row_bytes)
        self._read += max(data.nbytes, _FAULT_BYTES)
        return data.reshape(stop - start, row_bytes)


def matrix_shape(weight: LogicalWeight) -> tuple[int, int]:
    """Return rows, the leading dimensions multiplied, and columns."""
    rows = 1
    for size in weight.shape[:-1]:
        rows *= size
    return rows, weight.shape[-1] if weight.shape else 1


def row_pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """Cut rows into pieces; every piece but the last is whole FP8 blocks high."""
    height = FP8_BLOCK.block_shape[0]
    step = max(1, _PIECE // max(1, height * columns)) * height
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def why_no_source(weight: LogicalWeight) -> str | None:
    """Say why a base weight's values cannot be read, or None when they can."""
    if weight.format in PLAIN_DTYPES and Part.PLAIN in weight.parts:
        return None
    if weight.format not in FP8_FORMATS or Part.PLAIN in weight.parts:
        return f"the base stores it as {weight.format}"
    why = why_not_fp8(weight)
    return None if why is None else f"in the base {why}"


def why_not_fp8(weight: LogicalWeight) -> str | None:
    """Say why an FP8 weight's values cannot be read, or None when they can."""
    tiled = weight.format is WeightFormat.FP8_BLOCK
    codes = weight.parts.get(Part.CODES)
    scale = weight.parts.get(Part.SCALE_INV if tiled else Part.SCALE)
    if codes is None or scale is None:
        return "it has no codes or no scale"
    if codes.dtype != "F8_E4M3" or scale.dtype not in SCALE_DTYPES or len(weight.shape) != 2:
        return f"it is {codes.dtype} {list(weight.shape)} under {scale.dtype} scales"
    rows = weight.shape[0]
    shapes = (scale_shape(*weight.shape),) if tiled else ((), (1,), (rows,), (rows, 1))
    return None if scale.shape in shapes else f"its scales have shape {list(scale.shape)}"


def scale_of(weight: LogicalWeight) -> TensorEntry:
    """Give the stored scales of an FP8 weight that has them."""
    tiled = weight.format is WeightFormat.FP8_BLOCK
    return weight.parts[Part.SCALE_INV if tiled else Part.SCALE]


class Source:
    """The values of one base weight."""

    def __init__(
        self,
        reader: Reader,
        weight: LogicalWeight,
        way: Way = Way.DIRECT,
        factors: npt.NDArray[np.float64] | None = None,
        row_factors: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Take a weight for which `why_no_source` has nothing to say.

        Its columns are divided by factors, and its rows multiplied.

        Raises:
            ValueError: The way needs bfloat16, and the weight is stored otherwise.
        """
        if way is not Way.DIRECT and weight.format is not WeightFormat.BF16:
            raise ValueError(f"{weight.name}: {weight.format} does not go by way of FP8")
        self._way = way
        self._reader = reader
        self._weight = weight
        self.rows, self.columns = matrix_shape(weight)
        self.is_fp8 = weight.format in FP8_FORMATS
        self.stored_dtype = torch.bfloat16 if self.is_fp8 else PLAIN_DTYPES[weight.format]
        self.dtype = self.stored_dtype if factors is None else torch.float32
        self._inverse = None if factors is None else torch.from_numpy(1 / factors).float()
        self._by_row = None if row_factors is None else torch.from_numpy(row_factors).float()
        self._room: torch.Tensor | None = None

    def words(self, start: int, stop: int) -> Array:
        """Give rows as the kernel reads them: bfloat16 as uint16, float32 as uint32.

        What is returned holds until the next call.
        """
        if self._inverse is not None:
            smoothed = self._unsmoothed(start, stop) * self._inverse
            if self._by_row is not None:
                smoothed *= self._by_row[start:stop, None]
            return smoothed.numpy().view(np.uint32)
        if self.is_fp8:
            return (
                self._dequantized(start, stop, torch.bfloat16)
                .view(torch.int16)
                .numpy()
                .view(np.uint16)
            )
        entry = self._weight.parts[Part.PLAIN]
        size = np.dtype(_WORDS[self.dtype]).itemsize
        data = self._reader.rows(entry, start, stop, self.columns * size)
        words = _aligned(data, size).view(_WORDS[self.dtype])
        if self._way is not Way.DIRECT:
            through = np.empty_like(words)
            by_way_of_fp8(frozen(words), self._way is Way.FP8_UE8M0, through)
            return through
        if self.dtype is torch.float16:
            words = words.astype(np.float32).view(np.uint32)
        return words

    def _unsmoothed(self, start: int, stop: int) -> torch.Tensor:
        """Give rows as float32, their columns not divided."""
        if self.is_fp8:
            return self._dequantized(start, stop, torch.bfloat16).float()
        entry = self._weight.parts[Part.PLAIN]
        data = self._reader.rows(entry, start, stop, self.columns * self.stored_dtype.itemsize)
        return _tensor(data).view(self.stored_dtype).float()

    def tensor(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Give the values of rows in a dtype, rounded once to it."""
        if self.is_fp8 and self._inverse is None:
            return self._dequantized(start, stop, dtype)
        return self.values(self.words(start, stop)).to(dtype)

    def values(self, words: Array) -> torch.Tensor:
        """Turn elements of `words` into a tensor of the weight's dtype."""
        copied = np.array(words)
        if self.dtype is torch.bfloat16:
            return torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(copied.view(np.float32)).to(self.dtype)

    def _dequantized(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        height = FP8_BLOCK.block_shape[0]
        if start % height:
            raise ValueError(f"rows from {start} on do not begin a block")
        codes, scale = self._weight.parts[Part.CODES], scale_of(self._weight)
        elements = self._reader.rows(codes, start, stop, self.columns)
        if self._weight.format is WeightFormat.FP8:
            place = (0, 1) if scale.numel == 1 else (start, stop)
            scales = read_scales(self._reader, scale, *place)
            return fp8.dequantize(_tensor(elements).view(torch.float8_e4m3fn), scales, dtype)
        down = -(-stop // height)
        scales = read_scales(self._reader, scale, start // height, down)
        room = self._room
        if room is None or room.shape[0] < stop - start or room.dtype != dtype:
            room = self._room = torch.empty(stop - start, self.columns, dtype=dtype)
        return dequantize_fp8_block(
            _tensor(elements).view(torch.float8_e4m3fn),
            scales,
            dtype,
            out=room[: stop - start],
        )


def read_scales(reader: Reader, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
    """Give rows of FP8's scales as float32, in which those of 16 bits are exact.

    Raises:
        StorageError: They cannot be read.
    """
    columns = entry.numel // max(1, entry.shape[0] if entry.shape else 1)
    size = SCALE_DTYPES[entry.dtype].itemsize
    raw = _tensor(reader.rows(entry, start, stop, columns * size))
    return raw.view(SCALE_DTYPES[entry.dtype]).to(torch.float32)


def frozen(array: Array) -> Array:
    """Return a view that is read-only, so that kernels are compiled once for a dtype."""
    view = array.view()
    view.flags.writeable = False
    return view


def _aligned(data: Array, size: int) -> Array:
    """Return the same bytes where numbers of that size may lie."""
    return data if data.ctypes.data % size == 0 else data.copy()


def _tensor(data: Array) -> torch.Tensor:
    """Copy bytes into a tensor: torch warns of memory that it must not write to."""
    return torch.from_numpy(data.copy())
