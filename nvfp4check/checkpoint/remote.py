"""Checkpoints elsewhere, read by byte ranges: http and https, and every URL that fsspec opens.

A read gives exactly the bytes asked, or fails: a body of another length, a refused range and a
busy server (429, 5xx) are tried again with growing delays, and then are errors. No more is ever
taken from a server than was asked of it.

A web server has no listing: its files are the known names, and the shards that the index names.
"""

import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nvfp4check.checkpoint.index import INDEX_FILE, read_index
from nvfp4check.checkpoint.storage import StorageError, unsafe_name
from nvfp4check.findings import CheckError

_TIMEOUT_SECONDS = 60
_CONNECTIONS = 8
_LONGEST_DELAY = 60.0
_KNOWN_FILES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    INDEX_FILE,
    "model.safetensors",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
)

#: Base errors of the libraries that fsspec's file systems reach the network with.
_BACKEND_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("requests", "RequestException"),
)


class _RetryableError(Exception):
    """A failure that may pass. `delay` is what the server asked to wait, if it did."""

    def __init__(self, why: str, delay: float | None = None) -> None:
        super().__init__(why)
        self.delay = delay


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently a read is tried again; each delay is twice the last."""

    attempts: int = 6
    first_delay: float = 0.5
    sleep: Callable[[float], None] = time.sleep

    def run(self, what: str, action: Callable[[], bytes]) -> bytes:
        """Do an action until it succeeds.

        Raises:
            StorageError: every attempt failed; the last reason is given.
        """
        delay = self.first_delay
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except _RetryableError as error:
                if attempt == self.attempts:
                    message = f"{what}: {error}, after {attempt} attempts"
                    raise StorageError(message) from error
                self.sleep(min(max(delay, error.delay or 0.0), _LONGEST_DELAY))
                delay *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")


class _RemoteStorage:
    """What remote storages share: names checked, lengths checked, attempts repeated."""

    def __init__(self, location: str, retry: Retry | None = None) -> None:
        self._location = location.rstrip("/")
        self._retry = retry or Retry()
        self._files: dict[str, int] | None = None
        #: JSON read whole; the index is read both for its shards and for itself.
        self._documents: dict[tuple[str, int, int], bytes] = {}

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
            CheckError: the location cannot be reached.
        """
        if self._files is None:
            self._files = dict(sorted(self._find().items()))
        return self._files

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of a file.

        Raises:
            StorageError: the file cannot be read, or is not as long as that.
        """
        why = unsafe_name(name)
        if why is not None:
            raise StorageError(f"{name}: {why}; not opened")
        if start == stop:
            return b""

        def attempt() -> bytes:
            data = self._fetch(name, start, stop)
            if len(data) != stop - start:
                raise _RetryableError(f"{len(data):,} bytes came, expected {stop - start:,}")
            return data

        place = (name, start, stop)
        if place in self._documents:
            return self._documents[place]
        data = self._retry.run(f"{self._location}/{name}", attempt)
        if name.endswith(".json"):
            self._documents[place] = data
        return data

    def view(self, name: str) -> memoryview | None:
        """Nothing remote is mapped."""
        return None

    def _find(self) -> dict[str, int]:
        raise NotImplementedError

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        raise NotImplementedError


class HttpStorage(_RemoteStorage):
    """A checkpoint behind a web server that answers range requests."""

    def _find(self) -> dict[str, int]:
        self._files = self._sizes(_KNOWN_FILES)
        if INDEX_FILE in self._files:
            index, _ = read_index(self)
            self._files |= self._sizes(tuple(sorted(set(index.weight_map.values()))))
        if not self._files:
            raise CheckError(
                f"{self._location}: none of {', '.join(_KNOWN_FILES[:5])} is there; give the URL "
                "of the folder that holds them"
            )
        return self._files

    def _sizes(self, names: tuple[str, ...]) -> dict[str, int]:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            try:
                sizes = list(pool.map(self._size, names))
            except StorageError as error:
                raise CheckError(str(error)) from error
        return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}

    def _size(self, name: str) -> int | None:
        """Ask for the first byte: the answer tells the size, and that ranges are understood."""

        def attempt() -> bytes:
            try:
                with self._open(name, 0, 1) as response:
                    return str(_total_of(response)).encode()
            except StorageError as error:
                if isinstance(error, _AbsentError):
                    return b""
                raise

        found = self._retry.run(f"{self._location}/{name}", attempt)
        return int(found) if found else None

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        with self._open(name, start, stop) as response:
            try:
                data: bytes = response.read(stop - start + 1)
            except (OSError, http.client.HTTPException) as error:
                raise _RetryableError(f"broke off: {error}") from error
        return data

    def _open(self, name: str, start: int, stop: int) -> Any:
        url = f"{self._location}/{urllib.request.pathname2url(name)}"
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}"})
        try:
            response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                _raise_for(url, error)
        except (OSError, http.client.HTTPException) as error:
            raise _RetryableError(f"no answer: {error}") from error
        if response.status != 206:
            response.close()
            raise StorageError(
                f"{url}: the server answered a range request with the whole file (status "
                f"{response.status}, expected 206); download the checkpoint instead"
            )
        _check_range(url, response, start)
        return response


class _AbsentError(StorageError):
    """The server has no such file."""


def _raise_for(url: str, error: urllib.error.HTTPError) -> None:
    if error.code in (404, 410):
        raise _AbsentError(f"{url}: not there (status {error.code})")
    if error.code == 429 or error.code >= 500:
        wait = error.headers.get("Retry-After", "")
        raise _RetryableError(
            f"status {error.code}", float(wait) if wait.isascii() and wait.isdigit() else None
        )
    if error.code == 416:
        raise StorageError(f"{url}: shorter than its size was said to be, or empty (status 416)")
    hint = "; it may need a login" if error.code in (401, 403) else ""
    raise StorageError(f"{url}: status {error.code}{hint}")


def _total_of(response: Any) -> int:
    total: str = (response.headers.get("Content-Range") or "").rpartition("/")[2]
    if not (total.isascii() and total.isdigit()):
        raise StorageError(f"{response.url}: Content-Range does not tell the file's size")
    return int(total)


def _check_range(url: str, response: Any, start: int) -> None:
    span: str = response.headers.get("Content-Range") or ""
    if not span.startswith(f"bytes {start}-"):
        response.close()
        raise StorageError(
            f"{url}: Content-Range is {span[:40]!r}, expected it to begin at {start}"
        )


class FsspecStorage(_RemoteStorage):
    """A checkpoint in any file system that fsspec knows: memory, s3, gs, hf and others."""

    def __init__(self, location: str, retry: Retry | None = None) -> None:
        super().__init__(location, retry)
        import fsspec  # type: ignore[import-untyped]

        try:
            self._system, self._root = fsspec.core.url_to_fs(self._location)
        except _backend_errors(ImportError, ValueError) as error:
            extra = "; install nvfp4check[hub]" if self._location.startswith("hf://") else ""
            raise CheckError(f"{location}: cannot be opened: {error}{extra}") from error

    def _find(self) -> dict[str, int]:
        try:
            found = self._system.find(self._root, maxdepth=2, detail=True)
        except _backend_errors(ValueError) as error:
            raise CheckError(f"{self._location}: cannot be listed: {error}") from error
        if not found:
            raise CheckError(f"{self._location}: nothing is there")
        files: dict[str, int] = {}
        prefix = self._root.rstrip("/") + "/"
        for path, details in found.items():
            name = path.removeprefix(prefix)
            size = details.get("size")
            if path.startswith(prefix) and unsafe_name(name) is None and isinstance(size, int):
                files[name] = size
        return files

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        try:
            data: bytes = self._system.cat_file(f"{self._root.rstrip('/')}/{name}", start, stop)
        except FileNotFoundError as error:
            raise StorageError(f"{self._location}/{name}: not there") from error
        except _backend_errors() as error:
            raise _RetryableError(str(error) or type(error).__name__) from error
        return data


def _backend_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The base errors of the network libraries that are loaded; most are no OSError."""
    found: list[type[Exception]] = [OSError, *more]
    for module, name in _BACKEND_ERRORS:
        error = getattr(sys.modules.get(module), name, None)
        if isinstance(error, type) and issubclass(error, Exception):
            found.append(error)
    return tuple(found)
