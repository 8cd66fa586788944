"""Where a checkpoint's files lie: a listing, ranged reads, and mapped memory where there is any.

A checkpoint is hostile until it is read. No name in it, and no link in it, leads out of its
directory: what would is listed as unsafe and never opened.
"""

import mmap
import os
import stat
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from nvfp4check.findings import CheckError

#: Hidden folders hold no part of a checkpoint (`.git`, `.cache`); a tree deeper or larger than
#: these limits is no checkpoint.
_MAX_DEPTH = 4
_MAX_FILES = 100_000


#: The first byte, and the one after the last.
Range = tuple[int, int]


class StorageError(Exception):
    """A file of the checkpoint could not be read: what was found there instead."""


class Storage(Protocol):
    """The files of one checkpoint, read by name and byte range."""

    @property
    def location(self) -> str:
        """Where the files are, as the user named it."""
        ...

    @property
    def unsafe(self) -> dict[str, str]:
        """Names that are there but lead out of the checkpoint, each with the reason."""
        ...

    def list(self) -> dict[str, int]:
        """Name the files, with `/` between folders, each with its size in bytes."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of a file.

        Raises:
            StorageError: the file cannot be read, or ends before `stop`.
        """
        ...

    def view(self, name: str) -> memoryview | None:
        """Give the whole file as mapped memory, or None where files are only read by ranges.

        Raises:
            StorageError: the file is there but cannot be mapped.
        """
        ...

    def gather(self, name: str, ranges: Iterable[Range]) -> None:
        """Hear of small ranges of a file that will be read; what waits for a network reads them.

        Raises:
            StorageError: they cannot be read.
        """
        ...

    def giving_up(self) -> AbstractContextManager[None]:
        """End reads that wait for a server, as long as the context is open: nobody takes them."""
        ...

    def version(self, name: str) -> str:
        """Say what changes when the file does, as far as that is known without reading it."""
        ...


def unsafe_name(name: str) -> str | None:
    """Say why a relative file name must not be opened, or None when it is harmless."""
    if not name:
        return "empty name"
    if "\0" in name or "\\" in name:
        return "contains a NUL or a backslash"
    if name.startswith("/") or name[1:2] == ":":
        return "absolute path"
    parts = name.split("/")
    if ".." in parts:
        return "climbs out of the checkpoint with '..'"
    if "" in parts or "." in parts:
        return "not a plain relative path"
    return None


class LocalStorage:
    """A checkpoint in a local directory. Files are mapped on first use and stay mapped."""

    def __init__(self, directory: str | Path) -> None:
        self._location = str(directory)
        if not self._location:
            raise CheckError(
                "an empty path names no checkpoint; give its directory, or . for this one"
            )
        root = Path(directory)
        if not root.exists():
            raise CheckError(
                f"{directory}: no such directory; give the directory that holds the "
                "checkpoint's .safetensors files"
            )
        if not root.is_dir():
            raise CheckError(
                f"{directory}: is a file, expected a directory; give the directory that holds "
                "config.json and the .safetensors files"
            )
        self._root = root.resolve()
        self._allowed = (self._root, *_hub_blobs(self._root))
        self._files: dict[str, int] | None = None
        self._unsafe: dict[str, str] = {}
        self._maps: dict[str, memoryview] = {}

    @property
    def location(self) -> str:
        """Where the files are, as the user named it."""
        return self._location

    @property
    def unsafe(self) -> dict[str, str]:
        """Names that are there but lead out of the checkpoint, each with the reason."""
        self.list()
        return self._unsafe

    def list(self) -> dict[str, int]:
        """Name the files, with `/` between folders, each with its size in bytes.

        Raises:
            CheckError: the directory cannot be read, or holds more than any checkpoint does.
        """
        if self._files is None:
            files: dict[str, int] = {}
            self._walk(self._root, "", 0, files)
            self._files = dict(sorted(files.items()))
        return self._files

    def _walk(self, directory: Path, prefix: str, depth: int, files: dict[str, int]) -> None:
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            if depth:
                self._unsafe[prefix.rstrip("/")] = f"cannot be listed: {error.strerror}"
                return
            raise CheckError(f"{self._location}: cannot be listed: {error.strerror}") from error
        for entry in entries:
            name = prefix + entry.name
            why = unsafe_name(name)
            if why is None and not _encodable(name):
                why = "name is not valid UTF-8"
                name = name.encode("utf-8", "backslashreplace").decode()
            if why is None and entry.is_symlink():
                why = self._leads_out(directory / entry.name)
            if why is not None:
                self._unsafe[name] = why
                continue
            if entry.is_dir(follow_symlinks=False):
                if depth < _MAX_DEPTH and not entry.name.startswith("."):
                    self._walk(directory / entry.name, name + "/", depth + 1, files)
                continue
            try:
                status = entry.stat()
            except OSError:  # a link to nothing: the file is missing
                continue
            if stat.S_ISREG(status.st_mode):
                files[name] = status.st_size
            if len(files) > _MAX_FILES:
                raise CheckError(
                    f"{self._location}: more than {_MAX_FILES:,} files; give the directory of one "
                    "checkpoint"
                )

    def _leads_out(self, path: Path) -> str | None:
        try:
            target = path.resolve()
        except (OSError, RuntimeError):
            return "link that runs in a circle"
        if any(target.is_relative_to(allowed) for allowed in self._allowed):
            return None
        return f"link that leads out of the checkpoint, to {target}"

    def _path(self, name: str) -> Path:
        why = unsafe_name(name) or self.unsafe.get(name)
        if why is not None:
            raise StorageError(f"{name}: {why}; not opened")
        if name not in self.list():
            raise StorageError(f"{name}: not in {self._location}")
        return self._root / name

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of a file.

        Raises:
            StorageError: the file cannot be read, or ends before `stop`.
        """
        path = self._path(name)
        size = self.list()[name]
        if not 0 <= start <= stop <= size:
            raise StorageError(
                f"{name}: bytes {start:,} to {stop:,} asked, the file has {size:,} bytes"
            )
        try:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise StorageError(f"{name}: cannot be read: {error.strerror}") from error
        if len(data) != stop - start:
            raise StorageError(
                f"{name}: ends after {start + len(data):,} bytes, expected {stop:,}; "
                "is it still being written?"
            )
        return data

    def view(self, name: str) -> memoryview | None:
        """Give the whole file as mapped, read-only memory.

        Raises:
            StorageError: the file is there but cannot be mapped.
        """
        if name not in self._maps:
            path = self._path(name)
            if self.list()[name] == 0:
                return memoryview(b"")
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise StorageError(f"{name}: cannot be mapped: {error}") from error
            self._maps[name] = memoryview(mapped)
        return self._maps[name]

    def gather(self, name: str, ranges: Iterable[Range]) -> None:
        """Do nothing: here no read waits."""

    def giving_up(self) -> AbstractContextManager[None]:
        """Do nothing: here no read waits."""
        return nullcontext()

    def version(self, name: str) -> str:
        """The file's time of change, in nanoseconds."""
        try:
            return str((self._root / name).stat().st_mtime_ns)
        except OSError:
            return ""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}}


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _hub_blobs(root: Path) -> tuple[Path, ...]:
    """The one place outside where links may lead: `blobs` of a Hugging Face cache.

    There a snapshot is `models--ORG--NAME/snapshots/REVISION`, and each file of it is a link to
    `../../blobs/SHA`.
    """
    if root.parent.name != "snapshots":
        return ()
    blobs = root.parent.parent / "blobs"
    return (blobs,) if blobs.is_dir() and not blobs.is_symlink() else ()
