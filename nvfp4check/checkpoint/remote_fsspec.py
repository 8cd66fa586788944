"""Checkpoints in any file system that fsspec opens: s3, gs, memory and others."""

import sys

from nvfp4check.checkpoint.patience import PassingError, Retry
from nvfp4check.checkpoint.remote import MAX_FILES, RemoteStorage
from nvfp4check.checkpoint.storage import StorageError, unsafe_name
from nvfp4check.findings import CheckError

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
#: What file systems call the field that changes when a file does.
_VERSION_FIELDS = ("ETag", "etag", "version_id", "generation", "LastModified", "mtime", "created")


class FsspecStorage(RemoteStorage):
    """A checkpoint in any file system that fsspec knows. Credentials are that file system's."""

    def __init__(self, location: str, retry: Retry | None = None) -> None:
        super().__init__(location, retry)
        import fsspec  # type: ignore[import-untyped]

        self._versions: dict[str, str] = {}
        try:
            self._system, self._root = fsspec.core.url_to_fs(self._location)
        except backend_errors(ImportError, ValueError) as error:
            raise CheckError(f"{location}: cannot be opened: {error}") from error

    def version(self, name: str) -> str:
        """The file system's tag or time of the file, if it gives one."""
        return self._versions.get(name, "")

    def _find(self) -> dict[str, int]:
        try:
            found = self._system.find(self._root, maxdepth=2, detail=True)
        except backend_errors(ValueError) as error:
            raise CheckError(f"{self._location}: cannot be listed: {error}") from error
        if not found:
            raise CheckError(f"{self._location}: nothing is there")
        if len(found) > MAX_FILES:
            raise CheckError(
                f"{self._location}: more than {MAX_FILES:,} files; give the folder of one "
                "checkpoint"
            )
        files: dict[str, int] = {}
        prefix = self._root.rstrip("/") + "/"
        for path, details in found.items():
            name = path.removeprefix(prefix)
            size = details.get("size")
            if path.startswith(prefix) and unsafe_name(name) is None and isinstance(size, int):
                files[name] = size
                known = (details[field] for field in _VERSION_FIELDS if details.get(field))
                self._versions[name] = str(next(known, ""))
        return files

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        try:
            data: bytes = self._system.cat_file(f"{self._root.rstrip('/')}/{name}", start, stop)
        except FileNotFoundError as error:
            raise StorageError(f"{self._location}/{name}: not there") from error
        except PermissionError as error:
            raise CheckError(
                f"{self._location}/{name}: may not be read: {error}; check the credentials"
            ) from error
        except backend_errors() as error:
            raise PassingError(str(error) or type(error).__name__) from error
        return data


def backend_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The base errors of the network libraries that are loaded; most are no OSError."""
    found: list[type[Exception]] = [OSError, *more]
    for module, name in _BACKEND_ERRORS:
        error = getattr(sys.modules.get(module), name, None)
        if isinstance(error, type) and issubclass(error, Exception):
            found.append(error)
    return tuple(found)
