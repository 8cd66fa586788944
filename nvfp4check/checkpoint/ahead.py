"""Reading ahead: ranges that will be asked for are requested before, several side by side.

For storages that are read over a network, where each request waits. What was requested and not yet
taken never holds more than `AHEAD_BYTES` beside the largest single range.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.remote import CONNECTIONS
from nvfp4check.checkpoint.storage import Range, Storage

AHEAD_BYTES = 32 << 20
#: Bytes in which a long tensor is read.
PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes `start` to `stop` of a file."""

    name: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


class Ahead:
    """A storage that has a plan of its reads. A read that is not in the plan is simply made."""

    def __init__(self, storage: Storage, plan: Iterable[FileRange]) -> None:
        self._storage = storage
        self._plan = deque(plan)
        self._requested: deque[tuple[FileRange, Future[bytes]]] = deque()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="read ahead")

    @property
    def location(self) -> str:
        """Where the files are, as the user named it."""
        return self._storage.location

    @property
    def unsafe(self) -> dict[str, str]:
        """Names that are there but lead out of the checkpoint, each with the reason."""
        return self._storage.unsafe

    def list(self) -> dict[str, int]:
        """Name the files, each with its size in bytes."""
        return self._storage.list()

    def view(self, name: str) -> memoryview | None:
        """Give what the storage below gives."""
        return self._storage.view(name)

    def version(self, name: str) -> str:
        """Give what the storage below gives."""
        return self._storage.version(name)

    def gather(self, name: str, ranges: Iterable[Range]) -> None:
        """Have the storage below do it."""
        self._storage.gather(name, ranges)

    def giving_up(self) -> AbstractContextManager[None]:
        """Have the storage below do it."""
        return self._storage.giving_up()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of a file; ranges of the plan before it are passed over.

        Raises:
            StorageError: the file cannot be read, or ends before `stop`.
        """
        wanted = FileRange(name, start, stop)
        self._request()
        if not any(part == wanted for part, _ in self._requested):
            return self._storage.read(name, start, stop)
        while True:
            part, future = self._requested.popleft()
            self._bytes -= part.nbytes
            if part == wanted:
                self._request()
                return future.result()
            future.cancel()

    def _request(self) -> None:
        """Request what comes next, as far as there is room for it."""
        while self._plan and (
            not self._requested or self._bytes + self._plan[0].nbytes <= AHEAD_BYTES
        ):
            part = self._plan.popleft()
            self._bytes += part.nbytes
            future = self._pool.submit(self._storage.read, part.name, part.start, part.stop)
            self._requested.append((part, future))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with nullcontext() if kind is None else self.giving_up():
            self._pool.shutdown(wait=True, cancel_futures=True)


class RangedBytes:
    """The bytes of a tensor in a file that is not mapped, read piece by piece as they are sliced.

    One piece is kept: a slice that lies within it costs nothing.
    """

    def __init__(self, storage: Storage, entry: TensorEntry) -> None:
        self._storage = storage
        self._entry = entry
        self._number = -1
        self._piece: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self._entry.nbytes

    def __getitem__(self, part: slice) -> npt.NDArray[np.uint8]:
        """Give a contiguous slice, copied only where it lies in two pieces.

        Raises:
            StorageError: the bytes cannot be read.
        """
        start, stop, step = part.indices(self.size)
        if step != 1:
            raise ValueError(f"a slice with step {step}, expected contiguous bytes")
        numbers = range(start // PIECE_BYTES, -(-stop // PIECE_BYTES))
        cuts = []
        for number in numbers:
            first = number * PIECE_BYTES
            piece = self._read(number)
            cuts.append(piece[max(start - first, 0) : stop - first])
        if len(cuts) == 1:
            return cuts[0]
        return np.concatenate(cuts) if cuts else np.empty(0, np.uint8)

    def _read(self, number: int) -> npt.NDArray[np.uint8]:
        if number != self._number:
            part = pieces_of(self._entry)[number]
            data = self._storage.read(part.name, part.start, part.stop)
            self._piece, self._number = np.frombuffer(data, np.uint8), number
        return self._piece


def pieces_of(entry: TensorEntry) -> list[FileRange]:
    """Cut a tensor into the pieces that `RangedBytes` reads."""
    return [
        FileRange(entry.shard, start, min(start + PIECE_BYTES, entry.stop))
        for start in range(entry.start, entry.stop, PIECE_BYTES)
    ]
