"""The header of a safetensors file, read without trusting it.

File: 8 bytes little-endian header length n; n bytes of JSON, an object that maps each tensor's
name to its dtype, shape and byte range within the data; then the data, which those ranges cover
exactly, without overlap or hole. Any departure is a `HeaderError`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from sys import intern

from nvfp4check.checkpoint.storage import Storage, StorageError

#: The safetensors library refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
#: Above this size a header must have the density of one, so that no file makes the reader build
#: objects by the ten million: an entry with a name of 40 characters takes 100 bytes, and has three
#: brackets and five commas.
_DENSE_FROM = 10_000_000
_BYTES_A_MARK = 16
_MAX_ELEMENTS = 2**63
#: torch itself stops at 64.
_MAX_DIMENSIONS = 64
_MAX_MESSAGE = 600

#: Bits of an element by safetensors dtype.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

#: Minus zero as a value; in a name it may stand too.
_NEGATIVE_ZERO = re.compile(rb"[\[,:\s]-0(?![0-9.eE])")


class HeaderError(ValueError):
    """A shard's header cannot be believed: what was found, and what was expected.

    The message is cut where a hostile name would make it endless.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE // 2]} … {message[-_MAX_MESSAGE // 2 :]}"
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of one shard. `start` and `stop` are offsets into the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in its shard."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says it holds, checked. Entries stand in the order of their bytes."""

    shard: str
    file_size: int
    data_start: int
    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def read_header(storage: Storage, shard: str) -> ShardHeader:
    """Read and check the header of one shard.

    Raises:
        HeaderError: the file is not a sound safetensors file.
    """
    file_size = storage.list().get(shard, 0)
    if file_size < 8:
        raise HeaderError(f"the file has {file_size} bytes, expected at least the 8 of its length")
    try:
        length = int.from_bytes(storage.read(shard, 0, 8), "little")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(
                f"header length {length:,}, expected at most {MAX_HEADER_BYTES:,} bytes"
            )
        if 8 + length > file_size:
            raise HeaderError(
                f"header length {length:,}, but the file has {file_size:,} bytes: truncated, or "
                "not a safetensors file"
            )
        raw = storage.read(shard, 8, 8 + length)
    except StorageError as error:
        raise HeaderError(str(error)) from error
    document = _parse(raw)
    metadata = _metadata(document.pop("__metadata__", None))
    data_start = 8 + length
    entries = _entries(document, shard, data_start, file_size)
    return ShardHeader(shard, file_size, data_start, entries, metadata)


def _parse(raw: bytes) -> dict[str, object]:
    if raw[:1] != b"{":
        raise HeaderError(f"header begins with {raw[:1]!r}, expected '{{'")
    if len(raw) > _DENSE_FROM:
        brackets, commas = raw.count(b"[") + raw.count(b"{"), raw.count(b",")
        if max(brackets, commas) * _BYTES_A_MARK > len(raw):
            raise HeaderError(
                f"{brackets:,} brackets and {commas:,} commas in a header of {len(raw):,} bytes: "
                "not a list of tensors"
            )

    def object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen = Counter(name for name, _ in pairs)
            raise HeaderError(f"{_short(seen.most_common(1)[0][0])} appears twice in the header")
        return result

    def no_constant(text: str) -> None:
        raise HeaderError(f"{text} in the header: not JSON")

    def number(text: str) -> int:
        if text == "-0":  # Rust's reader takes it for a floating-point number, and no size is one
            raise HeaderError("-0 in the header: not a size")
        return int(text)

    # A function for each number is slow, and a name may hold anything.
    parse_int = number if _NEGATIVE_ZERO.search(raw) else None
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=object_of,
            parse_constant=no_constant,
            parse_int=parse_int,
        )
    except HeaderError:
        raise
    except UnicodeDecodeError as error:
        raise HeaderError(f"header is not UTF-8 at byte {8 + error.start}") from error
    except RecursionError as error:
        raise HeaderError("header is nested too deeply") from error
    except ValueError as error:
        raise HeaderError(f"header is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise HeaderError(f"header is a {type(document).__name__}, expected an object")
    return document


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HeaderError("__metadata__ is not an object of strings")
    return value


def _entries(
    document: dict[str, object], shard: str, data_start: int, file_size: int
) -> tuple[TensorEntry, ...]:
    shard = intern(shard)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    entries = []
    for name, value in document.items():
        dtype, shape, begin, end = _fields(name, value)
        shape = shapes.setdefault(shape, shape)
        _check_range(name, dtype, shape, begin, end, file_size - data_start)
        entry = TensorEntry(name, intern(dtype), shape, shard, data_start + begin, data_start + end)
        entries.append(entry)
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_cover(entries, data_start, file_size)
    return tuple(entries)


def _fields(name: str, value: object) -> tuple[str, tuple[int, ...], int, int]:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HeaderError(f"tensor name {name!r} is not valid Unicode") from error
    if not isinstance(value, dict):
        raise HeaderError(f"{name}: entry is a {type(value).__name__}, expected an object")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"{name}: dtype {dtype!r}, expected one of {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise HeaderError(
            f"{name}: shape {_short(shape)}, expected a list of sizes, each 0 to 2^63"
        )
    if len(shape) > _MAX_DIMENSIONS:
        raise HeaderError(
            f"{name}: shape has {len(shape):,} dimensions, expected at most {_MAX_DIMENSIONS}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise HeaderError(f"{name}: data_offsets {_short(offsets)}, expected two offsets")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_ELEMENTS


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_range(
    name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int, data_bytes: int
) -> None:
    if not begin <= end:
        raise HeaderError(f"{name}: data_offsets [{begin}, {end}] run backwards")
    if end > data_bytes:
        raise HeaderError(
            f"{name}: its bytes end at {end:,} of the data, but the file holds {data_bytes:,}: "
            "truncated"
        )
    bits = _element_count(name, shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise HeaderError(f"{name}: {dtype} of shape {_short(list(shape))} does not end on a byte")
    if bits // 8 != end - begin:
        raise HeaderError(
            f"{name}: {dtype} of shape {_short(list(shape))} takes {bits // 8:,} bytes, but "
            f"data_offsets give {end - begin:,}"
        )


def _element_count(name: str, shape: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    count = 1
    for size in shape:
        count *= size
        if count >= _MAX_ELEMENTS:
            raise HeaderError(f"{name}: shape {_short(list(shape))} overflows 2^63 elements")
    return count


def _check_cover(entries: Iterable[TensorEntry], data_start: int, file_size: int) -> None:
    position, previous = data_start, "the header"
    for entry in entries:
        if entry.start < position:
            raise HeaderError(
                f"{entry.name}: begins at byte {entry.start:,}, inside {previous} which ends at "
                f"{position:,}: overlap"
            )
        if entry.start > position:
            raise HeaderError(
                f"{entry.name}: begins at byte {entry.start:,}, but {previous} ends at "
                f"{position:,}: a hole of {entry.start - position:,} bytes"
            )
        position, previous = entry.stop, entry.name
    if position != file_size:
        raise HeaderError(
            f"{previous} ends at byte {position:,}, but the file has {file_size:,}: "
            f"{file_size - position:,} bytes belong to no tensor"
        )
