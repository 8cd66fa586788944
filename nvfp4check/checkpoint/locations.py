"""From what the user names to where the files lie."""

from pathlib import Path

from nvfp4check.checkpoint.remote_fsspec import FsspecStorage
from nvfp4check.checkpoint.remote_http import HttpStorage
from nvfp4check.checkpoint.remote_hub import HubStorage
from nvfp4check.checkpoint.storage import LocalStorage, Storage


def open_storage(location: str | Path) -> Storage:
    """Choose the storage for a directory or URL.

    Raises:
        CheckError: there is nothing at the location, or no storage for such a URL.
    """
    text = str(location)
    if text.startswith(("http://", "https://")):
        return HttpStorage(text)
    if text.startswith("hf://") and not text.startswith("hf://buckets/"):
        return HubStorage(text)
    if "://" in text:
        return FsspecStorage(text)
    return LocalStorage(location)
