"""Who a weight is, by the signs of a few of its elements.

Contract:
    sign    that of the code, of the E4M3 byte, or of the number as stored: rounding keeps the sign
            of every element, -0.0 and elements that become 0 included, in every format here
    chunk   up to 64 signs of one row; two unrelated ones are equal with a probability of 2**-64
    votes   a weight is another's when three quarters of its chunks are the other's
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.audit.sources import PLAIN_DTYPES, Reader, matrix_shape, row_pieces
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat

Signs = npt.NDArray[np.bool_]

_CHUNKS = 16
_CHUNK_SIGNS = 64
_SHARE = 0.75


def can_be_read(weight: LogicalWeight) -> bool:
    """Whether a weight is a matrix in a format whose signs can be read."""
    readable = weight.format in PLAIN_DTYPES or weight.format in (
        WeightFormat.NVFP4,
        WeightFormat.FP8_BLOCK,
        WeightFormat.FP8,
    )
    stored = Part.CODES in weight.parts or Part.PLAIN in weight.parts
    return readable and stored and len(weight.shape) >= 2 and weight.shape[-1] % 2 == 0


def signs_of(reader: Reader, weight: LogicalWeight, row: int, start: int, count: int) -> Signs:
    """Read the signs of `count` elements of a row, from an even column on.

    Raises:
        StorageError: They cannot be read.
    """
    rows, columns = matrix_shape(weight)
    entry = weight.parts.get(Part.CODES) or weight.parts[Part.PLAIN]
    size = 2 * entry.nbytes // (rows * columns)  # bytes of two elements
    # Rows of two elements each, so that any even piece of a row is whole ones.
    first = (row * columns + start) // 2
    data = reader.rows(entry, first, first + count // 2, size)
    if size == 1:
        last = np.stack([data[:, 0] << 4, data[:, 0]], axis=1).reshape(-1)
    else:
        last = data.reshape(count, size // 2)[:, -1]
    return np.asarray(last >= 0x80, np.bool_)


def chunk_places(weight: LogicalWeight) -> list[tuple[int, int, int]]:
    """Choose row, column and length of the chunks of a shape, spread over all of it."""
    rows, columns = matrix_shape(weight)
    length = min(_CHUNK_SIGNS, columns)
    across = columns // length
    return [
        (rows * chunk // _CHUNKS + rows // (2 * _CHUNKS), (chunk * 7 % across) * length, length)
        for chunk in range(_CHUNKS)
    ]


def chunks_of(reader: Reader, weight: LogicalWeight) -> list[Signs]:
    """Read the chunks of a weight."""
    return [signs_of(reader, weight, *place) for place in chunk_places(weight)]


class Register:
    """The chunks of many weights, to look a weight up by its own."""

    def __init__(self, reader: Reader, weights: Iterable[LogicalWeight]) -> None:
        self._names: dict[tuple[tuple[int, ...], int, bytes], list[str]] = defaultdict(list)
        for weight in weights:
            for number, chunk in enumerate(chunks_of(reader, weight)):
                if tells(chunk):
                    self._names[weight.shape, number, chunk.tobytes()].append(weight.name)

    def votes(self, shape: tuple[int, ...], chunks: Sequence[Signs]) -> Counter[str]:
        """Count for each known weight how many of the chunks are its own."""
        found: Counter[str] = Counter()
        for number, chunk in enumerate(chunks):
            if tells(chunk):
                found.update(self._names.get((shape, number, chunk.tobytes()), ()))
        return found

    def find(self, shape: tuple[int, ...], chunks: Sequence[Signs]) -> str | None:
        """Name the weight that the chunks are of, or None."""
        told = sum(tells(chunk) for chunk in chunks)
        votes = self.votes(shape, chunks).most_common(1)
        return votes[0][0] if votes and votes[0][1] >= max(1, _SHARE * told) else None


def tells(chunk: Signs) -> bool:
    """Whether a chunk can tell weights apart: one of zeros has equal signs."""
    return bool(chunk.any()) and not bool(chunk.all())


def agree(chunks: Iterable[Signs], others: Iterable[Signs]) -> bool:
    """Whether three quarters of the chunks that tell are equal."""
    equal = [bool(np.array_equal(a, b)) for a, b in zip(chunks, others, strict=True) if tells(a)]
    return bool(equal) and sum(equal) >= _SHARE * len(equal)


def sign_rows(
    reader: Reader, weight: LogicalWeight, start: int, stop: int, first: int, last: int
) -> Signs:
    """Read the signs [rows, columns] of rows, from one even column to another.

    Raises:
        StorageError: They cannot be read.
    """
    rows, columns = matrix_shape(weight)
    entry = weight.parts.get(Part.CODES) or weight.parts[Part.PLAIN]
    size = 2 * entry.nbytes // (rows * columns)  # bytes of two elements
    data = reader.rows(entry, start, stop, size * columns // 2)
    data = data[:, size * first // 2 : size * last // 2]
    if size == 1:
        marks = np.stack([data << 4, data], axis=-1).reshape(stop - start, last - first)
    else:
        marks = data.reshape(stop - start, last - first, size // 2)[:, :, -1]
    return np.asarray(marks >= 0x80, np.bool_)


def row_heads(reader: Reader, weight: LogicalWeight) -> Iterator[bytes]:
    """Yield the first signs of every row."""
    rows, columns = matrix_shape(weight)
    length = min(4 * _CHUNK_SIGNS, columns)
    for start, stop in row_pieces(rows, columns):
        yield from (row.tobytes() for row in sign_rows(reader, weight, start, stop, 0, length))
