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
    if weight.format is not WeightFormat.FP8_BLOCK:
        return f"the base stores it as {weight.format}"
    scale = weight.parts.get(Part.SCALE_INV)
    if Part.CODES not in weight.parts or scale is None:
        return "the base has no scale for it"
    if weight.parts[Part.CODES].dtype != "F8_E4M3" or scale.dtype != "F32":
        return f"the base stores it as {weight.parts[Part.CODES].dtype} with {scale.dtype} scales"
    if len(weight.shape) != 2 or tuple(scale.shape) != scale_shape(*weight.shape):
        return f"the base's scales have shape {list(scale.shape)}"
    return None


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
        self.is_fp8 = weight.format is WeightFormat.FP8_BLOCK
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
        codes, scale = self._weight.parts[Part.CODES], self._weight.parts[Part.SCALE_INV]
        elements = self._reader.rows(codes, start, stop, self.columns)
        down = -(-stop // height)
        scales = self._reader.rows(scale, start // height, down, 4 * scale.shape[1])
        room = self._room
        if room is None or room.shape[0] < stop - start or room.dtype != dtype:
            room = self._room = torch.empty(stop - start, self.columns, dtype=dtype)
        return dequantize_fp8_block(
            _tensor(elements).view(torch.float8_e4m3fn),
            _tensor(scales).view(torch.float32),
            dtype,
            out=room[: stop - start],
        )


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
