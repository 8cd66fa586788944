"""What storages over a network share: checked names and lengths, and patience with what may pass.

A read gives exactly the bytes asked. What the checkpoint is at fault for (a file that is not there
or has another length than it had) is a `StorageError`, which rules report; what the network or the
server is at fault for ends the run as a `CheckError`, after attempts with growing delays where
another attempt can help. No more is ever taken from a server than was asked of it.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TypeVar

from nvfp4check.checkpoint.patience import PassingError, Patience, Retry
from nvfp4check.checkpoint.storage import Range, StorageError, unsafe_name

#: Requests that wait for the network side by side.
CONNECTIONS = 8
#: A file list longer than this is no checkpoint's.
MAX_FILES = 100_000
#: Bytes of one request; a longer read is several, side by side, each tried again by itself.
REQUEST_BYTES = 8 << 20
#: Small ranges with no more than this between them are one request.
_GAP = 16 << 10
_GATHERED_BYTES = 256 << 10

Item = TypeVar("Item")
Result = TypeVar("Result")


class RemoteStorage:
    """A storage whose files come over a network, by `_find` and `_fetch` of its subclass."""

    def __init__(self, location: str, retry: Retry | None = None) -> None:
        self._location = location.rstrip("/")
        self._patience = Patience(retry or Retry())
        self._files: dict[str, int] | None = None
        #: JSON read whole; the index is read both for its shards and for itself.
        self._documents: dict[tuple[str, int, int], bytes] = {}
        #: Small ranges that were read before they were asked for, and the files they lie in.
        self._gathered: dict[tuple[str, int, int], bytes] = {}
        self._gathered_files: set[str] = set()

    @property
    def location(self) -> str:
        """Where the files are, as the user named it."""
        return self._location

    @property
    def unsafe(self) -> dict[str, str]:
        """A remote listing has no links; unsafe names of the index are the index's."""
        return {}

    def list(self) -> dict[str, int]:
        """Name the files, each with its size in bytes.

        Raises:
            CheckError: the location cannot be reached, or there is nothing.
        """
        if self._files is None:
            self._files = dict(sorted(self._find().items()))
        return self._files

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of a file.

        Raises:
            StorageError: there is no such file, or it is not as long as that.
            CheckError: the server does not give it.
        """
        self._check(name, start, stop)
        place = (name, start, stop)
        known = self._documents.get(place) or self._gathered.get(place)
        if known is not None:
            return known
        starts = range(start, stop, REQUEST_BYTES)
        if len(starts) <= 1:
            data = self._read(name, start, stop) if start < stop else b""
        else:
            parts = self._side_by_side(
                lambda at: self._read(name, at, min(at + REQUEST_BYTES, stop)), starts
            )
            data = b"".join(parts)
        if name.endswith(".json"):
            self._documents[place] = data
        return data

    def gather(self, name: str, ranges: Iterable[Range]) -> None:
        """Read small ranges of a file in few requests, and keep them for `read`; once a file.

        Raises:
            StorageError: there is no such file, or it is not as long as that.
            CheckError: the server does not give it.
        """
        if name in self._gathered_files:
            return
        wanted = sorted({part for part in ranges if part[0] < part[1]})
        for start, stop in wanted:
            self._check(name, start, stop)
        groups = _groups(wanted)
        found = self._side_by_side(lambda g: self._read(name, g[0][0], g[-1][1]), groups)
        for group, data in zip(groups, found, strict=True):
            for start, stop in group:
                at = group[0][0]
                self._gathered[name, start, stop] = data[start - at : stop - at]
        self._gathered_files.add(name)

    def view(self, name: str) -> memoryview | None:
        """Nothing remote is mapped."""
        return None

    def version(self, name: str) -> str:
        """Nothing is known of a file's version but its size."""
        return ""

    def _check(self, name: str, start: int, stop: int) -> None:
        why = unsafe_name(name)
        if why is not None:
            raise StorageError(f"{name}: {why}; not opened")
        size = self.list().get(name)
        if size is None:
            raise StorageError(f"{name}: not in {self._location}")
        if not 0 <= start <= stop <= size:
            raise StorageError(
                f"{name}: bytes {start:,} to {stop:,} asked, the file has {size:,} bytes"
            )

    def _read(self, name: str, start: int, stop: int) -> bytes:
        def attempt() -> bytes:
            data = self._fetch(name, start, stop)
            if len(data) != stop - start:
                raise PassingError(f"{len(data):,} bytes came, expected {stop - start:,}")
            return data

        return self._try(f"{self._location}/{name}", attempt)

    def _try(self, what: str, action: Callable[[], Result]) -> Result:
        return self._patience.run(what, action)

    def giving_up(self) -> AbstractContextManager[None]:
        """End reads that wait for the server, as long as the context is open."""
        return self._patience.giving_up()

    def _side_by_side(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Sequence[Result]:
        """Make requests; as soon as one fails, or Ctrl-C comes, the others are given up."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                futures = [pool.submit(function, item) for item in items]
                ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future in ended:
                        future.result()
                return [future.result() for future in futures]
            except StorageError:  # a file's fault, and not the server's
                raise
            except BaseException:
                with self.giving_up():
                    pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _find(self) -> dict[str, int]:
        raise NotImplementedError

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, object]:
        """What a worker process needs: where, and which files."""
        fresh: dict[str, object] = {
            "_documents": {},
            "_gathered": {},
            "_gathered_files": set(),
        }
        return {**self.__dict__, **fresh}


def _groups(ranges: Iterable[Range]) -> list[list[Range]]:
    """Put neighbouring ranges together, as long as little lies between them."""
    groups: list[list[Range]] = []
    for start, stop in ranges:
        if (
            groups
            and start - groups[-1][-1][1] <= _GAP
            and stop - groups[-1][0][0] <= _GATHERED_BYTES
        ):
            groups[-1].append((start, stop))
        else:
            groups.append([(start, stop)])
    return groups
