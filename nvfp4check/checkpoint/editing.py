"""A checkpoint in a local directory edited in place: the way faults are planted in a copy.

Bytes are patched where they lie; a change of names, shapes or tensors rewrites the shard. The
index follows unless told not to, so that one edit plants one fault.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
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

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Map a tensor's bytes for writing.

        The array has the tensor's shape, with a last axis of the bytes of an element where these
        are more than one.
        """
        entry = self.entry(name)
        size = DTYPE_BITS[entry.dtype] // 8
        shape = (*entry.shape, size) if size > 1 else entry.shape
        return np.memmap(
            self.path / entry.shard, np.uint8, mode="r+", offset=entry.start, shape=shape or (1,)
        )

    def array(self, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Map a tensor for writing as numbers of a numpy dtype of the same width."""
        entry = self.entry(name)
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
        with (self.path / entry.shard).open("r+b") as file:
            file.seek(entry.start + at)
            file.write(data)

    def set_scalar(self, name: str, value: float) -> None:
        """Overwrite a tensor of one F32 or BF16 element; BF16 takes the value's upper half."""
        raw = struct.pack("<f", value)
        self.patch(name, raw[2:] if self.entry(name).dtype == "BF16" else raw)

    def scalar(self, name: str) -> float:
        """Read the first element of an F32 tensor."""
        return float(self.array(name, "<f4").reshape(-1)[0])

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
            data = file.read()
        (self.path / shard).write_bytes(frame_header(document) + data)

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
        path.write_text(json.dumps(document, indent=2))

    def truncate(self, name: str, size: int) -> None:
        """Cut a file to a size; a negative size cuts that many bytes off the end."""
        path = self.path / name
        os.truncate(path, size if size >= 0 else path.stat().st_size + size)

    def write_file(self, name: str, data: bytes | str) -> None:
        """Write a whole file."""
        (self.path / name).write_bytes(data.encode() if isinstance(data, str) else data)

    def drop_file(self, name: str) -> None:
        """Delete a file."""
        (self.path / name).unlink()

    # How

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
        path = self.path / shard
        metadata = self.header(shard).metadata
        temporary = path.with_suffix(".new")
        with path.open("rb") as source, temporary.open("wb") as target:
            target.write(encode_header((spec for spec, _ in pieces), metadata))
            for _, data in pieces:
                if isinstance(data, bytes):
                    target.write(data)
                else:
                    _copy_range(source, target, data.start, data.stop)
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
    source.seek(start)
    while start < stop:
        data = source.read(min(_COPY_BYTES, stop - start))
        if not data:
            raise EOFError(f"{source.name} ends at byte {start}, expected {stop}")
        target.write(data)
        start += len(data)
