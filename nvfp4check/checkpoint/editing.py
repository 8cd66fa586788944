"""A checkpoint in a local directory edited in place: the way faults are planted in a copy.

Bytes are patched where they lie; a change of names, shapes or tensors rewrites the shard. The
index follows unless told not to, so that one edit plants one fault. A file with a second hard link
is copied before its first change, so that a copy made of links never reaches the original. Holes
of sparse files stay holes.
"""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.header import DTYPE_BITS, ShardHeader, TensorEntry, read_header
from nvfp4check.checkpoint.index import INDEX_FILE
from nvfp4check.checkpoint.storage import LocalStorage
from nvfp4check.checkpoint.writing import TensorSpec, encode_header, frame_header

#: The new content of a tensor: its spec, and its bytes or the place they are copied from.
_Piece = tuple[TensorSpec, bytes | TensorEntry]
_COPY_BYTES = 1 << 24


def copy_checkpoint(source: str | Path, target: str | Path) -> "CheckpointEditor":
    """Copy a checkpoint's directory, and open the copy for editing."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    return CheckpointEditor(target)


def link_checkpoint(source: str | Path, target: str | Path) -> "CheckpointEditor":
    """Make a copy of hard links, and open it for editing.

    Only files that belong to the checkpoint are taken, through links where they are links; a file
    system that has no hard links gets copies.
    """
    storage = LocalStorage(source)
    root = Path(source).resolve()
    for name in storage.list():
        place = Path(target) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        file = (root / name).resolve()
        try:
            os.link(file, place)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            copy_file(file, place)
    return CheckpointEditor(target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, leaving holes where it has holes."""
    with source.open("rb") as reader, target.open("wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        _copy_range(reader, writer, 0, size)
        writer.truncate(size)


class CheckpointEditor:
    """Edits of one checkpoint. Nothing is cached: every edit sees the files as they are."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)

    def __fspath__(self) -> str:
        return str(self.path)

    # Looking

    @property
    def shards(self) -> list[str]:
        """Names of the safetensors files."""
        return sorted(path.name for path in self.path.glob("*.safetensors"))

    def header(self, shard: str) -> ShardHeader:
        """Read a shard's header.

        Raises:
            HeaderError: it is not sound.
        """
        return read_header(LocalStorage(self.path), shard)

    def entries(self) -> dict[str, TensorEntry]:
        """Find every tensor; of one that stands twice, the first place."""
        found: dict[str, TensorEntry] = {}
        for shard in self.shards:
            for entry in self.header(shard).entries:
                found.setdefault(entry.name, entry)
        return found

    def entry(self, name: str) -> TensorEntry:
        """Find one tensor.

        Raises:
            KeyError: no shard holds it.
        """
        return self.entries()[name]

    # Bytes

    def read(self, name: str) -> bytes:
        """Read a tensor's bytes."""
        return self._read(self.entry(name))

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Map a tensor's bytes for writing.

        The array has the tensor's shape, with a last axis of the bytes of an element where these
        are more than one.
        """
        entry = self.entry(name)
        self._own(entry.shard)
        size = DTYPE_BITS[entry.dtype] // 8
        shape = (*entry.shape, size) if size > 1 else entry.shape
        return np.memmap(
            self.path / entry.shard, np.uint8, mode="r+", offset=entry.start, shape=shape or (1,)
        )

    def array(self, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Map a tensor for writing as numbers of a numpy dtype of the same width."""
        entry = self.entry(name)
        self._own(entry.shard)
        return np.memmap(
            self.path / entry.shard,
            dtype,
            mode="r+",
            offset=entry.start,
            shape=entry.shape or (1,),
        )

    def patch(self, name: str, data: bytes, at: int = 0) -> None:
        """Overwrite bytes of a tensor from byte `at` of it on."""
        entry = self.entry(name)
        if not 0 <= at <= at + len(data) <= entry.nbytes:
            raise ValueError(f"{name}: bytes {at} to {at + len(data)} of {entry.nbytes}")
        self._own(entry.shard)
        with (self.path / entry.shard).open("r+b") as file:
            file.seek(entry.start + at)
            file.write(data)

    def set_scalar(self, name: str, value: float) -> None:
        """Overwrite a tensor of one F32 or BF16 element; BF16 takes the value's upper half."""
        raw = struct.pack("<f", value)
        self.patch(name, raw[2:] if self.entry(name).dtype == "BF16" else raw)

    def scalar(self, name: str) -> float:
        """Read the first element of an F32 tensor."""
        return float(np.frombuffer(self._read(self.entry(name)), "<f4")[0])

    # Tensors

    def rename(self, old: str, new: str, *, index: bool = True) -> None:
        """Give a tensor another name."""
        self._rebuild(old, lambda spec, data: [(spec._replace(name=new), data)])
        if index:
            self._move_in_index(old, new, self.entry(new).shard)

    def drop(self, name: str, *, index: bool = True) -> None:
        """Take a tensor out of its shard."""
        self._rebuild(name, lambda spec, data: [])
        if index:
            self._move_in_index(name, None, "")

    def drop_all(self, names: Collection[str], *, index: bool = True) -> None:
        """Take many tensors out, rewriting each shard once."""
        for shard in self.shards:
            pieces = self._pieces(shard)
            kept = [piece for piece in pieces if piece[0].name not in names]
            if len(kept) < len(pieces):
                self._rewrite(shard, kept)
        if index and (self.path / INDEX_FILE).exists():
            with self.edit_json(INDEX_FILE) as document:
                for name in names:
                    document["weight_map"].pop(name, None)
            self._move_in_index(None, None, "")

    def replace(
        self,
        name: str,
        data: bytes,
        *,
        dtype: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Give a tensor other content, and if told another dtype and shape."""
        old = self.entry(name)
        spec = TensorSpec(name, dtype or old.dtype, old.shape if shape is None else shape)
        self._rebuild(name, lambda _spec, _data: [(_checked(spec, data), data)])

    def reshape(self, name: str, shape: tuple[int, ...]) -> None:
        """Give a tensor another shape of as many bytes."""
        self._rebuild(name, lambda spec, data: [(_checked(spec._replace(shape=shape), data), data)])

    def add(
        self,
        name: str,
        data: bytes,
        *,
        dtype: str,
        shape: tuple[int, ...],
        shard: str | None = None,
        index: bool = True,
    ) -> None:
        """Put a tensor at the end of a shard, the last one where none is named."""
        shard = self.shards[-1] if shard is None else shard
        spec = TensorSpec(name, dtype, shape)
        self._rewrite(shard, [*self._pieces(shard), (_checked(spec, data), data)])
        if index:
            self._move_in_index(None, name, shard)

    def copy(self, name: str, shard: str, *, new: str | None = None, index: bool = False) -> None:
        """Put a second copy of a tensor into a shard, under the same name or another."""
        entry = self.entry(name)
        self.add(
            new or name,
            self._read(entry),
            dtype=entry.dtype,
            shape=entry.shape,
            shard=shard,
            index=index,
        )

    def move(self, name: str, shard: str, *, index: bool = True) -> None:
        """Move a tensor into another shard."""
        entry, data = self.entry(name), self._read(self.entry(name))
        self.drop(name, index=False)
        self.add(name, data, dtype=entry.dtype, shape=entry.shape, shard=shard, index=index)

    def swap(self, first: str, second: str) -> None:
        """Exchange the bytes of two tensors of one size."""
        one, two = self._read(self.entry(first)), self._read(self.entry(second))
        if len(one) != len(two):
            raise ValueError(f"{first} has {len(one)} bytes, {second} {len(two)}")
        self.patch(first, two)
        self.patch(second, one)

    # Files

    def write_header(self, shard: str, document: Mapping[str, object] | bytes) -> None:
        """Give a shard another header, sound or not, before the same data."""
        with (self.path / shard).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(8 + length)
            data_start = file.tell()
            self._replace(shard, frame_header(document), [(data_start, None)])

    @contextmanager
    def edit_header(self, shard: str) -> Iterator[dict[str, Any]]:
        """Yield a shard's header as JSON; what becomes of it is written back."""
        with (self.path / shard).open("rb") as file:
            document = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield document
        self.write_header(shard, document)

    @contextmanager
    def edit_json(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield a JSON file's content, empty for a new file; what becomes of it is written back."""
        path = self.path / name
        document = json.loads(path.read_text()) if path.exists() else {}
        yield document
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(document, indent=2))

    def truncate(self, name: str, size: int) -> None:
        """Cut a file to a size; a negative size cuts that many bytes off the end."""
        path = self.path / name
        self._own(name)
        os.truncate(path, size if size >= 0 else path.stat().st_size + size)

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return (self.path / name).stat().st_size

    def write_file(self, name: str, data: bytes | str) -> None:
        """Write a whole file."""
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).write_bytes(data.encode() if isinstance(data, str) else data)

    def drop_file(self, name: str) -> None:
        """Delete a file."""
        (self.path / name).unlink()

    # How

    def _own(self, name: str) -> None:
        """Give the checkpoint a file of its own where the file has another link elsewhere."""
        path = self.path / name
        if path.stat().st_nlink > 1:
            temporary = path.with_name(path.name + ".new")
            copy_file(path, temporary)
            temporary.replace(path)

    def _pieces(self, shard: str) -> list[_Piece]:
        return [
            (TensorSpec(entry.name, entry.dtype, entry.shape), entry)
            for entry in self.header(shard).entries
        ]

    def _read(self, entry: TensorEntry) -> bytes:
        return LocalStorage(self.path).read(entry.shard, entry.start, entry.stop)

    def _rebuild(
        self, name: str, change: Callable[[TensorSpec, bytes | TensorEntry], list[_Piece]]
    ) -> None:
        shard = self.entry(name).shard
        pieces: list[_Piece] = []
        for spec, data in self._pieces(shard):
            pieces += change(spec, data) if spec.name == name else [(spec, data)]
        self._rewrite(shard, pieces)

    def _rewrite(self, shard: str, pieces: list[_Piece]) -> None:
        header = encode_header((spec for spec, _ in pieces), self.header(shard).metadata)
        contents: list[bytes | tuple[int, int | None]] = [
            data if isinstance(data, bytes) else (data.start, data.stop) for _, data in pieces
        ]
        self._replace(shard, header, contents)

    def _replace(
        self, shard: str, header: bytes, contents: Sequence[bytes | tuple[int, int | None]]
    ) -> None:
        """Write a shard anew: a header, then bytes and ranges of the old file, to its end."""
        path = self.path / shard
        temporary = path.with_suffix(".new")
        with path.open("rb") as source, temporary.open("wb") as target:
            size = os.fstat(source.fileno()).st_size
            target.write(header)
            for content in contents:
                if isinstance(content, bytes):
                    target.write(content)
                else:
                    start, stop = content
                    _copy_range(source, target, start, size if stop is None else stop)
            target.truncate(target.tell())
        temporary.replace(path)

    def _move_in_index(self, old: str | None, new: str | None, shard: str) -> None:
        if not (self.path / INDEX_FILE).exists():
            return
        with self.edit_json(INDEX_FILE) as index:
            index["weight_map"].pop(old, None)
            if new is not None:
                index["weight_map"][new] = shard
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] = sum(
                    entry.nbytes for entry in self.entries().values()
                )


def _checked(spec: TensorSpec, data: bytes | TensorEntry) -> TensorSpec:
    found = len(data) if isinstance(data, bytes) else data.nbytes
    if found != spec.nbytes:
        raise ValueError(
            f"{spec.name}: {found} bytes for {spec.dtype} {spec.shape}, expected {spec.nbytes}"
        )
    return spec


def _copy_range(source: BinaryIO, target: BinaryIO, start: int, stop: int) -> None:
    """Copy bytes to where the target stands, seeking over the holes of the source."""
    reader = source.fileno()
    if stop > os.fstat(reader).st_size:
        raise EOFError(f"{source.name} ends before byte {stop}")
    while start < stop:
        data_at = _next_data(reader, start, stop)
        target.seek(data_at - start, os.SEEK_CUR)
        start = data_at
        end = min(os.lseek(reader, start, os.SEEK_HOLE), stop) if start < stop else stop
        while start < end:
            data = os.pread(reader, min(_COPY_BYTES, end - start), start)
            if not data:
                raise EOFError(f"{source.name} ends at byte {start}, expected {stop}")
            target.write(data)
            start += len(data)


def _next_data(file: int, start: int, stop: int) -> int:
    """Find where data begins at or after a place, at most `stop`."""
    try:
        return min(os.lseek(file, start, os.SEEK_DATA), stop)
    except OSError as error:
        if error.errno != errno.ENXIO:  # only a hole follows
            raise
        return stop
