"""The journal of a byte pass: finished work, so that an interrupted run goes on where it stopped.

A text file of JSON lines. The first says of which files the results are; each further line is
`{"key": …, "result": …}`. A line is written with one call when its work is done, so that what
stands there survives the process being killed; a last line that was torn is dropped, and the work
done again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from nvfp4check import __version__
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.findings import CheckError

SCHEMA = "nvfp4check/journal/1"


def fingerprint(checkpoint: Checkpoint) -> str:
    """Name the state of a checkpoint's shards, and the tool that reads them.

    Names, sizes and times of change (or a server's tags) are in it, and no content: to hash that
    would be the pass itself.
    """
    root = checkpoint.location
    if "://" not in root:
        root = str(Path(root).resolve())
    digest = hashlib.sha256(f"{__version__}\n{root}\n".encode("utf-8", "surrogateescape"))
    for name in sorted(checkpoint.shards):
        changed = checkpoint.storage.version(name)
        digest.update(f"{name}\0{checkpoint.files.get(name)}\0{changed}\n".encode())
    return digest.hexdigest()


def default_path(checkpoint: Checkpoint) -> Path:
    """Give the journal's place in the user's cache, the same for every run on these files."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "nvfp4check" / f"{fingerprint(checkpoint)[:24]}.jsonl"


class Journal:
    """An open journal: what an earlier run finished, and a place to add to it."""

    def __init__(self, path: Path, subject: str, *, resume: bool) -> None:
        """Open the journal, keeping what an earlier run on the same files left when resuming.

        Raises:
            CheckError: the file cannot be written, or another run holds it.
        """
        self.path = path
        self.results: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise CheckError(f"{path}: journal cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise CheckError(f"{path}: another run is writing this journal; wait for it") from error
        header = _line({"schema": SCHEMA, "subject": subject})
        keep = self._read(header) if resume else 0
        self._file.truncate(keep)
        if not keep:
            self._write(header)

    def _read(self, header: bytes) -> int:
        """Take over the results that stand there whole; return where they end."""
        self._file.seek(0)
        if self._file.readline() != header:
            return 0
        end = len(header)
        for line in self._file:
            entry = _entry(line)
            if entry is None:
                break
            self.results[entry[0]] = entry[1]
            end += len(line)
        return end

    def add(self, key: str, result: object) -> None:
        """Write down a finished piece of work."""
        self._write(_line({"key": key, "result": result}))

    def add_all(self, results: Mapping[str, object]) -> None:
        """Write down several finished pieces of work."""
        self._write(b"".join(_line({"key": k, "result": r}) for k, r in results.items()))

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise CheckError(f"{self.path}: journal cannot be written: {error.strerror}") from error

    def remove(self) -> None:
        """Delete the journal: the run is complete."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _entry(line: bytes) -> tuple[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("key"), str):
        return None
    return value["key"], value.get("result")
